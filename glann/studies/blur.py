"""Blur: IMLE straight to pixels averages over what it can't tell apart; on codes it needn't.

Squared error in pixels makes the mean of what is possible the best answer, and a mean of images is
blurred.  How much is the energy of samples' Laplacian beside that of test images.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glann import runner
from glann.baselines import MODELS
from glann.comparison import LABELS, SAMPLE_SEED, load_test
from glann.data import load
from glann.errors import GlannError
from glann.evaluation.sharpness import relative_sharpness
from glann.images import save_grid
from glann.recipes import load_recipe
from glann.report.studies import Picture, Section, Table
from glann.settings import setting
from glann.studies.draws import as_it_is, drawn_recipe
from glann.studies.study import Place, Row, Run, Study, failures, settings_of
from glann.studies.trained import mixed, name_of


@dataclass(kw_only=True)
class Blur:
    """Which models' samples are looked at."""

    recipe: str = setting("digits", "whose images and models are taken")
    models: list[str] = setting(
        ["pixel-imle", "vae", "ns-gan"], "baselines beside GLANN", choices=tuple(MODELS)
    )
    share: float = setting(1.0, "of the recipe's lengths", minimum=1e-6, maximum=1)
    samples: int = setting(10_000, "samples of each, at the most", minimum=1)
    seeds: int = setting(3, "runs of each model", minimum=1)


def runs(settings: Blur) -> list[Run]:
    """One for each model and seed, and one for the training images."""
    shared = {"recipe": settings.recipe, "samples": settings.samples}
    found = [Run("floor", floor, shared)]
    for seed in range(settings.seeds):
        for model in ("glann", *settings.models):
            arguments = {**shared, "share": settings.share, "model": model, "seed": seed}
            found.append(Run(f"{model}-{seed}", sharpness, arguments))
    return found


def floor(place: Place, *, recipe: str, samples: int) -> Row:
    """How sharp training images are beside test images: 1, but for chance."""
    train, test = _images(recipe, place.data)
    return _row("floor", 0, mixed(train, samples), test, place)


def sharpness(
    place: Place, *, recipe: str, samples: int, share: float, model: str, seed: int
) -> list[Row]:
    """How sharp a model's samples are: trained if it isn't yet, where `glann compare` trains it.

    Of GLANN also the reconstructions of its training images: what stage one leaves of them.
    """
    test = _images(recipe, place.data)[1]
    whole = load_recipe(recipe)
    changed = drawn_recipe(whole, model, as_it_is(model), share, whole.seed + seed)
    where = place.runs / whole.name / (f"seeds/{changed.seed}" if seed else "")
    if share < 1:
        where = place.training(settings_of(changed, [model]))
    how: dict[str, Any] = {"data": place.data, "device": place.device, "progress": False}
    rows = []
    if model == "glann":
        pipeline = runner.trained(changed, where, **how)
        assert pipeline.codes is not None
        some = mixed(torch.arange(len(pipeline.codes)), samples)
        made = pipeline.reconstruct(some)
        rows.append(_row("reconstructions", seed, made, test, place))
    else:
        pipeline = runner.train_baseline(changed, model, where, **how)
    made = pipeline.sample(min(samples, len(test)), SAMPLE_SEED)
    return [*rows, _row(model, seed, made, test, place)]


def _images(recipe: str, data: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images and test images, uint8."""
    section = load_recipe(recipe).data
    test = load_test(section, data)
    if test is None:
        raise GlannError(
            f"the recipe {recipe} has no test images to tell how sharp real ones are; hold some "
            "out (data.test_fraction)"
        )
    return load(section, data).images, test.images


def _row(model: str, seed: int, images: torch.Tensor, test: torch.Tensor, place: Place) -> Row:
    picture = f"pictures/{place.key}-{model}.png"
    save_grid(images[:64], place.folder / picture, columns=8)
    found = relative_sharpness(real=test, fake=images)
    return {"model": model, "seed": seed, "sharpness": found, "picture": picture}


def findings(rows: Sequence[Row]) -> dict[str, tuple[float, float | None]]:
    """Mean and standard deviation over seeds of each model's sharpness; None for one seed."""
    found: dict[str, tuple[float, float | None]] = {}
    for model in dict.fromkeys(row["model"] for row in rows if "sharpness" in row):
        values = [row["sharpness"] for row in rows if row["model"] == model and "sharpness" in row]
        spread = statistics.stdev(values) if len(values) > 1 else None
        found[model] = (statistics.fmean(values), spread)
    return found


def _text(mean: float, spread: float | None) -> str:
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def section(settings: Blur, rows: Sequence[Row], folder: Path) -> Section:
    """Sharpness of all models, and their samples side by side."""
    found = findings(rows)
    shown = {model: _text(*numbers) for model, numbers in found.items()}
    listed = ", ".join(f"{LABELS[model]} {text}" for model, text in shown.items())
    pictures = {row["model"]: row["picture"] for row in reversed(rows) if "picture" in row}
    return Section(
        finding=f"Sharpness of samples beside test images: {listed}.",
        paragraphs=[_MEANING],
        tables=[
            Table(
                ["model", "sharpness"],
                [[LABELS[model], text] for model, text in shown.items()],
                "Mean ± standard deviation over seeds, where there are several."
                + failures(rows, name_of),
                ours={LABELS["glann"]},
            )
        ],
        pictures=[
            Picture(pictures[model], f"{LABELS[model]}, {shown[model]}", ours=model == "glann")
            for model in found
        ],
    )


_MEANING = (
    "The energy of the Laplacian, of each pixel's four neighbours less four times itself, over "
    "that of test images. 1 is right: below it images are more blurred than real ones, above it "
    "rougher. It says nothing else about them: noise is sharp."
)


STUDY = Study(
    name="blur",
    claim="IMLE straight to pixels is blurred, GLANN is not",
    settings=Blur,
    runs=runs,
    section=section,
    version=2,
)
