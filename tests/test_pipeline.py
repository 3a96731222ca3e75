import copy
import json

import pytest
import torch
from conftest import TINY_GLO
from torch import nn

from glann import GLANN, GLO, IMLE, Gaussian, GlannError, storage
from glann.images import to_float
from glann.networks import Generator, to_sphere
from glann.pipeline import slerp


def test_loaded_is_what_was_saved(trained, tmp_path):
    trained.info = {"note": "α"}
    trained.save(tmp_path / "p", with_codes=True)
    loaded = GLANN.load(tmp_path / "p")
    assert torch.equal(loaded.sample(30, seed=3), trained.sample(30, seed=3))
    assert torch.equal(loaded.reconstruct([3, 0]), trained.reconstruct([3, 0]))
    assert torch.equal(loaded.codes, trained.codes)
    assert loaded.info == {"note": "α"}


def test_no_codes_unless_asked_for(trained, tmp_path):
    trained.save(tmp_path)
    loaded = GLANN.load(tmp_path)
    assert loaded.codes is None
    with pytest.raises(GlannError, match="--with-codes"):
        loaded.reconstruct([0])


def test_half_precision_is_half_the_size_and_nearly_the_same(trained, tmp_path):
    trained.save(tmp_path / "full")
    trained.save(tmp_path / "half", half=True)
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
        for name in ("full", "half")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    full, half = (GLANN.load(tmp_path / name).sample(50) for name in ("full", "half"))
    assert (to_float(full) - to_float(half)).abs().mean() < 0.005


def test_half_precision_keeps_numbers_that_are_too_small_for_it(trained, tmp_path):
    """Codes with a cell each leave the mapper a billionth to add: nothing would divide by it."""
    codes = trained.codes[:10]
    alone = IMLE(noise_dim=4, width=8, depth=1, levels=2, cells=10, epochs=1).fit(codes)
    assert 0 < alone.mapper_.scale < 2**-25  # what float16 rounds to 0
    pipeline = GLANN(trained.generator, alone)
    pipeline.save(tmp_path, half=True)
    apart = to_float(pipeline.sample(50)) - to_float(GLANN.load(tmp_path).sample(50))
    assert apart.abs().mean() < 0.005


def test_half_precision_keeps_numbers_that_are_too_large_for_it(trained, tmp_path):
    """A variance of infinity would make all that it divides black."""
    pipeline = copy.deepcopy(trained)
    norm = [module for module in pipeline.generator.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        norm[-1].running_var *= 1e8
        norm[-1].weight *= 1e4
    assert norm[-1].running_var.max() > 65_504
    pipeline.save(tmp_path, half=True)
    apart = to_float(pipeline.sample(50)) - to_float(GLANN.load(tmp_path).sample(50))
    assert apart.abs().mean() < 0.005


def test_a_pipeline_can_be_saved_with_the_details_of_fewer_codes(trained, tmp_path):
    kept = torch.cat(trained.sampler.details_, 1).tolist()  # pairs of the two tables' rows
    assert len(kept) > 20
    trained.save(tmp_path / "few", details=20)
    few = GLANN.load(tmp_path / "few").sampler.details_
    rows = [kept.index(pair) for pair in torch.cat(few, 1).tolist()]
    assert len(set(rows)) == 20
    assert max(rows) > len(kept) / 2
    assert len(trained.sampler.details_.anchors) == len(kept)
    for n, wanted in ((0, 0), (10**6, len(kept))):
        trained.save(tmp_path / "other", details=n)
        loaded = GLANN.load(tmp_path / "other")
        assert len(loaded.sampler.details_.anchors) == wanted
        assert loaded.sample(3).shape == (3, *trained.image_shape)
    with pytest.raises(GlannError, match="-1 codes"):
        trained.save(tmp_path / "other", details=-1)


def test_a_network_that_nobody_could_load_is_not_saved(trained, tmp_path):
    """What is not glann's own serves to sample, but no manifest tells how to make it."""

    class Mine(Generator):
        pass

    mine = Mine(**trained.generator.config).eval()
    mine.load_state_dict(trained.generator.state_dict())
    pipeline = GLANN(mine, trained.sampler)
    assert torch.equal(pipeline.sample(3), trained.sample(3))
    with pytest.raises(GlannError, match="a Mine can't be saved"):
        pipeline.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_generator_is_wanted_not_what_taught_it(trained):
    with pytest.raises(GlannError, match=r"a GLO; wanted the network, `GLO.generator_`"):
        GLANN(GLO(), trained.sampler)


def test_files_are_json_and_safetensors_alone(trained, tmp_path):
    trained.save(tmp_path, with_codes=True)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["files"].keys() == {"generator", "sampler", "codes"}
    assert manifest["versions"]["torch"] == torch.__version__


def test_run_folder_is_taken_for_its_pipeline(trained, tmp_path):
    trained.save(tmp_path / "pipeline")
    assert torch.equal(GLANN.load(tmp_path).sample(3), trained.sample(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "Install a newer glann"),
        ({"glann": "checkpoint"}, "holds 'checkpoint'; wanted 'pipeline'"),
        ({"generator": {"code_dim": 8}}, "don't fit"),
        ({"sampler": {"name": "other"}}, "don't fit"),
        ({"sampler": 3}, "don't fit"),
        ({"files": {}}, "don't fit"),
    ],
)
def test_unfit_manifests_are_refused(trained, tmp_path, change, message):
    trained.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(GlannError, match=message):
        GLANN.load(tmp_path)


