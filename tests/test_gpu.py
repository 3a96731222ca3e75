"""What a GPU has to give: the CPU's results, up to rounding."""

import json

import pytest
import torch
from conftest import TINY_GLO, TINY_IMLE, Killed

import glann.nearest
from glann import GLANN, GLO, IMLE
from glann.baselines import MODELS, make_baseline
from glann.devices import Replayed, at_once
from glann.finetuning import FineTuning
from glann.nearest import SEARCHES, nearest, nearest_in_groups
from glann.optimisers import OPTIMISERS
from glann.randomness import noise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def test_samples_are_those_of_the_cpu(trained, tmp_path):
    trained.save(tmp_path)
    cpu, gpu = (GLANN.load(tmp_path, device).sample(300, seed=3) for device in ("cpu", "cuda"))
    assert gpu.device.type == "cpu"
    assert (cpu.int() - gpu.int()).abs().max() <= 1  # of 255


def normal(seed, n, d):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def check_neighbours(points, found, wanted):
    """Indices and squared distances are the same but for rounding; of few numbers the latter."""
    assert found[0].device.type == found[1].device.type == "cuda"
    torch.testing.assert_close(found[1].cpu(), wanted[1], rtol=1e-4, atol=1e-4)
    if points.shape[1] > 3:  # else many are equally near
        assert (found[0].cpu() == wanted[0]).float().mean() > 0.999


@pytest.mark.parametrize("search", SEARCHES)
def test_neighbours_are_those_of_the_cpu(search):
    if search != "torch":
        pytest.importorskip("faiss")
    queries, points = normal(0, 3000, 64), normal(1, 20_000, 64)
    check_neighbours(
        points, nearest(queries.cuda(), points.cuda(), search), nearest(queries, points)
    )


def test_hopper_has_a_search_of_its_own():
    pytest.importorskip("triton")
    from glann.nearest_triton import available

    device = torch.device("cuda", torch.cuda.current_device())
    assert available(device) == (torch.cuda.get_device_capability() == (9, 0))


@pytest.mark.parametrize("d", [1, 3, 64, 65, 130, 513])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 1000), (777, 50), (333, 4001)])
def test_neighbours_of_any_number_of_numbers(n, m, d):
    queries, points = normal(0, n, d), normal(1, m, d)
    check_neighbours(points, nearest(queries.cuda(), points.cuda()), nearest(queries, points))


def test_many_neighbours():
    queries, points = normal(0, 5000, 64), normal(1, 40_000, 64)
    check_neighbours(points, nearest(queries.cuda(), points.cuda()), nearest(queries, points))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("d", [1, 3, 64, 65, 130, 513])
def test_neighbours_in_groups(d, at_once, monkeypatch):
    if not at_once:
        monkeypatch.setattr(glann.nearest, "search_at_once", lambda device: None)
    random = torch.Generator().manual_seed(2)
    of_queries, of_points = (torch.randint(1, most, (50,), generator=random) for most in (150, 700))
    of_queries[::7] = 0
    of_points[::14] = 0
    queries, points = normal(0, int(of_queries.sum()), d), normal(1, int(of_points.sum()), d)
    wanted = nearest_in_groups(queries, points, of_queries, of_points)
    found = nearest_in_groups(queries.cuda(), points.cuda(), of_queries, of_points)
    check_neighbours(points, found, wanted)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), of_points.cumsum(0)])
    group = torch.arange(50).repeat_interleave(of_queries)
    assert (found[0].cpu() >= bounds[group]).all()
    assert (found[0].cpu() < bounds[group + 1]).all()


def test_both_stages_learn_as_on_the_cpu(digits):
    cpu = GLO(**TINY_GLO).fit(digits, seed=1, device="cpu")
    gpu = GLO(**TINY_GLO).fit(digits, seed=1, device="cuda")
    assert gpu.codes_.device.type == "cpu"
    assert (cpu.codes_ - gpu.codes_).norm(dim=1).median() < 0.05
    cpu_mapper, gpu_mapper = (
        IMLE(**TINY_IMLE).fit(cpu.codes_, seed=1, device=device) for device in ("cpu", "cuda")
    )
    apart = cpu_mapper.sample(200) - gpu_mapper.sample(200)
    assert apart.norm(dim=1).median() < 0.1


def last_loss(folder):
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["loss"]


@pytest.fixture(params=["replayed", "launched"])
def steps(request, monkeypatch):
    """Whether steps are replayed, which they are by themselves."""
    if request.param == "launched":
        original = Replayed.__init__

        def launched(self, *given, **more):
            original(self, *given, **more)
            self.replays = False

        monkeypatch.setattr(Replayed, "__init__", launched)
    return request.param


