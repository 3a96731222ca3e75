"""A recipe's models for studies of their samples: those of `glann compare`, trained if need be."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from glann import runner
from glann.comparison import LABELS, load_test
from glann.data import Images, load
from glann.errors import GlannError
from glann.pipeline import GLANN
from glann.randomness import permutation
from glann.recipes import Recipe, load_recipe
from glann.studies.study import Place, Row


def trained(place: Place, recipe: str, model: str, seed: int) -> GLANN:
    """GLANN or a baseline, trained with the recipe's seed + `seed` unless it is already.

    It lies where `glann compare` keeps it, in the recipe's run folder.  "mixture" is the mixture on
    the codes of GLANN's stage one, with the generator of that.
    """
    asked = load_recipe(recipe)
    folder = place.runs / asked.name
    if seed:
        asked = dataclasses.replace(asked, seed=asked.seed + seed)
        folder = folder / "seeds" / str(asked.seed)
    how: dict[str, Any] = {"data": place.data, "device": place.device, "progress": False}
    if model in ("glann", "mixture"):
        pipeline = runner.trained(asked, folder, **how)
        if model == "glann":
            return pipeline
        generator, codes, _ = runner.load_stage_one(folder)
        mixture = runner.mixture_of(folder, codes, asked.seed)
        return GLANN(generator, mixture).to(str(pipeline.device))
    return runner.train_baseline(asked, model, folder, **how)


def fitted(
    recipe: Recipe, model: str, images: torch.Tensor, device: str, folder: Path | None = None
) -> GLANN:
    """A model trained on images as a recipe says, with checkpoints in a folder if it is given."""
    how: dict[str, Any] = {"seed": recipe.seed, "device": device}
    if model != "glann":
        return recipe.baselines[model].fit(images, folder=folder, **how).pipeline_
    stages = {name: folder and folder / name for name in ("glo", "imle", "finetune")}
    glo = recipe.glo.fit(images, folder=stages["glo"], **how)
    generator, codes = glo.generator_, glo.codes_
    imle = recipe.imle.fit(codes, generator=generator, folder=stages["imle"], **how)
    if recipe.finetune is not None:
        codes = imle.reached(codes)
        how |= {"like": recipe.glo, "features": glo.features_, "folder": stages["finetune"]}
        if recipe.finetune.distance:
            how["samples"] = imle.fresh(len(codes), recipe.seed)
        generator = recipe.finetune.fit(images, codes, generator, **how).generator_
    return GLANN(generator, imle, codes)


def name_of(row: Row) -> str:
    """What people call a row's model."""
    return LABELS[row["model"]]


def mixed(items: torch.Tensor, n: int) -> torch.Tensor:
    """`n` of the items at the most, in an order of chance: the first may be of one class."""
    return items[permutation(0, "floor", 0, len(items))[:n]]


def images_of(place: Place, recipe: Recipe) -> tuple[Images, Images]:
    """Training images and held-out ones.

    Raises:
        GlannError: if the recipe has no held-out ones.
    """
    test = load_test(recipe.data, place.data)
    if test is None:
        raise GlannError(
            f"the recipe {recipe.name} has no test images to see samples beside; hold some out "
            "(data.test_fraction)"
        )
    return load(recipe.data, place.data), test