def test_a_name_that_is_not_there(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GlannError, match="a shipped one"):
        GLANN.load("nosuch")
    trained.save("runs/mine/pipeline")
    with pytest.raises(GlannError, match="did you mean your run runs/mine"):
        GLANN.load("mine")
    (tmp_path / "runs/mine/pipeline/manifest.json").unlink()
    with pytest.raises(GlannError, match="glann train"):
        GLANN.load("runs/mine")


def test_generated_images_are_the_generators(trained):
    codes = trained.codes[:10]
    with torch.no_grad():
        oracle = trained.generator(codes)
    made = to_float(trained.generate(codes))
    assert (made - oracle).abs().max() <= 0.5 / 255 + 1e-5
    assert trained.generator.training is False


def test_generate_refuses_codes_of_another_size(trained):
    with pytest.raises(GlannError, match="codes have 3 numbers; this generator's have 8"):
        trained.generate(torch.zeros(2, 3))


@pytest.mark.parametrize("bad", [[150], [-1], [0, 1000]])
def test_reconstruct_refuses_images_that_are_not_there(trained, bad):
    with pytest.raises(GlannError, match="wanted 0 to 149"):
        trained.reconstruct(bad)


@pytest.mark.parametrize("bad", [[True, False], [1.7], 3, [[0, 1]]])
def test_reconstruct_takes_whole_numbers_in_a_row(trained, bad):
    """A mask would give images 0 and 1 again and again."""
    with pytest.raises(GlannError, match="wanted whole numbers in a row"):
        trained.reconstruct(torch.tensor(bad))
    assert trained.reconstruct([]).shape == (0, *trained.image_shape)


def test_project_finds_the_codes_of_its_own_images(trained):
    own = trained.sample(6, seed=9)
    found = trained.project(own)
    assert found.errors.max() < 0.02
    assert torch.equal(trained.generate(found.codes), found.images)
    torch.testing.assert_close(found.codes.norm(dim=1), torch.ones(6))


def test_project_finds_codes_of_a_baseline_which_lie_on_no_sphere():
    """Noise of 64 numbers has norms around 8: nothing of it is in the ball."""
    sampler = IMLE(noise_dim=8, width=16, depth=1, epochs=2, detail=0.0).fit(torch.randn(200, 64))
    generator = Generator(code_dim=64, image_shape=(1, 8, 8), width=8, on_sphere=False)
    pipeline = GLANN(generator, sampler)
    own = pipeline.generate(torch.randn(4, 64))
    found = pipeline.project(own, steps=100)
    crushed = pipeline.generate(found.codes / found.codes.norm(dim=1, keepdim=True))
    in_ball = (to_float(crushed) - to_float(own)).abs().mean((1, 2, 3))
    assert (found.errors < 0.5 * in_ball).all()
    farthest = sampler.sample(1024).norm(dim=1).max()
    assert found.codes.norm(dim=1).max() <= 1.001 * farthest


