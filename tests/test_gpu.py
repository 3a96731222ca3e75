"""What a GPU has to give: the CPU's results, up to rounding."""

import pytest
import torch
from conftest import TINY_GLO, TINY_IMLE

from glann import GLANN, GLO, IMLE
from glann.baselines import make_baseline
from glann.nearest import SEARCHES, nearest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def test_samples_are_those_of_the_cpu(trained, tmp_path):
    trained.save(tmp_path)
    cpu, gpu = (GLANN.load(tmp_path, device).sample(300, seed=3) for device in ("cpu", "cuda"))
    assert gpu.device.type == "cpu"
    assert (cpu.int() - gpu.int()).abs().max() <= 1  # of 255


@pytest.mark.parametrize("search", SEARCHES)
def test_neighbours_are_those_of_the_cpu(search):
    if search == "faiss":
        pytest.importorskip("faiss")
    random = torch.Generator().manual_seed(0)
    queries, points = (torch.randn(n, 64, generator=random) for n in (3000, 20_000))
    wanted, distances = nearest(queries, points)
    found, there = nearest(queries.cuda(), points.cuda(), search)
    assert found.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), distances, rtol=1e-4, atol=1e-4)
    assert (found.cpu() == wanted).float().mean() > 0.999


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


@pytest.mark.parametrize("name", ["ns-gan", "wgan-gp", "r3gan", "began", "vae", "pixel-imle"])
def test_baselines_train_and_resume_there(name, digits, tmp_path):
    sizes = {"images_seen": 320, "batch_size": 32, "noise_dim": 6, "width": 8, "hidden": 32}
    fitted = make_baseline(name, **sizes).fit(digits, device="cuda", folder=tmp_path)
    again = make_baseline(name, **sizes).fit(digits, device="cuda", folder=tmp_path)
    assert torch.equal(fitted.sample(5), again.sample(5))
