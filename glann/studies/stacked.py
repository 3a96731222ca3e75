"""Stacked MNIST: colour images of three digits, one in each channel, so 1,000 modes.

PacGAN's protocol (Lin et al. 2018, arXiv 1712.04086, section 4.2, after Metz et al. 2017): 128,000
composites to learn from, 26,000 samples, whose digits a classifier reads.
"""

import dataclasses
from typing import Any

import torch

from glann.baselines import MODELS
from glann.comparison import SAMPLE_SEED, load_test
from glann.data import Images, load
from glann.errors import GlannError
from glann.evaluation.features import Features, make_features
from glann.evaluation.modes import birthday, closest_pairs, reverse_kl
from glann.images import interleave, save_grid, to_float
from glann.pipeline import GLANN
from glann.randomness import generator
from glann.recipes import Recipe, load_recipe
from glann.studies.study import Place, Row

BIRTHDAY_SAMPLES = 2000
"""In which near-duplicates are looked for."""


def composites(images: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """Three grey images drawn at random as the channels of one: uint8 `(n, 3, h, w)`.

    Args:
        images: uint8 `(m, 1, h, w)`.
        n: how many.
        seed: of which ones are stacked.
    """
    which = torch.randint(len(images), (n, 3), generator=generator(seed, "composites"))
    return images[which, 0]


def mode_of(stacked: torch.Tensor, features: Features) -> torch.Tensor:
    """The number that the three digits of each of uint8 `(n, 3, h, w)` make: int64 `(n,)`."""
    n, channels, height, width = stacked.shape
    digits = features.predict(stacked.reshape(n * channels, 1, height, width)).view(n, channels)
    return digits @ torch.tensor([100, 10, 1])


def stacked_row(
    place: Place, *, recipe: str, model: str, seed: int, composed: int, samples: int
) -> Row:
    """Train a model of a recipe on stacked images and count the modes that it reaches.

    Returns:
        "found" modes of 1,000, reverse "kl" in nats, the classifier's "accuracy" on single test
        images, "birthday": the smallest sample that likely holds two as near as the nearest of
        2,000 training images, or None; "picture" and "closest", the nearest pairs of samples.
    """
    asked = dataclasses.replace(load_recipe(recipe), seed=seed)
    digits, test = load(asked.data, place.data), load_test(asked.data, place.data)
    features = _reader(digits, test, place)
    learn_from = composites(digits.images, composed, seed)
    pipeline = _fitted(asked, model, learn_from, place)
    made = pipeline.sample(samples, SAMPLE_SEED)
    counts = torch.bincount(mode_of(made, features), minlength=1000)
    some = to_float(made[:BIRTHDAY_SAMPLES]).flatten(1)
    pairs, _ = closest_pairs(fake=some, shown=8)
    picture, closest = f"pictures/{place.key}.png", f"pictures/{place.key}-closest.png"
    save_grid(made[:64], place.folder / picture, columns=8)
    both = interleave(made[pairs[:, 0]], made[pairs[:, 1]])
    save_grid(both, place.folder / closest, columns=8)
    return {
        "found": int((counts > 0).sum()),
        "kl": reverse_kl(counts),
        "accuracy": features.accuracy,
        "birthday": birthday(fake=some, threshold=_alike(learn_from)),
        "picture": picture,
        "closest": closest,
    }


def _reader(digits: Images, test: Images | None, place: Place) -> Features:
    """The classifier of single digits."""
    if digits.labels is None or digits.images.shape[1] != 1 or int(digits.labels.max()) > 9:
        raise GlannError(
            f"{digits.source} has no grey images of digits 0 to 9 with labels to be stacked; name "
            "a recipe of mnist or digits"
        )
    return make_features("classifier", train=digits, test=test, device=place.device)


def _fitted(recipe: Recipe, model: str, images: torch.Tensor, place: Place) -> GLANN:
    """A model trained as its recipe says, with checkpoints in the run's folder."""
    how: dict[str, Any] = {"seed": recipe.seed, "device": place.device}
    if model in MODELS:
        return recipe.baselines[model].fit(images, folder=place.training, **how).pipeline_
    glo = recipe.glo.fit(images, folder=place.training / "glo", **how)
    imle = recipe.imle.fit(glo.codes_, folder=place.training / "imle", **how)
    return GLANN(glo.generator_, imle)


def _alike(images: torch.Tensor) -> float:
    """The distance of the nearest pair of so many real images: nearer ones are duplicates."""
    some = to_float(images[:BIRTHDAY_SAMPLES]).flatten(1)
    return float(closest_pairs(fake=some, shown=1)[1])
