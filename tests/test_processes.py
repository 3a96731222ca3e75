"""Two processes against one: the same batches, so the same numbers to rounding."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import TINY_GLO, TINY_IMLE, TINY_TUNING, Killed
from safetensors.torch import load_file, save_file
from torch import nn

from glann import GLANN, GLO, IMLE, FineTuning, processes
from glann.cli import main
from glann.formats import fit
from glann.networks import Generator
from glann.randomness import seeded

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SEED = 3


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*TORCHRUN, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def given(digits):
    random = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    codes = nn.functional.normalize(torch.randn(150, 8, generator=random), dim=1)
    batch = torch.randn(9, 4, generator=random) * 3 + 1
    weights = {f"bn.{key}": value for key, value in network.state_dict().items()}
    large = nn.functional.interpolate(digits, 18)  # digits are too small to be moved
    return {"images": digits, "large": large, "codes": codes, "batch": batch, **weights}


@pytest.fixture(scope="module")
def folder(given, tmp_path_factory):
    """Where two processes left what they did."""
    folder = tmp_path_factory.mktemp("two")
    save_file(given, folder / "given.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        from glann import training

        record = training.Training.record

        def record_or_die(self, *args, **kwargs):
            record(self, *args, **kwargs)
            if self.step == 12:
                raise Killed

        patch.setattr(training, "CHECKPOINT_SECONDS", 0)
        patch.setattr(training.Training, "record", record_or_die)
        with pytest.raises(Killed):
            GLO(**TINY_GLO).fit(given["images"], seed=SEED, folder=folder / "begun-by-1")
    done = torchrun(str(TESTS / "processes_worker.py"), str(folder))
    assert done.returncode == 0, done.stderr
    assert "Warning: Grad strides" not in done.stderr
    assert done.stderr.count("are kept in") == 1
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


def untrained() -> Generator:
    """As processes_worker.py's."""
    with seeded(0, "untrained"):
        return Generator(8, (1, 18, 18), width=8, hidden=32)


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    """The same trainings in this one process."""
    folder = tmp_path_factory.mktemp("one")
    glo = GLO(**TINY_GLO).fit(given["images"], seed=SEED, folder=folder / "glo")
    imle = IMLE(**TINY_IMLE, perturbation=0.1, refuse=0.8).fit(
        given["codes"], seed=SEED, folder=folder / "imle"
    )
    FineTuning(**TINY_TUNING).fit(
        given["large"],
        given["codes"],
        untrained(),
        samples=given["codes"].flip(0),
        like=GLO(**TINY_GLO),
        seed=SEED,
        folder=folder / "finetune",
    )
    return glo, imle, folder


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("when", ["first", "again"])
def test_features_of_all_images_are_by_one_classifier(both, when):
    """Each process makes those of some, and learns a classifier that rounds differently."""
    for results in both:
        assert torch.equal(results["features.first"], both[0][f"features.{when}"])
        assert torch.allclose(results["features.own"], results["features.again"], atol=1e-4)


@pytest.mark.parametrize("stage", ["glo", "imle", "finetune"])
def test_losses_agree_to_rounding_and_are_logged_once(alone, folder, both, stage):
    one, two = log(alone[2] / stage), log(folder / stage)
    assert [line["step"] for line in two] == [line["step"] for line in one] == [5, 10, 15, 20]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4), a["step"]
        assert b["lr"] == a["lr"]
    assert one[0]["loss"] != pytest.approx(one[3]["loss"], rel=0.05)  # there is something to see


def test_codes_and_networks_agree(alone, both):
    glo, imle, _ = alone
    for results in both:
        assert torch.allclose(results["codes"], glo.codes_, atol=1e-3)
        for name, value in glo.generator_.state_dict().items():
            assert torch.allclose(results[f"glo.{name}"], value, atol=2e-3), name
        for name, value in imle.state()[1].items():
            assert torch.allclose(results[f"imle.{name}"], value, atol=2e-3), name


def test_every_process_ends_with_the_same(both):
    assert both[0].keys() == both[1].keys()
    for name, value in both[0].items():
        assert torch.equal(value, both[1][name]), name


def test_a_process_without_items_in_a_batch_goes_on(given, both):
    few = GLO(**{**TINY_GLO, "batch_size": 3, "epochs": 2, "loss": "contrastive"}).fit(
        given["large"][:9]
    )
    assert torch.allclose(both[0]["few"], few.codes_, atol=1e-2)


@pytest.mark.parametrize("cut", ["even", "uneven", "none"])
def test_batch_norm_is_that_of_the_whole_batch(given, both, cut):
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    network.load_state_dict({key[3:]: given[key] for key in given if key.startswith("bn.")})
    batch = given["batch"].clone().requires_grad_()
    network(batch).square().sum().backward()
    for name, wanted in {
        "input": batch.grad,
        "weight": network[0].weight.grad,
        "scale": network[1].weight.grad,
        "mean": network[1].running_mean,
        "variance": network[1].running_var,
    }.items():
        assert torch.allclose(both[0][f"{cut}.{name}"], wanted, rtol=1e-4, atol=1e-5), name


