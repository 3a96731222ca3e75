"""One set of checks over every sampler: of codes, and of images."""

import copy
import inspect

import numpy as np
import pytest
import torch
from conftest import TINY_IMLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glann import GLANN, GlannError
from glann.baselines import make_baseline
from glann.pipeline import CODE_SAMPLERS, load_sampler, save_sampler

UNFITTED = {
    "imle": CODE_SAMPLERS["imle"](**{**TINY_IMLE, "epochs": 40}),
    "gaussian": CODE_SAMPLERS["gaussian"](),
    "mixture": CODE_SAMPLERS["mixture"](components=3),
}


@pytest.fixture(scope="module")
def codes():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(120, 5, generator=generator) * torch.tensor([3, 1, 1, 0.5, 0.1]) + 2


@pytest.fixture(params=sorted(CODE_SAMPLERS), scope="module")
def fitted(request, codes):
    return copy.deepcopy(UNFITTED[request.param]).fit(codes, seed=0)


def test_every_sampler_is_checked():
    assert UNFITTED.keys() == CODE_SAMPLERS.keys()


@pytest.mark.parametrize("name", sorted(CODE_SAMPLERS))
class TestCodeSampler:
    def test_constructor_only_stores(self, name):
        kind = CODE_SAMPLERS[name]
        assert not [key for key in vars(kind()) if key.endswith("_")]
        for key in inspect.signature(kind).parameters:
            marker = object()
            assert getattr(kind(**{key: marker}), key) is marker

    def test_fit_returns_self_and_leaves_its_input(self, name, codes):
        sampler, before = copy.deepcopy(UNFITTED[name]), codes.clone()
        assert sampler.fit(codes) is sampler
        assert torch.equal(codes, before)

    def test_numpy_float64_is_taken(self, name, codes):
        a = copy.deepcopy(UNFITTED[name]).fit(codes.double().numpy()).sample(5)
        b = copy.deepcopy(UNFITTED[name]).fit(codes).sample(5)
        torch.testing.assert_close(a, b)

    def test_seeds_of_fit(self, name, codes):
        a, b = (copy.deepcopy(UNFITTED[name]).fit(codes, seed=4).sample(5) for _ in range(2))
        assert torch.equal(a, b)

    def test_one_number_a_code(self, name):
        codes = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)) + 5
        samples = copy.deepcopy(UNFITTED[name]).fit(codes).sample(500)
        assert samples.shape == (500, 1)
        assert 4 < samples.mean() < 6

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (torch.full((50, 3), torch.nan), "not finite"),
            (torch.zeros(50), "shape"),
            (torch.zeros(0, 3), "not empty"),
            (np.array([["a", "b"]] * 50), "numbers"),
            ("codes.npy", "NumPy array or a tensor"),
        ],
    )
    def test_unfit_codes_are_refused(self, name, bad, message):
        with pytest.raises(GlannError, match=message):
            copy.deepcopy(UNFITTED[name]).fit(bad)


def test_samples_are_codes(fitted, codes):
    samples = fitted.sample(2000, seed=1)
    assert samples.shape == (2000, 5)
    assert samples.dtype == torch.float32
    assert samples.device.type == "cpu"
    assert fitted.sample(0).shape == (0, 5)
    # roughly where the codes are
    assert ((samples.mean(0) - codes.mean(0)).abs() < codes.std(0)).all()


@given(st.integers(0, 3000), st.integers(1, 40))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_sample_is_the_same_whatever_is_asked_for_with_it(fitted, start, n):
    whole = fitted.sample(3040, seed=7)
    assert torch.equal(fitted.sample(n, seed=7, start=start), whole[start : start + n])


def test_seeds_of_samples(fitted):
    assert torch.equal(fitted.sample(9, seed=3), fitted.sample(9, seed=3))
    assert not torch.isin(fitted.sample(9, seed=3), fitted.sample(9, seed=4)).any()


def test_saved_and_loaded_is_the_same(fitted, tmp_path):
    save_sampler(fitted, tmp_path)
    loaded = load_sampler(tmp_path)
    assert type(loaded) is type(fitted)
    assert torch.equal(loaded.sample(50, seed=2), fitted.sample(50, seed=2))


@pytest.mark.parametrize("name", sorted(CODE_SAMPLERS))
class TestImageSampler:
    @pytest.fixture
    def pipeline(self, name, trained):
        return GLANN(trained.generator, copy.deepcopy(UNFITTED[name]).fit(trained.codes))

    def test_images(self, name, pipeline):
        images = pipeline.sample(10, seed=1)
        assert images.shape == (10, 1, 8, 8)
        assert images.dtype == torch.uint8
        assert images.float().std() > 10  # not a blank
        assert pipeline.sample(0).shape == (0, 1, 8, 8)

    def test_an_image_is_the_same_whatever_is_asked_for_with_it(self, name, pipeline):
        whole = pipeline.sample(300, seed=3)
        for start, n in ((0, 1), (7, 1), (5, 20), (250, 50), (299, 1)):
            assert torch.equal(pipeline.sample(n, seed=3, start=start), whole[start : start + n])

    def test_seeds(self, name, pipeline):
        assert torch.equal(pipeline.sample(5, seed=3), pipeline.sample(5, seed=3))
        assert not torch.equal(pipeline.sample(5, seed=3), pipeline.sample(5, seed=4))

    def test_saved_and_loaded_is_the_same(self, name, pipeline, tmp_path):
        pipeline.save(tmp_path)
        assert torch.equal(GLANN.load(tmp_path).sample(20, seed=5), pipeline.sample(20, seed=5))


def test_what_has_not_learned_says_so(codes):
    models = [*(kind() for kind in CODE_SAMPLERS.values()), make_baseline("vae")]
    asked = {"sample": (3,), "fresh": (3,), "reached": (codes,), "state": ()}
    for model in models:
        for name in asked.keys() & set(dir(model)):
            with pytest.raises(GlannError, match="has not learned anything yet; call fit"):
                getattr(model, name)(*asked[name])
