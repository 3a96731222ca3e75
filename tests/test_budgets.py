"""Lengths for a budget, where what trainings take is known: nothing is trained here."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from glann.baselines.sampler import NoiseSampler
from glann.comparison import budgets
from glann.comparison.budgets import with_budget
from glann.data import Images
from glann.finetuning import FineTuning
from glann.glo import GLO
from glann.imle import IMLE
from glann.recipes import make_recipe

N = 5000
IMAGES = Images(torch.zeros(N, 1, 8, 8, dtype=torch.uint8), None, "array", "f", "x", ())
CONTENT = {
    "glo": {"loss": "contrastive", "epochs": 4, "feature_images": 15_000, "batch_size": 50},
    "imle": {"epochs": 30, "keep": 3, "batch_size": 50},
    "finetune": {"epochs": 2, "batch_size": 60},
    "compare": {"models": ["vae", "pixel-imle"]},
    "pixel-imle": {"subset": 3000, "keep": 2},
}
COLD = 40.0
"""Seconds that a process's first training of a kind takes besides."""


class World:
    """What trainings take, and which were tried."""

    metric = 1.5

    def features(self, images):
        return 0.5 + 0.002 * images

    def glo(self, images):
        return 1 + 0.001 * images

    def imle(self, epochs, keep=3):
        return 2 + 0.3 * epochs + 0.9 * math.ceil(epochs / keep)

    def finetune(self, images):
        return 0.7 + 0.0025 * images

    def vae(self, images):
        return 0.4 + 0.001 * images

    def pixel_imle(self, images):
        return 0.4 + 0.001 * images + 1.2 * math.ceil(images / 6000)


@pytest.fixture
def world(monkeypatch):
    world, warm, clock = World(), set(), [0.0]
    world.tried = []

    def take(kind, *length):
        world.tried.append(kind)
        cold = 0 if kind in warm else COLD
        warm.add(kind)
        return cold + getattr(world, kind)(*length)

    def learn_features(self, images, seed, device, folder, progress):
        epochs = min(self.feature_images / len(images), 2 * self.epochs)
        return torch.nn.Identity(), take("features", epochs * len(images)), 0.0

    def fit_glo(self, images, device):
        self.features_, seconds = None, 0.0
        if self.loss == "contrastive":
            self.features_, seconds, _ = self.learn_features(images, 0, device, None, False)
        self.seconds_ = seconds + take("glo", self.epochs * len(images))
        self.codes_, self.generator_ = torch.zeros(len(images), 64), torch.nn.Identity()
        return self

    def fit_imle(self, codes, device):
        assert len(codes) == N
        self.seconds_ = take("imle", self.epochs)
        return self

    def fit_finetune(self, images, codes, generator, **options):
        assert options["features"] is not None
        self.seconds_ = take("finetune", self.epochs * len(images))
        return self

    def fit_baseline(self, images, device):
        self.seconds_ = take(self.name.replace("-", "_"), self.images_seen)
        return self

    def image_metric(generator, codes, device):
        clock[0] += world.metric if "metric" in warm else COLD
        warm.add("metric")

    monkeypatch.setattr(GLO, "learn_features", learn_features)
    monkeypatch.setattr(GLO, "fit", fit_glo)
    monkeypatch.setattr(IMLE, "fit", fit_imle)
    monkeypatch.setattr(FineTuning, "fit", fit_finetune)
    monkeypatch.setattr(NoiseSampler, "fit", fit_baseline)
    monkeypatch.setattr(budgets, "image_metric", image_metric)
    monkeypatch.setattr(budgets, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return world


def total(world, recipe):
    """The seconds that GLANN takes by a recipe."""
    seconds = world.glo(recipe.glo.epochs * N) + world.imle(recipe.imle.epochs)
    if recipe.glo.loss == "contrastive":
        seconds += world.features(recipe.glo.feature_images)
    if recipe.imle.metric == "images":
        seconds += world.metric
    if recipe.finetune is not None:
        seconds += world.finetune(recipe.finetune.epochs * N)
    return seconds


def changed(**sections):
    content = {key: {**value, **sections.pop(key, {})} for key, value in CONTENT.items()}
    return make_recipe("x", {**content, **sections})


@pytest.mark.parametrize("seconds", [30, 300])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"glo": {"loss": "laplacian"}},
        {"imle": {"metric": "codes"}},
        {"finetune": {"epochs": 0}},
    ],
)
def test_all_of_glann_takes_the_budget(world, seconds, sections, tmp_path):
    recipe = changed(**sections)
    budgeted = with_budget(recipe, seconds, tmp_path, IMAGES, "cpu")
    # A matching is made whole or not at all.
    assert total(world, budgeted) == pytest.approx(seconds, rel=0.01, abs=0.9)
    grown = budgeted.glo.epochs / recipe.glo.epochs
    assert budgeted.imle.epochs / recipe.imle.epochs == pytest.approx(grown, rel=0.01)
    if recipe.finetune is not None:
        assert budgeted.finetune.epochs / recipe.finetune.epochs == pytest.approx(grown, rel=0.01)


def test_baselines_take_the_budget(world, tmp_path):
    budgeted = with_budget(changed(), 60, tmp_path, IMAGES, "cpu").baselines
    assert world.vae(budgeted["vae"].images_seen) == pytest.approx(60, rel=0.01)
    pixel_imle = budgeted["pixel-imle"].images_seen
    assert world.pixel_imle(pixel_imle) == pytest.approx(60, rel=0.01, abs=1.2)


def test_the_speed_is_that_of_more_of_it():
    took = iter([9.0, 3.0, 8.0, 3.0, 4.0, 2.0])
    assert budgets._speed(lambda length: next(took), 1, 5) == (1, 2)
    assert budgets._speed(lambda length: next(took), 1, 3) == (0.5, 0)  # it must not come to 0


def test_what_comes_once_and_takes_more_than_the_budget_is_said(world, tmp_path):
    said = []
    with_budget(changed(), 60, tmp_path, IMAGES, "cpu", said.append)
    assert not said
    world.metric = 50.0
    budgeted = with_budget(changed(), 20, tmp_path, IMAGES, "cpu", said.append)
    assert "GLANN needs about 55 s" in said[0]
    assert "longer than 20 s" in said[0]
    assert total(world, budgeted) - 55.1 == pytest.approx(2, abs=0.9)  # a tenth for the steps


def test_lengths_are_those_of_the_settings(world, tmp_path):
    recipe = changed(finetune={"epochs": 0})
    first = with_budget(recipe, 60, tmp_path, IMAGES, "cpu")
    world.tried.clear()
    assert with_budget(recipe, 60, tmp_path, IMAGES, "cpu") == first
    assert with_budget(dataclasses.replace(recipe, seed=1), 60, tmp_path, IMAGES, "cpu") == (
        dataclasses.replace(first, seed=1)
    )
    assert not world.tried

    tuned = with_budget(changed(), 60, tmp_path, IMAGES, "cpu")
    assert tuned.glo.epochs < first.glo.epochs
    assert "finetune" in world.tried
    assert "vae" not in world.tried
    world.tried.clear()
    with_budget(changed(finetune={"epochs": 0}, vae={"width": 32}), 60, tmp_path, IMAGES, "cpu")
    assert set(world.tried) == {"vae"}
    world.tried.clear()
    with_budget(recipe, 61, tmp_path, IMAGES, "cpu")
    assert {"glo", "imle", "vae"} <= set(world.tried)