def test_what_they_tell_each_other(both):
    table, results = torch.arange(14.0).reshape(7, 2), both[0]
    assert torch.equal(results["whole"], table)
    assert torch.equal(results["first"], table[:3])
    wanted = torch.zeros(7, 2)
    wanted[[5, 2, 0, 3]] = table[[5, 2, 0, 3]]
    assert torch.equal(results["found"], wanted)
    assert results["parts"].tolist() == list(range(0, 100, 10))
    assert results["one part"].tolist() == [0, 1, 2, 3]
    assert results["any"].tolist() == [True, False]
    assert results["said"].tolist() == [1, 2, 0]  # how many of them were the first to say it


def test_a_file_of_the_cache_is_written_by_one_for_all(given, folder, both):
    wanted = fit(given["images"][:20], (16, 16), None)
    assert torch.equal(both[0]["scaled"], wanted)
    assert len(list((folder / "cache").iterdir())) == 1


def test_samples_are_those_of_one_process(alone, both):
    generator, (content, tensors) = copy.deepcopy(alone[0].generator_), alone[1].state()
    generator.load_state_dict({key: both[0][f"glo.{key}"] for key in generator.state_dict()})
    imle = IMLE.from_state(content, {key: both[0][f"imle.{key}"] for key in tensors})
    assert torch.equal(GLANN(generator, imle).sample(600), both[0]["samples"])


def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(given, folder, both, alone):
    glo, _, _ = alone
    assert torch.allclose(both[0]["resumed"], glo.codes_, atol=1e-3)
    resumed = GLO(**TINY_GLO).fit(given["images"], seed=SEED, folder=folder / "GLO-begun-by-2")
    assert torch.allclose(resumed.codes_, glo.codes_, atol=1e-3)
    straight = IMLE(**TINY_IMLE).fit(given["codes"], seed=SEED)
    imle = IMLE(**TINY_IMLE).fit(given["codes"], seed=SEED, folder=folder / "IMLE-begun-by-2")
    for name, value in straight.mapper_.state_dict().items():
        assert torch.allclose(imle.mapper_.state_dict()[name], value, atol=2e-3), name
    for stage in ("GLO", "IMLE"):
        assert [line["step"] for line in log(folder / f"{stage}-begun-by-2")] == [5, 10, 15, 20]


def test_the_command_line_trains_and_samples_in_two_processes(tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone.png"
    lengths = ("glo.epochs=1", "imle.epochs=1", "finetune.epochs=1", "data.limit=300")
    settings = [part for length in lengths for part in ("--set", length)]
    done = torchrun("-m", "glann", "--", "train", "digits", *settings, "--run", str(run), "-q")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run       ") == 1
    assert "2 processes" in done.stdout
    assert "Warning" not in done.stderr
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert len(GLANN.load(run).sample(3)) == 3
    done = torchrun("-m", "glann", "--", "sample", str(run), "-n", "300", "-o", str(alone))
    assert done.returncode == 0, done.stderr
    from glann.images import read_image, save_grid

    save_grid(GLANN.load(run).sample(300), tmp_path / "expected.png")
    assert torch.equal(read_image(alone), read_image(tmp_path / "expected.png"))


def test_a_command_for_one_process_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(main, ["compare", "digits", "--run", str(tmp_path)])
    assert result.exit_code == 2
    assert "one process" in result.output
    assert not list(tmp_path.iterdir())


def test_they_meet_again_where_one_ended_and_torchrun_starts_all_anew(tmp_path):
    script = tmp_path / "one_ends.py"
    script.write_text(
        "import os\n"
        "from glann import processes\n"
        "processes.start()\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and processes.rank() == 1:\n"
        "    os._exit(1)\n"
        "processes.wait()\n"
        "processes.stop()\n"
    )
    done = torchrun("--max-restarts", "1", str(script))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wrong", [["compare", "digits"], ["nothing"]])
def test_what_all_processes_find_wrong_one_says(monkeypatch, wrong):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        result = CliRunner().invoke(main, wrong)
        assert result.exit_code == 2
        assert result.output.count("Error: ") == (rank == "0")


def test_a_process_without_the_others_ends_without_a_traceback(monkeypatch):
    def train_glo(*args, **kwargs):
        raise RuntimeError("[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:9")

    monkeypatch.setattr("glann.runner.train_glo", train_glo)
    monkeypatch.setattr("glann.cli.group._meet", lambda *args: None)
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(main, ["train-glo", "digits"])
    assert result.exit_code == 2
    assert result.output.startswith("Error: another of the processes that torchrun started has end")


def test_without_torchrun_there_is_one_process():
    processes.start()
    assert (processes.rank(), processes.count(), processes.is_first()) == (0, 1, True)
    network = nn.Linear(2, 2)
    assert processes.parallel(network) is network
