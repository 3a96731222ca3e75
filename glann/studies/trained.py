"""A recipe's models for studies of their samples: those of `glann compare`, trained if need be."""

import dataclasses
from typing import Any

from glann import runner
from glann.comparison import load_test
from glann.data import Images, load
from glann.errors import GlannError
from glann.pipeline import GLANN
from glann.recipes import Recipe, load_recipe
from glann.studies.study import Place


def trained(place: Place, recipe: str, model: str, seed: int) -> GLANN:
    """GLANN or a baseline, trained with the recipe's seed + `seed` unless it is already.

    It lies where `glann compare` keeps it, in the recipe's run folder.
    """
    asked = load_recipe(recipe)
    folder = place.runs / asked.name
    if seed:
        asked = dataclasses.replace(asked, seed=asked.seed + seed)
        folder = folder / "seeds" / str(asked.seed)
    how: dict[str, Any] = {"data": place.data, "device": place.device, "progress": False}
    if model == "glann":
        return runner.trained(asked, folder, **how)
    return runner.train_baseline(asked, model, folder, **how)


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
