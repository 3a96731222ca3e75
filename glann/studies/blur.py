"""Blur: IMLE straight to pixels averages over what it can't tell apart; on codes it needn't.

Squared error in pixels makes the mean of what is possible the best answer, and a mean of images is
blurred.  How much is the energy of samples' Laplacian beside that of test images.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glann import runner
from glann.baselines import MODELS
from glann.comparison import SAMPLE_SEED, load_test
from glann.data import load
from glann.errors import GlannError
from glann.evaluation.sharpness import relative_sharpness
from glann.images import save_grid
from glann.recipes import Recipe
from glann.settings import setting

Row = dict[str, Any]


@dataclass(kw_only=True)
class Blur:
    """Which models' samples are looked at."""

    recipe: str = setting("digits", "whose images and models are taken")
    models: list[str] = setting(
        ["pixel-imle", "vae", "ns-gan"], "baselines beside GLANN", choices=tuple(MODELS)
    )
    seeds: int = setting(3, "runs of each model", minimum=1)
    samples: int = setting(10_000, "samples of each, at the most", minimum=1)


def floor_row(settings: Blur, recipe: Recipe, data: str | None, folder: Path) -> Row:
    """How sharp training images are beside test images: 1, but for chance."""
    train, test = _images(recipe, data)
    return _row("floor", recipe.seed, train[: settings.samples], test, folder)


def model_rows(
    settings: Blur,
    recipe: Recipe,
    model: str,
    run: Path,
    data: str | None,
    device: str,
    folder: Path,
) -> list[Row]:
    """How sharp a model's samples are: trained in the run folder `run` if it isn't yet.

    Of GLANN also the reconstructions of its training images: what stage one leaves of them.
    """
    test = _images(recipe, data)[1]
    how: dict[str, Any] = {"data": data, "device": device, "progress": False}
    rows = []
    if model == "glann":
        pipeline = runner.trained(recipe, run, **how)
        assert pipeline.codes is not None
        some = torch.arange(min(settings.samples, len(pipeline.codes)))
        rows.append(_row("reconstructions", recipe.seed, pipeline.reconstruct(some), test, folder))
    else:
        pipeline = runner.train_baseline(recipe, model, run, **how)
    n = min(settings.samples, len(test))
    samples = pipeline.sample(n, SAMPLE_SEED)
    return [*rows, _row(model, recipe.seed, samples, test, folder)]


def _images(recipe: Recipe, data: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images and test images, uint8."""
    test = load_test(recipe.data, data)
    if test is None:
        raise GlannError(
            f"the recipe {recipe.name} has no test images to tell how sharp real ones are; hold "
            "some out (data.test_fraction)"
        )
    return load(recipe.data, data).images, test.images


def _row(model: str, seed: int, images: torch.Tensor, test: torch.Tensor, folder: Path) -> Row:
    picture = f"pictures/{model}-{seed}.png"
    save_grid(images[:64], folder / picture, columns=8)
    sharpness = relative_sharpness(real=test, fake=images)
    return {"model": model, "seed": seed, "sharpness": sharpness, "picture": picture}


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with a seed that is `seed` after its own."""
    return dataclasses.replace(recipe, seed=recipe.seed + seed)


def findings(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over seeds of each model's sharpness beside test images."""
    found = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        values = [row["sharpness"] for row in rows if row["model"] == model]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found[model] = (statistics.fmean(values), spread)
    return found
