"""The command line as a user meets it: what it writes, and what it says to bad input."""

import errno
import gzip
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from glann import cli, storage
from glann.images import read_image
from glann.places import shipped_pipelines, shipped_recipes

QUICK = """
[data]
source = "digits"
limit = 150
[glo]
code_dim = 8
epochs = 4
batch_size = 32
width = 8
hidden = 32
[imle]
noise_dim = 8
width = 32
depth = 2
epochs = 4
batch_size = 32
"""


def glann(*arguments):
    """Run the command line in this process: (exit code, what it printed)."""
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def succeeds(*arguments):
    code, output = glann(*arguments)
    assert code == 0, output
    return output


def fails(*arguments):
    code, output = glann(*arguments)
    assert code == 2, output
    assert "Traceback" not in output
    return output


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLANN_DATA", raising=False)
    Path("quick.toml").write_text(QUICK)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run.  Don't change it."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "quick.toml").write_text(QUICK)
    succeeds("train", folder / "quick.toml", "--run", folder / "run")
    return folder / "run"


def snapshot(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------------- what it does


def test_two_stages_then_samples():
    output = succeeds("train-glo", "quick.toml")
    assert "150 of 1×8×8, digits from scikit-learn" in output
    assert "next      glann train-imle runs/quick" in output
    output = succeeds("train-imle", "runs/quick")
    assert "runs/quick/pipeline" in output
    for name in ("samples.png", "side-by-side.png", "recipe.toml", "environment.json", "data.json"):
        assert Path("runs/quick", name).is_file()
    assert "samples.png (a grid of 64 images)" in succeeds("sample", "runs/quick")
    assert min(read_image(Path("samples.png")).shape[1:]) > 100


def test_train_is_both_stages(run, tmp_path):
    succeeds("train-glo", "quick.toml")
    succeeds("train-imle", "quick.toml")
    mine, theirs = (
        storage.load(folder / "pipeline", "pipeline")[1]
        for folder in (tmp_path / "runs/quick", run)
    )
    for part in ("generator", "sampler"):
        for name, value in mine[part].items():
            assert torch.equal(value, theirs[part][name])


def test_a_folder_that_holds_something_is_not_written_to(run):
    Path("photos").mkdir()
    Path("photos/0.png").write_bytes(b"a photograph")
    for command in (("sample",), ("interpolate",), ("reconstruct",)):
        assert "photos holds 0.png already" in fails(*command, run, "-o", "photos")
    assert Path("photos/0.png").read_bytes() == b"a photograph"
    for name in ("", "-"):
        assert "wanted the name of a file, or of a new folder" in fails("sample", run, "-o", name)
    succeeds("sample", run, "-n", 3, "-o", "new/folder")
    assert "holds 0.png already" in fails("sample", run, "-o", "new/folder")


def test_scores_of_anybodys_images(tmp_path):
    """Of two folders whose sizes differ, and into a folder that holds something else."""
    for name, side in (("real", 20), ("fake", 12)):
        os.mkdir(name)
        for i in range(120):
            grey = np.random.default_rng(i + side).integers(0, 256, (side, side), dtype=np.uint8)
            Image.fromarray(grey).save(f"{name}/{i}.png")
    given = ("evaluate", "--real", "real", "--fake", "fake", "--features", "pixels")
    assert "scored at 12×12" in succeeds(*given)
    assert "scored at 8×8" in succeeds(*given, "--size", 8)
    os.mkdir("own")
    for content in ("[]", "{}", '{"protocol": {"key": 1}}'):
        Path("own/results.json").write_text(content)
        assert "is not what glann wrote" in fails(*given, "-o", "own")
    assert "is a file; wanted a folder" in fails(*given, "-o", "own/results.json")


def test_scores_without_test_images_say_so():
    Path("own.toml").write_text(QUICK.replace('"digits"', '"array"'))
    np.save("a.npy", np.random.default_rng(0).integers(0, 256, (150, 1, 8, 8), dtype=np.uint8))
    succeeds("train", "own.toml", "--data", "a.npy")
    scored = ("evaluate", "runs/own", "--features", "pixels")
    assert "copies are best" in succeeds(*scored)
    output = succeeds(*scored, "--real", "a.npy")
    assert "copies are best" not in output


def test_endings_may_be_in_capitals(run):
    succeeds("sample", run, "-n", 3, "-o", "OUT.PNG")
    assert read_image(Path("OUT.PNG")).shape[0] == 1
    succeeds("sample", run, "-n", 3, "-o", "OUT.NPY")
    assert np.load("OUT.NPY").shape == (3, 1, 8, 8)


def test_more_samples_than_the_disk_has_room_for(run):
    assert "so many images of 64 bytes are" in fails("sample", run, "-n", 10**15, "-o", "x.npy")


def test_many_samples_are_those_of_few_at_a_time(run, monkeypatch):
    succeeds("sample", run, "-n", 50, "--start", 3, "-o", "whole.npy")
    monkeypatch.setattr("glann.cli.sampling.AT_A_TIME", 7)
    succeeds("sample", run, "-n", 50, "--start", 3, "-o", "parts.npy")
    assert np.array_equal(np.load("whole.npy"), np.load("parts.npy"))


def test_a_full_standard_output_is_no_traceback():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    command = [sys.executable, "-m", "glann", "recipes"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "Error: output can't be written: No space left on device\n"


@pytest.mark.parametrize("name", ["out.npy", "out.npz", "out", "out.png"])
def test_each_kind_of_output(run, name):
    succeeds("sample", run, "-n", 5, "--seed", 3, "-o", name)
    if name == "out":
        files = sorted(Path("out").iterdir())
        assert [file.name for file in files] == [f"{i}.png" for i in range(5)]
        array = np.stack([read_image(file) for file in files])
    elif name == "out.png":
        assert len(read_image(Path(name))) == 1  # grey stays grey
        return
    elif name == "out.npz":
        with np.load(name) as arrays:
            array = arrays["images"]
    else:
        array = np.load(name)
    assert array.dtype == np.uint8
    succeeds("sample", run, "-n", 2, "--start", 3, "--seed", 3, "-o", "again.npy")
    assert (np.load("again.npy") == array[3:]).all()


def test_reconstruct_project_interpolate(run):
    output = succeeds("reconstruct", run, "-n", 12)
    assert "mean absolute error" in output
    assert "(a grid of 24 images)" in output  # blank places don't count
    succeeds("reconstruct", run, "--indices", "5,0", "--no-originals", "-o", "r.npy")
    assert np.load("r.npy").shape == (2, 1, 8, 8)

    os.mkdir("mine")
    for i in range(3):  # colour, and of another size: scaled and turned grey
        noise = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"mine/{i}.png")
    output = succeeds("project", run, "mine", "--steps", 3, "--codes", "codes.npy")
    assert "over 3 images" in output
    assert "(a grid of 6 images)" in output
    assert np.load("codes.npy").shape == (3, 8)
    succeeds("project", run, "mine/1.png", "--steps", 3, "-o", "p.npy")
    assert np.load("p.npy").shape == (1, 1, 8, 8)

    succeeds("interpolate", run, "--pairs", 2, "--steps", 4, "-o", "i.npy")
    assert np.load("i.npy").shape == (8, 1, 8, 8)
    succeeds("interpolate", run, "--between", "3,7", "--steps", 4, "-o", "b.npy")
    succeeds("sample", run, "-n", 8, "-o", "s.npy")
    between, samples = np.load("b.npy"), np.load("s.npy")
    assert (between[[0, 3]] == samples[[3, 7]]).all()


def test_stage_two_alone_on_codes_of_any_model():
    codes = np.random.default_rng(0).normal(size=(100, 3))
    np.save("codes.npy", codes)
    settings = ("--set", "imle.epochs=2", "--set", "imle.batch_size=50", "--set", "imle.width=16")
    succeeds("train-imle", "--codes", "codes.npy", "-o", "mapper", *settings)
    succeeds("sample", "mapper", "-n", 7, "-o", "new.npy")
    new = np.load("new.npy")
    assert new.shape == (7, 3)
    assert new.dtype == np.float32
    assert "x.npy" in fails("sample", "mapper", "-o", "new.png")
    assert "imle" in succeeds("inspect", "mapper")


@pytest.mark.parametrize("sampler", ["gaussian", "mixture"])
def test_other_code_samplers(sampler):
    settings = ["--set", f"imle.sampler={sampler}"]
    Path("quick.toml").write_text(QUICK.split("[imle]")[0])
    if sampler == "mixture":
        settings += ["--set", "imle.components=3"]
    succeeds("train", "quick.toml", *settings)
    assert f"code sampler   {sampler}" in succeeds("inspect", "runs/quick")
    succeeds("sample", "runs/quick")


def test_with_codes(run, tmp_path):
    succeeds("train", "quick.toml", "--with-codes")
    os.rename("runs/quick/pipeline", "alone")
    succeeds("reconstruct", "alone", "--no-originals")
    assert "without codes" in fails("reconstruct", _without_codes(run, tmp_path))


def _without_codes(run, tmp_path):

    return shutil.copytree(run / "pipeline", tmp_path / "elsewhere")


def test_inspect_a_run_in_its_stages():
    succeeds("train-glo", "quick.toml")
    output = succeeds("inspect", "runs/quick")
    assert "stage one      done" in output
    assert "stage two      not begun" in output
    assert "not saved yet" in output
    succeeds("train-imle", "quick.toml")
    output = succeeds("inspect", "runs/quick")
    assert "trained on     150 images of digits" in output


def test_dry_run_prints_a_recipe_that_means_the_same():
    output = succeeds("train", "quick.toml", "--dry-run", "--set", "glo.epochs=9")
    assert "epochs = 9" in output
    assert not Path("runs").exists()
    Path("again.toml").write_text(output)
    assert succeeds("train", "again.toml", "--dry-run") == output


def test_recipes_are_listed():
    output = succeeds("recipes")
    for name in ("digits", "mnist", "fashion-mnist", "cifar10", "faces", "folder"):
        assert name in output
        assert name in shipped_recipes()
        succeeds("train", name, "--dry-run")
    assert "glo.code_dim" in succeeds("recipes", "--settings")


@pytest.mark.parametrize(
    ("name", "most"), [("digits", 1e6), ("mnist", 2e6), ("fashion-mnist", 2e6)]
)
def test_trained_pipelines_ship_and_are_small(name, most):
    assert sum(file.stat().st_size for file in shipped_pipelines()[name].iterdir()) <= most
    succeeds("sample", name, "-n", 64, "--seed", 3, "-o", "out.png")
    succeeds("inspect", name)


def test_own_images_from_a_folder():
    os.mkdir("photos")
    for i in range(40):
        colours = np.random.default_rng(i).integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(colours).save(f"photos/{i}.jpg")
    Path("own.toml").write_text(QUICK.replace('"digits"', '"folder"\nsize = 16'))
    output = succeeds("train", "own.toml", "--data", "photos")
    assert f"40 of 3×16×16, folder from {Path('photos').absolute()}" in output


def test_help_teaches_every_command():
    output = succeeds("--help")
    for name in cli.COMMANDS:
        assert name in output
        assert len(succeeds(name, "--help")) > 200
    assert set(cli.COMMANDS) == set(cli.main.commands)


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)])
def test_examples_in_help_stand_in_lines_of_their_own(command):
    output = succeeds(*command, "--help")
    written = inspect.cleandoc(cli.main.commands[command[0]].help if command else cli.main.help)
    kept = [line for line in written.splitlines() if line.startswith("  glann ")]
    lines = [line.strip() for line in output.splitlines()]
    assert kept or command not in ([], ["evaluate"], ["compare"], ["study"], ["bench"])
    for line in kept:
        assert line.strip() in lines
    assert "\\b" not in output


