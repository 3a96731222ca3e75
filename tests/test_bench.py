"""The benchmark: its numbers follow from one another, and what it compares does the same work."""

import itertools
import json
import statistics

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from glann import cli, nearest
from glann.bench import machine, plain, timing, ways
from glann.bench.rows import MACHINE, rows
from glann.bench.timing import Round, time_matching, time_steps
from glann.bench.ways import sizes
from glann.bench.workers import Task, Worker
from glann.devices import pick_precision
from glann.errors import GlannError
from glann.glo import GLO
from glann.images import to_float
from glann.imle import IMLE
from glann.networks import Generator, Mapper, evaluation_mode, to_sphere

CPU = torch.device("cpu")
QUICK = sizes(CPU, quick=True)
ROWS = rows(QUICK)


def invoke(*arguments):
    result = CliRunner().invoke(cli.main, ["bench", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a quick run writes: (results, what it printed, its folder).  Don't change it."""
    folder = tmp_path_factory.mktemp("bench")
    only = itertools.chain(*(("--only", name) for name in ("stage-two", "matching", "growth")))
    result = invoke(
        *("--quick", "--rounds", 2, "--threads", 1, "--device", "cpu", *only),
        *("--json", folder / "bench.json", "--plot", folder / "growth.png"),
    )
    assert result.exit_code == 0, result.output
    return json.loads((folder / "bench.json").read_text()), result, folder


def test_a_run_writes_table_json_and_picture(found):
    results, printed, folder = found
    assert results["quick"] is True
    assert results["environment"]["threads"] == 1
    assert {"torch", "numpy"} <= set(results["environment"]["versions"])
    assert set(results["machine"]) - {"bfloat16"} == {"float32", "copy", "start"}
    assert [row["name"] for row in results["rows"]] == (
        ["stage-two"] * 4 + ["matching"] + ["growth"] * 3
    )
    for text in ("measures nothing", "× plain", "of the limit", "– matching", "float32"):
        assert text in printed.stdout
    assert "1 of 5: stage two" in printed.stderr
    with Image.open(folder / "growth.png") as picture:
        assert min(picture.size) > 300


def test_numbers_follow_from_the_rounds(found):
    results = found[0]
    for row in results["rows"]:
        for name, way in row["ways"].items():
            rates = [one["items"] / one["seconds"] for one in way["rounds"]]
            assert len(rates) == (1 if row["n"] == max(QUICK.grown) else 2)
            assert way["rate"] == pytest.approx(statistics.median(rates))
            assert (way["slowest"], way["fastest"]) == (min(rates), max(rates))
            assert (way["memory_bytes"] is None) == (row["part"] is not None), name
        ours = row["ways"]["ours"]["rate"]
        assert row["ratios"] == {
            name: ours / way["rate"] for name, way in row["ways"].items() if name != "ours"
        }
        limits = results["machine"]
        at_best = sum(cost / limits[limit]["rate"] for limit, cost in row["costs"].items())
        assert row["of_limit"] == pytest.approx(ours * at_best)


def test_parts_make_the_whole(found):
    whole, *parts = found[0]["rows"][:4]
    assert [part["part"] for part in parts] == ["drawing", "matching", "steps"]
    for limit, cost in whole["costs"].items():
        assert sum(part["costs"].get(limit, 0) for part in parts) == pytest.approx(cost)
    for name, way in whole["ways"].items():
        for number, one in enumerate(way["rounds"]):
            seconds = [part["ways"][name]["rounds"][number]["seconds"] for part in parts]
            assert min(seconds) > 0
            assert sum(seconds) == pytest.approx(one["seconds"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}-{row.n or ''}")
def test_every_way_can_be_measured(row):
    for prepare in row.ways.values():
        done = prepare(QUICK)()
        assert done.seconds > 0
        assert done.items >= 1


def test_help_names_all_that_can_be_measured():
    output = invoke("--help").output
    for row in ROWS:
        assert row.name in output


def test_limits_can_be_measured():
    for _, prepare in MACHINE.values():
        assert prepare(QUICK)().rate > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "matchin"], "matching"),
        (["--device", "gpu"], "device 'gpu' is not on this machine"),
        (["--plot", "growth.pdf"], ".png or .svg"),
        (["--plot", "x.png", "--only", "start"], "which --only leaves out"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, said):
    result = invoke("--quick", *arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_a_file_that_cannot_be_written_costs_no_measurement(found, monkeypatch):
    monkeypatch.setattr("glann.bench.bench", lambda **how: found[0])
    result = invoke("--json", found[2])
    assert result.exit_code == 2
    assert "can't be written" in result.output
    assert "– matching" in result.stdout


def test_a_way_that_fails_is_named_with_its_reason():
    number = [row.name for row in ROWS].index("matching")
    for task, reason in (
        (Task(number, "plain", "no-device", 1, True), "no-device"),
        (Task(number, "nonesuch", "cpu", 1, True), "ended with code 1"),
    ):
        with pytest.raises(GlannError, match=f"'{task.way}' could not be measured: .*{reason}"):
            Worker(task).__enter__()


@pytest.mark.parametrize("step", ["__enter__", "round", "memory"])
def test_a_way_that_fails_costs_no_other(monkeypatch, step):
    done = getattr(Worker, step)

    def plain_fails(self):
        if self.task.way in {"plain", "copy"}:
            raise GlannError(f"'{self.task.way}' could not be measured: out of memory")
        return done(self)

    monkeypatch.setattr(Worker, step, plain_fails)
    result = invoke("--quick", "--rounds", 1, "--only", "matching", "--device", "cpu")
    assert result.exit_code == 0
    whole = [line for line in result.stdout.splitlines() if line.startswith("| matching")]
    assert len(whole) == 1
    assert "%" in whole[0]
    assert "× plain" not in result.stdout
    for place in (result.stdout, result.stderr):  # as it happens, and below the table
        assert "candidates, d 64: 'plain' could not be measured: out of memory" in place
        assert "not measured: the machine: 'copy'" in place


def test_a_limit_that_fails_leaves_its_shares_out(monkeypatch):
    begin = Worker.__enter__

    def limits_fail(self):
        if self.task.row is None:
            raise GlannError("out of memory")
        return begin(self)

    monkeypatch.setattr(Worker, "__enter__", limits_fail)
    result = invoke("--quick", "--rounds", 1, "--only", "matching", "--device", "cpu")
    assert result.exit_code == 0
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("| matching")]
    assert "%" not in row


def test_nothing_measured_is_an_error(monkeypatch, tmp_path):
    def fails(self):
        raise GlannError(f"'{self.task.way}' could not be measured: out of memory")

    monkeypatch.setattr(Worker, "__enter__", fails)
    result = invoke("--quick", "--only", "start", "--json", tmp_path / "x.json")
    assert result.exit_code == 2
    assert "nothing could be measured" in result.output
    assert "'ours' could not be measured" in result.output
    assert not list(tmp_path.iterdir())


def test_growth_that_was_not_measured_is_not_drawn(found, monkeypatch, tmp_path):
    others = [row for row in found[0]["rows"] if row["name"] != "growth"]
    monkeypatch.setattr("glann.bench.bench", lambda **how: found[0] | {"rows": others})
    result = invoke("--json", tmp_path / "x.json", "--plot", tmp_path / "x.png")
    assert result.exit_code == 2
    assert "nothing to draw" in result.output
    assert "– matching" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


# ---------------------------------------------------------------------- what is compared


@pytest.mark.parametrize("n", [1, 1999, 4001])
def test_all_ways_find_the_same_neighbours(n):
    random = torch.Generator().manual_seed(n)
    queries, points = (torch.randn(count, 16, generator=random) for count in (n, 3000))
    wanted, distances = nearest.nearest(queries, points)
    others = [plain.nearest(queries, points), torch.from_numpy(ways.by_sklearn(queries, points))]
    if ways.faiss is not None:
        others.append(torch.from_numpy(np.array(ways.by_faiss(queries, points))))
    for indices in others:
        assert indices.dtype == torch.int64
        assert (indices == wanted).float().mean() > 0.999
        torch.testing.assert_close((queries - points[indices]).square().sum(1), distances)


def test_the_plain_stage_one_learns(digits):
    torch.manual_seed(0)
    generator = Generator(8, (1, 8, 8), width=8, hidden=32)
    codes = plain.codes_of(len(digits), 8, CPU)
    steps = plain.stage_one(generator, codes, to_float(digits), 30)
    losses = list(itertools.islice(steps, 60))
    assert torch.stack(losses[-5:]).mean() < 0.8 * torch.stack(losses[:5]).mean()


def test_the_plain_stage_one_halves_its_learning_rates(digits):
    torch.manual_seed(0)
    generator = Generator(8, (1, 8, 8), width=8, hidden=32)
    codes = plain.codes_of(30, 8, CPU)
    moved = []
    steps = plain.stage_one(generator, codes, to_float(digits[:30]), 30, halved=2)
    before = codes.weight.detach().clone()
    for _ in itertools.islice(steps, 6):  # one step an epoch: Adam, made anew, moves by its rate
        moved.append(float((codes.weight.detach() - before).abs().max()))
        before = to_sphere(codes.weight.detach().clone())
    assert moved == pytest.approx([0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025], rel=1e-3)


def test_training_takes_the_fewest_epochs_that_reach_the_loss():
    images = ways.images_of(QUICK.images)

    def loss(epochs):
        glo = ways.trained(epochs, images, QUICK)
        return ways.loss_on(to_float(images), glo.generator_, glo.codes_)

    assert ways.fewest_epochs(loss(3), images, QUICK) == 3
    assert ways.fewest_epochs(0.999 * loss(2), images, QUICK) == 3
    with pytest.raises(GlannError, match="did not come to"):
        ways.fewest_epochs(0.0, images, QUICK)


def test_the_plain_stage_two_learns():
    codes = to_sphere(torch.randn(200, 4, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    mapper = Mapper(4, 4, 32, 2, on_sphere=True)

    def distance():
        with evaluation_mode(mapper):
            made = mapper(torch.randn(400, 4, generator=torch.Generator().manual_seed(1)))
        return float(nearest.nearest(codes, made)[1].mean())

    before = distance()
    work = list(itertools.islice(plain.stage_two(mapper, codes, 4, 50), 20 * 6))
    assert work[:7] == ["drawing", "matching", *["steps"] * 4, "drawing"]
    assert distance() < 0.7 * before


def test_plain_samples_are_images():
    mapper = Mapper(4, 8, 16, 2, on_sphere=True)
    images = plain.sample(Generator(8, (1, 8, 8), width=8, hidden=32), mapper, 25, batch_size=10)
    assert images.shape == (25, 1, 8, 8)
    assert 0 <= images.min() <= images.max() <= 1


# ---------------------------------------------------------------------- how it is measured


def test_operations_are_those_counted_by_hand():
    generator = Generator(64, (1, 28, 28))
    full = 64 * 1024 + 1024 * 128 * 7 * 7
    deconvolutions = 128 * 64 * 4 * 4 * 7 * 7 + 64 * 1 * 4 * 4 * 14 * 14
    assert machine.forward_flops(generator, 64) == 2 * (full + deconvolutions)
    mapper = Mapper(64, 64, 512, 3, on_sphere=True)
    assert machine.forward_flops(mapper, 64) == 2 * (64 * 512 + 2 * 512 * 512 + 512 * 64)
    convolution = torch.nn.Sequential(
        torch.nn.Unflatten(1, (3, 8, 8)), torch.nn.Conv2d(3, 5, 4, 2, 1)
    )
    assert machine.forward_flops(convolution, 192) == 2 * 3 * 5 * 4 * 4 * 4 * 4


def test_costs_are_those_of_the_sizes():
    costs = {row.name: row.costs() for row in ROWS if row.name != "growth"}
    n, m = QUICK.codes, QUICK.points
    precision = str(pick_precision("auto", QUICK.device)).removeprefix("torch.")
    assert costs["matching"] == {"": {precision: 2 * m * 64}}
    assert costs["stage-two"]["matching"] == {precision: 2 * 2 * n * 64}
    assert costs["features"] == {}


def test_a_training_is_timed_between_two_steps_and_ended(digits, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(timing, "now", lambda device: float(next(clock)))
    seen = []

    def fit(epochs):
        glo = GLO(code_dim=4, width=8, hidden=16, batch_size=30, epochs=epochs, loss="l1")
        seen.append(glo.fit(digits))

    assert time_steps(lambda: fit(2), 3, 4, CPU) == (120, 0.0, 1.0)
    assert seen == []  # it was ended
    assert time_steps(lambda: fit(1), 3, 2, CPU) == (60, 2.0, 3.0)
    assert len(seen) == 1  # it ended by itself, and nothing is left of the stopwatch
    fit(2)
    assert len(seen) == 2


def test_matching_is_told_from_drawing_and_steps(monkeypatch):
    clock = itertools.accumulate(itertools.count())  # 0, 1, 3, 6: each step takes longer
    monkeypatch.setattr(timing, "now", lambda device: float(next(clock)))
    imle = IMLE(noise_dim=4, width=16, depth=1, batch_size=25, epochs=1, cells=1)
    done = time_matching(lambda: imle.fit(torch.randn(100, 4)), CPU)
    assert done == Round(100, 6.0, {"drawing": 1.0, "matching": 2.0, "steps": 3.0})


def test_images_are_digits_in_a_frame():
    images = ways.images_of(2000)
    assert images.shape == (2000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert (images[:, :, :4] == 0).all()
    assert images.max() == 255