def test_a_replayed_step_reads_its_inputs_and_leaves_its_results_behind():
    table = torch.zeros(5, device="cuda")

    def step(rows, by):
        table[rows] += by
        return table[rows].sum()

    step = Replayed(step, torch.device("cuda"))
    for number in range(8):
        rows = torch.tensor([number % 5, (number + 1) % 5][: 1 + number % 2], device="cuda")
        before = table.clone()
        given = step(rows, float(number))
        before[rows] += number
        torch.testing.assert_close(table, before)
        torch.testing.assert_close(given, before[rows].sum())


def test_noise_is_the_same_where_it_is_pinned():
    plain, pinned = (noise(1, "sample", 5, 3000, 7, kind) for kind in (False, True))
    assert pinned.is_pinned()
    assert torch.equal(plain, pinned)


def test_works_see_what_was_before_and_are_done_after():
    x = torch.ones(2000, 2000, device="cuda")
    for _ in range(5):
        x = x @ x / 2000
    found = at_once(x.device, x.sum, lambda: (x @ x).sum(), lambda: (2 * x).sum())
    sums = torch.stack(found).tolist()
    assert sums == pytest.approx([2000**2, 2000**3, 2 * 2000**2], rel=1e-3)


LOSSES = {}


@pytest.mark.parametrize("blocks", ["transposed", "residual"])
@pytest.mark.parametrize(
    ("loss", "optimiser"),
    [("scattering", "adam"), ("laplacian", "adam"), ("l1", "adam"), ("contrastive", "muon")],
)
def test_steps_end_at_the_cpus_loss(digits, steps, loss, optimiser, blocks, tmp_path):
    settings = {**TINY_GLO, "epochs": 8, "loss": loss, "blocks": blocks, "optimiser": optimiser}
    GLO(**settings).fit(digits, device="cuda", folder=tmp_path / "gpu")
    key = loss, blocks, optimiser
    if key not in LOSSES:
        GLO(**settings).fit(digits, device="cpu", folder=tmp_path / "cpu")
        LOSSES[key] = last_loss(tmp_path / "cpu")
    assert last_loss(tmp_path / "gpu") == pytest.approx(LOSSES[key], rel=0.05)


def test_images_that_do_not_fit_are_uploaded_by_the_batch(digits, monkeypatch, tmp_path):
    GLO(**TINY_GLO).fit(digits, device="cuda", folder=tmp_path / "all")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 100))
    GLO(**TINY_GLO).fit(digits, device="cuda", folder=tmp_path / "batches")
    assert last_loss(tmp_path / "batches") == pytest.approx(last_loss(tmp_path / "all"), rel=0.01)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_killed_training_goes_on(digits, tmp_path, kill_at, monkeypatch, optimiser):
    settings = {**TINY_GLO, "optimiser": optimiser}
    whole = GLO(**settings).fit(digits, device="cuda", folder=tmp_path / "whole")
    kill_at(9)
    with pytest.raises(Killed):
        GLO(**settings).fit(digits, device="cuda", folder=tmp_path / "parts")
    monkeypatch.undo()
    resumed = GLO(**settings).fit(digits, device="cuda", folder=tmp_path / "parts")
    assert (whole.codes_ - resumed.codes_).norm(dim=1).median() < 0.02
    assert last_loss(tmp_path / "parts") == pytest.approx(last_loss(tmp_path / "whole"), rel=0.01)


@pytest.mark.parametrize("distance", [0, 3])
def test_fine_tuning_learns_as_on_the_cpu(digits, trained, tmp_path, distance):
    for device in ("cpu", "cuda"):
        tuning = FineTuning(epochs=4, batch_size=32, distance=distance)
        codes = trained.codes[: len(digits)]
        given = {"samples": codes.flip(0), "device": device, "folder": tmp_path / device}
        tuning.fit(digits, codes, trained.generator, **given)
    assert last_loss(tmp_path / "cuda") == pytest.approx(last_loss(tmp_path / "cpu"), rel=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_baselines_train_and_resume_there(name, digits, tmp_path, steps):
    sizes = {"images_seen": 640, "batch_size": 32, "noise_dim": 6, "width": 8, "hidden": 32}
    fitted = make_baseline(name, **sizes).fit(digits, device="cuda", folder=tmp_path / "gpu")
    again = make_baseline(name, **sizes).fit(digits, device="cuda", folder=tmp_path / "gpu")
    assert torch.equal(fitted.sample(5), again.sample(5))
    cpu = make_baseline(name, **sizes).fit(digits, device="cpu")
    apart = (fitted.sample(50).float() - cpu.sample(50).float()).abs().mean()
    assert apart < 4  # of 255