# ---------------------------------------------------------------------- resume


def test_stages_are_not_trained_again(run, tmp_path):
    succeeds("train", "quick.toml")
    before = snapshot("runs/quick/glo") | snapshot("runs/quick/imle")
    succeeds("train", "quick.toml")
    assert snapshot("runs/quick/glo") | snapshot("runs/quick/imle") == before


SLOW = ["--set", "glo.epochs=120", "--set", "imle.epochs=150"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("stage", ["glo", "imle"])
def test_killed_at_any_moment_it_ends_as_a_straight_run(number, stage, tmp_path):
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "from glann import cli, training; training.CHECKPOINT_SECONDS = 0.05; cli.main()"
    )
    command = [sys.executable, "-c", program, "train", "quick.toml", *SLOW]
    subprocess.run([*command, "--run", "straight", "-q"], check=True, capture_output=True)
    anew = ["--run", "killed", "--restart"]  # which would begin anew once more
    process = subprocess.Popen(
        [*command, *anew], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not storage.is_saved(Path("killed", stage)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), errors
    if number == signal.SIGINT:
        assert "The same command without --restart goes on from there" in errors
        assert "Traceback" not in errors
    assert not storage.is_saved(Path("killed/pipeline"))
    again = subprocess.run([*command, "--run", "killed"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    straight, killed = (
        storage.load(Path(name, "pipeline"), "pipeline")[1] for name in ("straight", "killed")
    )
    for part in straight:
        for name, value in straight[part].items():
            assert torch.equal(value, killed[part][name]), (part, name)


# ---------------------------------------------------------------------- bad input


def write_idx(folder, images, magic=2051):
    folder.mkdir(parents=True, exist_ok=True)
    header = np.array([magic, *images.shape], dtype=">i4").tobytes()
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(header + images.tobytes()))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digit"], "did you mean 'digits'"),
        (["train", "nowhere.toml"], "there is no recipe file"),
        (["train", "quick.toml", "--set", "glo.epoch=3"], "did you mean 'epochs'"),
        (["train", "quick.toml", "--set", "gol.epochs=3"], "did you mean 'glo'"),
        (["train", "quick.toml", "--set", "glo.epochs=many"], "wanted float"),
        (["train", "quick.toml", "--set", "glo.epochs=0"], "out of range"),
        (["train", "quick.toml", "--set", "glo.epochs"], "wanted SECTION.KEY=VALUE"),
        (["train", "quick.toml", "--set", "imle.sampler=gan"], "not a code sampler"),
        (["train", "quick.toml", "--set", "glo.batch_size=1"], "out of range"),
        (["train", "quick.toml", "--set", "data.limit=1"], "wanted 2 or more"),
        (["train", "quick.toml", "--device", "abacus"], "not on this machine"),
        (["train", "folder", "--data", "nothing-here"], "nothing-here"),
        (["train", "quick.toml", "--set", "glo.loss=vgg", "--vgg-weights", "no.pth"], "no.pth"),
        (["train-imle", "quick.toml"], "glann train-glo quick.toml"),
        (["train-imle"], "either a RECIPE or --codes"),
        (["train-imle", "--codes", "no.npy", "-o", "m"], "no.npy"),
        (["train-imle", "--codes", "no.npy", "-o", "m", "--half"], "--half goes with a RECIPE"),
        (["train-imle", "--codes", "no.npy", "-o", "m", "--details", "0"], "--details goes with"),
        (["sample", "nosuch"], "there is no pipeline 'nosuch'"),
        (["sample", "digits", "-o", "x.bmp"], "wanted .png"),
        (["sample", "digits", "-n", "0"], "-n"),
        (["inspect", "nosuch"], "nosuch"),
        (["project", "digits", "nosuch.png"], "nosuch.png"),
        (["interpolate", "digits", "--between", "1"], "two numbers"),
        (["interpolate", "digits", "--between", "-1,2"], "0 or more"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    assert message in fails(*arguments)
    assert not list(Path().rglob("*.safetensors"))
    succeeds("train", "quick.toml")  # and it is in nobody's way


def test_recipe_that_is_no_toml():
    Path("bad.toml").write_text("[glo\nepochs = 3")
    assert "bad.toml can't be read" in fails("train", "bad.toml")


def test_empty_and_broken_folders():
    os.mkdir("photos")
    assert "photos" in fails("train", "folder", "--data", "photos")
    Path("photos/a.png").write_bytes(b"no image")
    assert "a.png" in fails("train", "folder", "--data", "photos")


def test_images_of_mixed_sizes_need_a_size():
    os.mkdir("photos")
    for i, side in enumerate((16, 20)):
        Image.new("RGB", (side, side)).save(f"photos/{i}.png")
    Path("own.toml").write_text(QUICK.replace('"digits"', '"folder"'))
    assert "data.size" in fails("train", "own.toml", "--data", "photos")


def test_idx_of_wrong_magic_or_cut_short():
    Path("idx.toml").write_text(QUICK.replace('"digits"', '"mnist"'))
    images = np.zeros((100, 8, 8), dtype=np.uint8)
    path = write_idx(Path("files"), images, magic=2049)
    assert "2051" in fails("train", "idx.toml", "--data", "files")
    write_idx(Path("files"), images)
    path.write_bytes(path.read_bytes()[:-20])
    assert path.name in fails("train", "idx.toml", "--data", "files")
    assert not Path("runs").exists()


def test_a_run_goes_on_wherever_its_codes_are_kept():
    assert 'codes_on = "disk"' in succeeds("train", "quick.toml", "--codes-on", "disk", "--dry-run")
    succeeds("train-glo", "quick.toml", "--codes-on", "disk")
    before = Path("runs/quick/glo/manifest.json").read_bytes()
    succeeds("train", "quick.toml")
    assert Path("runs/quick/glo/manifest.json").read_text() == before.decode()
    assert "not one of 'memory', 'disk'" in fails("train", "quick.toml", "--codes-on", "tape")


def test_a_run_s_folder_goes_on_with_its_settings():
    changed = ("--set", "glo.epochs=2", "--set", "imle.epochs=3")
    output = succeeds("train-glo", "quick.toml", *changed, "--run", "here")
    assert "next      glann train-imle here" in output
    succeeds("train-imle", "here")
    assert storage.read_manifest(Path("here/imle"))["steps"] == 15
    assert not Path("runs").exists()
    assert "epochs = 2" in succeeds("train", "here", "--dry-run")
    output = fails("train-imle", "here", "--set", "imle.epochs=4")
    assert "imle.epochs = 3.0, now 4.0. Give --run FOLDER" in output  # not "here", as it was


def test_restarting_stage_two_with_another_stage_one_deletes_nothing():
    succeeds("train", "quick.toml")
    before = snapshot("runs")
    change = ("--set", "glo.epochs=5")
    output = fails("train-imle", "quick.toml", *change, "--restart")
    assert "glo.epochs = 4.0, now 5.0" in output
    assert "`glann train-glo`, these options and --restart to begin stage one anew" in output
    output = fails(
        "train", "quick.toml", "--restart", "--set", "glo.loss=vgg", "--vgg-weights", "x"
    )
    assert "x is not a file" in output
    assert snapshot("runs") == before


def test_a_run_that_says_nothing_of_its_images():
    succeeds("train", "quick.toml")
    for content in ("{}", "[]", "{", None):
        Path("runs/quick/data.json").unlink()
        if content is not None:
            Path("runs/quick/data.json").write_text(content)
        for command in ("train-glo", "train-imle"):
            output = fails(command, "quick.toml")
            assert "data.json is missing or damaged" in output
        Path("runs/quick/data.json").touch()


def test_a_run_whose_recipe_names_a_place_nearby_goes_on_from_afar(monkeypatch):
    nearby = QUICK.replace('"digits"', '"array"\npath = "a.npy"')
    Path("own.toml").write_text(nearby)
    np.save("a.npy", np.random.default_rng(0).integers(0, 256, (150, 1, 8, 8), dtype=np.uint8))
    output = succeeds("train-glo", "own.toml", "--run", "my run")
    assert "next      glann train-imle 'my run'\n" in output
    run = Path("my run").absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert f"next      glann sample '{run}'\n" in succeeds("train", run)
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("a.npy", "~/a.npy"))
    Path("own.toml").write_text(nearby.replace("a.npy", "b.npy"))
    for given in (run, "own.toml"):  # other images are not those of before
        assert "path" in fails("train-glo", given, "--run", run, "--restart")


def test_the_digits_are_found_again_beside_a_folder_named_as_their_place():
    Path("scikit-learn").mkdir()
    succeeds("train-glo", "quick.toml")
    succeeds("train", "runs/quick")
    succeeds("reconstruct", "runs/quick")


def test_of_images_that_are_gone_it_is_said_where_they_were():
    Path("own.toml").write_text(QUICK.replace('"digits"', '"array"'))
    np.save("a.npy", np.random.default_rng(0).integers(0, 256, (150, 1, 8, 8), dtype=np.uint8))
    succeeds("train", "own.toml", "--data", "a.npy")
    Path("a.npy").rename("b.npy")
    for command in ("train", "train-glo", "reconstruct", "evaluate"):
        assert str(Path("a.npy").absolute()) in fails(command, "runs/own")
    succeeds("reconstruct", "runs/own", "--data", "b.npy")


def test_a_recipe_that_is_shown_says_where_the_images_are():
    recipe = succeeds("train", "folder", "--data", "photos", "--set", "data.size=none", "--dry-run")
    assert f'path = "{Path("photos").absolute()}"' in recipe
    assert "size" not in recipe.split("[glo]")[0]
    Path("mine.toml").write_text(recipe)
    assert str(Path("photos").absolute()) in fails("train", "mine.toml")


def test_what_is_odd_about_images_is_told():
    Path("own.toml").write_text(QUICK.replace('"digits"', '"array"'))
    np.save("a.npy", np.random.default_rng(0).integers(0, 2, (150, 1, 8, 8), dtype=np.uint8))
    output = succeeds("train-glo", "own.toml", "--data", "a.npy")
    assert "note      the brightest pixel is 1 of 255" in output


def test_a_run_of_another_recipe_is_left_alone(tmp_path):
    succeeds("train", "quick.toml")
    before = snapshot("runs")
    for change in ("glo.epochs=5", "data.limit=120", "seed=1", "imle.epochs=5"):
        output = fails("train", "quick.toml", "--set", change)
        assert "run of another recipe" in output
        assert change.split("=")[0] in output
        assert snapshot("runs") == before
    succeeds("train-imle", "quick.toml", "--set", "imle.epochs=5", "--restart")
    succeeds("train", "quick.toml", "--set", "glo.epochs=5", "--restart")


def test_other_images_under_the_same_recipe_are_refused():
    Path("own.toml").write_text(QUICK.replace('"digits"', '"array"'))
    images = np.random.default_rng(0).integers(0, 256, (150, 1, 8, 8), dtype=np.uint8)
    np.save("a.npy", images)
    np.save("b.npy", images[::-1])
    succeeds("train", "own.toml", "--data", "a.npy")
    before = snapshot("runs")
    assert "on other images" in fails("train-glo", "own.toml", "--data", "b.npy")
    assert snapshot("runs") == before
    assert "in another order" in fails("reconstruct", "runs/own", "--data", "b.npy")
    succeeds("reconstruct", "runs/own", "--data", "a.npy")


def test_a_run_knows_where_its_images_were():
    Path("own.toml").write_text(QUICK.replace('"digits"', '"array"'))
    images = np.random.default_rng(0).integers(0, 256, (150, 1, 8, 8), dtype=np.uint8)
    np.save("a.npy", images)
    succeeds("train", "own.toml", "--data", "a.npy")
    few = ("--set", "vae.images_seen=300")
    succeeds("train-baseline", "own.toml", "--model", "vae", "--data", "a.npy", *few)
    for command in ("train", "train-glo", "train-imle"):
        succeeds(command, "runs/own")
        succeeds(command, "own.toml")
    succeeds("train-baseline", "runs/own", "--model", "vae", *few)
    pixels = ("--features", "pixels", "--models", "vae", *few)
    succeeds("compare", "own.toml", "--data", "a.npy", *pixels)
    succeeds("compare", "own.toml", *pixels)
    succeeds("reconstruct", "runs/own")
    for target in ("runs/own", "runs/own/pipeline", "runs/own/baselines/vae"):
        output = succeeds("evaluate", target, "-n", 50, "--features", "pixels", "-q")
        assert "the floor" in output
    Path("a.npy").rename("b.npy")
    assert "--data" in fails("reconstruct", "runs/own")


def test_a_damaged_pipeline_is_refused(run, tmp_path):

    shutil.copytree(run, "copy")
    weights = next(Path("copy/pipeline").glob("generator-*"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "is damaged" in fails("sample", "copy")
    weights.unlink()
    assert "can't be read" in fails("sample", "copy")
    manifest = Path("copy/pipeline/manifest.json")
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    assert "newer glann" in fails("sample", "copy")
    manifest.write_text("{")
    assert "can't be read" in fails("sample", "copy")
    assert not Path("samples.png").exists()


def test_a_full_disk_costs_nothing(run, tmp_path, monkeypatch):
    Path("samples.png").write_bytes(b"what was there before")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        assert "No space left" in fails("sample", run, "-o", "samples.png")
        assert "No space left" in fails("train", "quick.toml")
    assert Path("samples.png").read_bytes() == b"what was there before"
    assert not [name for name in os.listdir() if name.startswith(".")]
    succeeds("train", "quick.toml")


def test_running_out_of_memory_says_what_to_try(monkeypatch):
    from glann import runner

    def hungry(*arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    monkeypatch.setattr(runner, "train_glo", hungry)
    assert "batch_size" in fails("train-glo", "quick.toml")


def test_environment_is_noted(run):
    noted = json.loads((run / "environment.json").read_text())
    assert noted["versions"]["torch"] == torch.__version__
    assert noted["device"] == "cpu"
