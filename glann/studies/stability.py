"""Training instability: how well models do with settings that nobody has tuned.

Lucic et al. 2018 (arXiv 1711.10337) compare GANs over settings drawn at random from wide ranges.
Here the same is done to GLANN: as many settings from ranges as wide, the same images, generator,
seeds and share of a recipe's lengths.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from glann.baselines import MODELS
from glann.baselines.gan import GAN
from glann.density import Gaussian
from glann.errors import GlannError
from glann.evaluation.scores import Protocol
from glann.images import to_float, to_uint8
from glann.imle import IMLE
from glann.pipeline import GLANN
from glann.randomness import generator as random_generator
from glann.recipes import Recipe, make_recipe
from glann.settings import setting

Settings = dict[str, dict[str, Any]]
"""What was drawn, by section of a recipe."""

RATES = (-5.0, -2.0)
"""Exponents of ten between which every learning rate is drawn, of GANs, the VAE and GLANN alike."""

GAUSSIAN_SEED = 0
"""Of the samples of the Gaussian that a run has to beat."""


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


def drawn_recipe(recipe: Recipe, model: str, drawn: Settings, share: float, seed: int) -> Recipe:
    """`recipe` with what was drawn, `share` of its lengths and another seed."""
    sections = dataclasses.replace(recipe, compare=_only(recipe, model)).sections()
    sections["seed"] = seed
    for name, settings in drawn.items():
        length = "epochs" if model == "glann" else "images_seen"
        shorter = max(1, round(share * sections[name][length]))
        sections[name] = {**sections[name], length: shorter, **settings}
    return make_recipe(recipe.name, sections)


def _only(recipe: Recipe, model: str) -> Any:
    models = [] if model == "glann" else [model]
    return dataclasses.replace(recipe.compare, models=models)


def fitted(recipe: Recipe, model: str, images: torch.Tensor, device: str) -> GLANN:
    """A model trained as a recipe says, in memory."""
    if model != "glann":
        return recipe.baselines[model].fit(images, seed=recipe.seed, device=device).pipeline_
    glo = recipe.glo.fit(images, seed=recipe.seed, device=device)
    imle: IMLE = recipe.imle.fit(glo.codes_, seed=recipe.seed, device=device)
    return GLANN(glo.generator_, imle)


def score(
    recipe: Recipe, model: str, images: torch.Tensor, protocol: Protocol, device: str
) -> dict[str, Any]:
    """Train a model and give its samples' FID and FID ÷ floor, or why it "failed".

    A training whose loss is not finite is a result, any other error is raised.
    """
    try:
        pipeline = fitted(recipe, model, images, device)
    except GlannError as error:
        if "not finite" not in str(error):
            raise
        return {"failed": str(error)}
    return ratio(pipeline.sample(protocol.n, 0), protocol)


def ratio(samples: torch.Tensor, protocol: Protocol) -> dict[str, float]:
    """FID and FID ÷ floor of uint8 samples."""
    fid = protocol.distance(samples)
    return {"fid": fid, "fid_over_floor": fid / max(protocol.floor["fid"], 1e-12)}


def one_gaussian(images: torch.Tensor, n: int) -> torch.Tensor:
    """`n` samples of one Gaussian with the mean and covariance of the images' pixels, uint8.

    What anybody gets without training: the samples of a run that did not fail are nearer to the
    real images.
    """
    shape = images.shape[1:]
    pixels = Gaussian().fit(to_float(images).flatten(1)).sample(n, GAUSSIAN_SEED)
    return to_uint8(pixels.view(n, *shape))


def summary(rows: Sequence[dict[str, Any]], bound: float) -> dict[str, float]:
    """The distribution of FID ÷ floor over one model's draws.

    Returns:
        "runs"; "failed", how many were not finite or above `bound`, and their "share"; "best",
        "lower" (a quarter of all runs is better), "median", "upper" and "worst", where a run that
        is not finite is worse than all others: infinite.
    """
    ratios = sorted(row.get("fid_over_floor", math.inf) for row in rows)
    failed = sum(value > bound for value in ratios)
    found = {"runs": len(ratios), "failed": failed, "share": failed / len(ratios)}
    places = {"best": 0.0, "lower": 0.25, "median": 0.5, "upper": 0.75, "worst": 1.0}
    return found | {name: _quantile(ratios, place) for name, place in places.items()}


def _quantile(ordered: Sequence[float], place: float) -> float:
    """Between two neighbours in proportion, as NumPy's, but with infinite ones allowed."""
    below, rest = divmod(place * (len(ordered) - 1), 1)
    low = ordered[int(below)]
    return low if rest == 0 else low + rest * (ordered[int(below) + 1] - low)


@dataclass(kw_only=True)
class Stability:
    """Which models, how many draws of each, and how long each is trained."""

    recipe: str = setting("digits", "whose images, networks and lengths are taken")
    models: list[str] = setting(
        ["glann", "ns-gan", "mm-gan", "wgan", "wgan-gp", "dragan", "r3gan", "vae"],
        "what is trained",
        choices=("glann", *MODELS),
    )
    draws: int = setting(12, "settings of each model", minimum=1)
    share: float = setting(1.0, "of the recipe's lengths", minimum=1e-6, maximum=1)
    samples: int = setting(10_000, "samples and real images in a score, at the most", minimum=50)
    bound: float = setting(
        0.0,
        "the FID ÷ floor above which a run failed; 0: that of one Gaussian on the images' pixels",
        minimum=0,
    )


def row_of(
    settings: Stability, recipe: Recipe, model: str, index: int, protocol: Protocol, device: str
) -> dict[str, Any]:
    """Draw, train and score: run `index` of a model."""
    drawn = draw(model, index, recipe.seed)
    changed = drawn_recipe(recipe, model, drawn, settings.share, recipe.seed + index)
    began = time.process_time()
    found = score(changed, model, protocol.train.images, protocol, device)
    seconds = round(time.process_time() - began, 3)
    return {"model": model, "draw": index, "drawn": drawn, **found, "cpu_seconds": seconds}