def test_an_interrupted_projection_leaves_the_generator_trainable(trained, digits, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("glann.pipeline.learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        trained.project(digits[:1])
    assert all(weight.requires_grad for weight in trained.generator.parameters())


def test_project_does_better_with_more_steps_and_tells_its_error(trained, digits):
    short, long = (trained.project(digits[:8], steps=steps) for steps in (2, 200))
    assert long.errors.mean() < short.errors.mean()
    oracle = (to_float(long.images) - to_float(digits[:8])).abs().mean((1, 2, 3))
    torch.testing.assert_close(long.errors, oracle)


def test_projecting_an_image_does_not_depend_on_the_others(trained, digits):
    together = trained.project(digits[:5], steps=20).codes
    alone = trained.project(digits[3:4], steps=20).codes
    torch.testing.assert_close(together[3:4], alone, atol=1e-3, rtol=1e-3)


def test_projecting_leaves_the_generator_trainable(trained, digits):
    trained.project(digits[:1], steps=1)
    assert all(weight.requires_grad for weight in trained.generator.parameters())
    assert all(weight.grad is None for weight in trained.generator.parameters())


def test_project_refuses_other_sizes(trained):
    with pytest.raises(GlannError, match=r"\(1, 9, 8\); this pipeline's have \(1, 8, 8\)"):
        trained.project(torch.zeros(1, 1, 9, 8, dtype=torch.uint8))


def test_interpolation_begins_and_ends_at_its_ends(trained):
    a, b = trained.codes[:2], trained.codes[2:4]
    path = trained.interpolate(a, b, steps=5)
    assert path.shape == (10, 1, 8, 8)
    assert torch.equal(path[[0, 5]], trained.generate(a))
    assert torch.equal(path[[4, 9]], trained.generate(b))
    assert torch.equal(trained.interpolate(a[0], b[0], steps=5), path[:5])


def test_interpolation_needs_two_steps_and_two_ends(trained):
    with pytest.raises(GlannError, match="at least 2"):
        trained.interpolate(trained.codes[0], trained.codes[1], steps=1)
    with pytest.raises(GlannError, match="as many codes"):
        trained.interpolate(trained.codes[:1], trained.codes[:2])


def test_slerp_goes_along_the_great_circle_at_an_even_pace():
    a, b = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]])
    for t in torch.linspace(0, 1, 7):
        angle = t * torch.pi / 2
        oracle = torch.stack([angle.cos(), angle.sin(), torch.tensor(0.0)])
        torch.testing.assert_close(slerp(a, b, t)[0], oracle, atol=1e-6, rtol=1e-5)


def test_slerp_between_equal_and_opposite_ends_is_finite():
    a = to_sphere(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    half = torch.tensor(0.5)
    torch.testing.assert_close(slerp(a, a, half), a)
    middle = slerp(a, -a, half)
    torch.testing.assert_close(middle.norm(dim=1), torch.ones(4))
    assert (middle * a).sum(1).abs().max() < 1e-5  # half way
    torch.testing.assert_close(slerp(a, -a, torch.tensor(1.0)), -a, atol=1e-5, rtol=0)


def test_codes_in_the_ball_are_interpolated_straight(digits):
    glo = GLO(**{**TINY_GLO, "epochs": 1}, space="ball").fit(digits)
    pipeline = GLANN(glo.generator_, Gaussian().fit(glo.codes_))
    a, b = glo.codes_[:1], glo.codes_[1:2]
    middle = pipeline.interpolate(a, b, steps=3)[1:2]
    assert torch.equal(middle, pipeline.generate((a + b) / 2))


def test_unknown_device_is_refused(trained, tmp_path):
    trained.save(tmp_path)
    with pytest.raises(GlannError, match="device 'quantum' is not on this machine"):
        GLANN.load(tmp_path, device="quantum")


def test_saved_over_is_replaced(trained, digits, tmp_path):
    trained.save(tmp_path, with_codes=True)
    other = GLO(**{**TINY_GLO, "epochs": 1}).fit(digits, seed=8)
    pipeline = GLANN(other.generator_, Gaussian().fit(other.codes_))
    pipeline.save(tmp_path)
    assert torch.equal(GLANN.load(tmp_path).sample(4), pipeline.sample(4))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert storage.read_manifest(tmp_path)["sampler"]["name"] == "gaussian"
