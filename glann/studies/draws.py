"""Settings at random, from ranges that are as wide for GLANN as they are for GANs."""

import dataclasses
from typing import Any

import torch

from glann.baselines import MODELS
from glann.baselines.gan import GAN
from glann.randomness import generator as random_generator
from glann.recipes import Recipe
from glann.settings import as_dict

Settings = dict[str, dict[str, Any]]
"""What was drawn, by section of a recipe."""

RATES = (-5.0, -2.0)
"""Exponents of ten between which every learning rate is drawn, of GANs, the VAE and GLANN alike."""


class _Draw:
    """Independent draws from one `torch.Generator`, each rounded to six digits, as it is shown."""

    def __init__(self, random: torch.Generator) -> None:
        self._random = random

    def between(self, low: float, high: float) -> float:
        """U[low, high)."""
        share = float(torch.rand((), generator=self._random, dtype=torch.float64))
        return float(f"{low + (high - low) * share:.6g}")

    def power(self, low: float, high: float) -> float:
        """10^U[low, high)."""
        return float(f"{10 ** self.between(low, high):.6g}")

    def one_of(self, *values: Any) -> Any:
        """One of some values, all equally likely."""
        return values[int(self.between(0, len(values)))]


def draw(model: str, index: int, seed: int) -> Settings:
    """Settings number `index` of a model, at random.

    GANs have Lucic et al.'s ranges: learning rate 10^U[−5, −2] of both players, β1 U[0, 1],
    discriminator's steps 1 or 5, BatchNorm in the discriminator or not (never beside a penalty on
    the gradient at single images, which it would undo, nor in place of spectral normalisation),
    clip 10^U[−3, 0], and a penalty's weight 10^U[−1, 2], which is 1/100 to 10 times the published
    10: R3GAN's, published as .25 for these pixels, gets the same multiples.  The VAE and IMLE on
    pixels have their learning rate from the same range, the VAE β1 too.

    GLANN's three learning rates, of generator, codes and mapper, are drawn independently from the
    same range; BatchNorm in the generator or not; the mapper's width 64 to 512 and its depth 1 to
    4; candidates per code 10^U[0, 1].  Its β1 is no setting.

    Args:
        model: "glann" or one of `glann.baselines.MODELS`.
        index: which draw; the same one for each (seed, model, index).
        seed: of all draws.

    Returns:
        Sections of a recipe with what was drawn.
    """
    of = _Draw(random_generator(seed, f"draw {model}", index))
    if model == "glann":
        glo = {
            "generator_lr": of.power(*RATES),
            "code_lr": of.power(*RATES),
            "batch_norm": of.one_of(True, False),
        }
        imle = {
            "lr": of.power(*RATES),
            "width": of.one_of(64, 128, 256, 512),
            "depth": of.one_of(1, 2, 3, 4),
            "pool": of.power(0, 1),
        }
        return {"glo": glo, "imle": imle}
    kind, published = MODELS[model]
    drawn: dict[str, Any] = {"lr": of.power(*RATES)}
    if model != "pixel-imle":
        drawn["beta1"] = min(0.9999, of.between(0, 1))
    if kind is GAN:
        drawn["discriminator_steps"] = of.one_of(1, 5)
        if "penalty" in published:
            weight = published.get("penalty_weight", 10.0) * of.power(-2, 1)
            drawn["penalty_weight"] = float(f"{weight:.6g}")
        elif published.get("norm") != "spectral":
            drawn["norm"] = of.one_of("batch", "none")
        if "clip" in published:
            drawn["clip"] = of.power(-3, 0)
    return {model: drawn}


def as_it_is(model: str) -> Settings:
    """No change to a model's settings."""
    return {"glo": {}, "imle": {}} if model == "glann" else {model: {}}


def drawn_recipe(recipe: Recipe, model: str, drawn: Settings, share: float, seed: int) -> Recipe:
    """`recipe` with what was drawn, `share` of the model's lengths and another seed.

    All else stays, what is compared too: a run folder keeps the recipe that it was made by.
    """
    if model != "glann":
        changed = _changed(recipe.baselines[model], drawn[model], share)
        return dataclasses.replace(
            recipe, seed=seed, baselines={**recipe.baselines, model: changed}
        )
    return dataclasses.replace(
        recipe,
        seed=seed,
        glo=_changed(recipe.glo, drawn["glo"], share),
        imle=_changed(recipe.imle, drawn["imle"], share),
        finetune=recipe.finetune and _changed(recipe.finetune, {}, share),
    )


def _changed(part: Any, drawn: dict[str, Any], share: float) -> Any:
    """A section with `share` of its lengths, and with what was drawn of the settings it has.

    A Gaussian on the codes has neither lengths nor learning rate.
    """
    has = as_dict(part)
    changes: dict[str, Any] = {}
    if "epochs" in has:
        changes["epochs"] = max(0.01, share * has["epochs"])  # no class takes less
    for images in ("feature_images", "images_seen"):
        if images in has:
            changes[images] = max(1, round(share * has[images]))
    changes |= {key: value for key, value in drawn.items() if key in has}
    return dataclasses.replace(part, **changes)
