"""One set of checks over every sampler: of codes, and of images."""

import copy
import dataclasses
import functools
import inspect

import numpy as np
import pytest
import torch
from conftest import TINY_GLO, TINY_IMLE, TINY_TUNING
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glann import GLANN, GLO, IMLE, FineTuning, GlannError
from glann.baselines import make_baseline
from glann.contrastive import learn_features
from glann.evaluation.classifier import train_classifier
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


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_what_learns_has_gradients_wherever_it_is_called(without, digits, trained, tmp_path):
    trained.save(tmp_path)
    labels = torch.arange(len(digits)) % 2
    tiny_glo, tiny_imle, tiny_tuning = (
        {**tiny, "epochs": 1} for tiny in (TINY_GLO, TINY_IMLE, TINY_TUNING)
    )

    def learned():
        loaded = GLANN.load(tmp_path)
        tuned = FineTuning(**tiny_tuning).fit(
            digits, trained.codes, loaded.generator, like=GLO(**tiny_glo)
        )
        imle = IMLE(**tiny_imle).fit(trained.codes, generator=loaded.generator)
        return [
            GLO(**tiny_glo).fit(digits).codes_,
            imle.sample(5),
            GLANN(tuned.generator_, imle).sample(5),
            make_baseline("vae", images_seen=300).fit(digits).sample(5),
            loaded.project(digits[:2], steps=3).codes,
            train_classifier(digits, labels, torch.device("cpu"))(digits.float()).detach(),
        ]

    with without():
        found = learned()
    for made, wanted in zip(found, learned(), strict=True):
        assert torch.equal(made, wanted)


def test_what_has_not_learned_says_so(codes):
    models = [*(kind() for kind in CODE_SAMPLERS.values()), make_baseline("vae")]
    asked = {"sample": (3,), "fresh": (3,), "reached": (codes,), "state": ()}
    for model in models:
        for name in asked.keys() & set(dir(model)):
            with pytest.raises(GlannError, match="has not learned anything yet; call fit"):
                getattr(model, name)(*asked[name])


# ---------------------------------------------------------------------- trainings


def imle(trained, digits, **settings):
    model = IMLE(**{**TINY_IMLE, **settings})
    return model.fit(trained.codes, generator=trained.generator).sample(9)


def glo(trained, digits, **settings):
    return GLO(**{**TINY_GLO, **settings}).fit(digits).codes_


def finetune(trained, digits, **settings):
    samples = trained.sampler.fresh(len(digits))
    given = {"samples": samples, "like": GLO(**TINY_GLO), "features": features_of(digits)}
    tuning = FineTuning(**{**TINY_TUNING, "epochs": 1, **settings})
    tuned = tuning.fit(digits, trained.codes, trained.generator, **given)
    return tuned.generator_.layers[0].weight.detach()


@functools.cache
def features_of(digits):
    return learn_features(digits, epochs=2, device=torch.device("cpu"))[0]


def baseline(name, digits, **settings):
    small = {"images_seen": 300, "batch_size": 32, "noise_dim": 6, "width": 8, "hidden": 32}
    fitted = make_baseline(name, **{**small, **settings}).fit(digits)
    return fitted.generator_.layers[0].weight.detach()


def gan(trained, digits, **settings):
    return baseline("wgan-gp", digits, **{"discriminator_steps": 2, **settings})


def began(trained, digits, **settings):
    return baseline("began", digits, **settings)


def pixel_imle(trained, digits, **settings):
    return baseline("pixel-imle", digits, **settings)


OTHERS = {
    imle: {
        **{"noise_dim": 9, "width": 24, "depth": 1, "levels": 1, "cells": 3, "epochs": 2.0},
        **{"batch_size": 40, "lr": 2e-3, "weight_decay": 0.1, "schedule": "constant", "pool": 3.0},
        **{"refine": 1, "keep": 1, "detail": 0.5, "mix": 0.5, "tries": 3, "refuse": 0.5},
        **{"metric": "codes", "perturbation": 0.1, "precision": "bfloat16"},
    },
    glo: {
        **{"code_dim": 7, "epochs": 3.0, "batch_size": 40, "optimiser": "adam", "loss": "l1"},
        **{"generator_lr": 5e-3, "code_lr": 5e-3, "schedule": "cosine", "space": "ball"},
        **{"start": "random", "width": 12, "hidden": 16, "batch_norm": False},
        **{"blocks": "residual", "precision": "bfloat16"},
    },
    finetune: {
        **{"epochs": 2.0, "batch_size": 40, "lr": 5e-3, "schedule": "cosine", "loss": "l1"},
        **{"distance": 3.0, "sample_batch_size": 30},
    },
    gan: {
        **{"loss": "least-squares", "penalty": "around-real", "penalty_weight": 1.0, "clip": 0.01},
        **{"norm": "spectral", "discriminator_steps": 1, "lr": 1e-3, "beta1": 0.9, "beta2": 0.99},
        **{"ema": 0.5},
    },
    began: {"gamma": 0.1, "balance_rate": 0.9},
    pixel_imle: {"subset": 60, "pool": 1.0, "keep": 2, "lr": 1e-2},
}
"""Of each training other values of its settings than those that it is tried with."""

by_default = functools.cache(lambda train, trained, digits: train(trained, digits))

NOTHING_TO_SEE = {
    imle: {"search"},  # finds the same among so few
    glo: {"feature_images", "feature_width", "vgg_weights", "codes_on"},  # of features and places
    finetune: set(),
}


@pytest.mark.parametrize(("kind", "train"), [(IMLE, imle), (GLO, glo), (FineTuning, finetune)])
def test_every_setting_is_tried(kind, train):
    names = {field.name for field in dataclasses.fields(kind)}
    assert names == OTHERS[train].keys() | NOTHING_TO_SEE[train]


@pytest.mark.parametrize(
    ("train", "name"), [(train, name) for train, others in OTHERS.items() for name in others]
)
def test_a_setting_makes_a_difference(train, name, trained, digits):
    plain = by_default(train, trained, digits)
    assert not torch.equal(plain, train(trained, digits, **{name: OTHERS[train][name]}))
