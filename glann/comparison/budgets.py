"""Equal times for all: how long each model has to be trained to take so many seconds."""

import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glann import storage
from glann.baselines.pixel_imle import PixelIMLE
from glann.comparison.results import digest_of, settings_of
from glann.data import Images
from glann.devices import pick_device
from glann.imle import IMLE
from glann.metric import image_metric
from glann.networks import to_sphere
from glann.recipes import Recipe
from glann.training import Batches

Say = Callable[[str], object]

FIRST, TRIAL = 5, 30
"""Batches of a short trial, and how many more a long one has."""


def with_budget(
    recipe: Recipe,
    seconds: float,
    folder: Path,
    train: Images,
    device: str,
    say: Say = lambda text: None,
) -> Recipe:
    """The recipe with each model's length changed so that it trains for about `seconds`.

    Each is tried for a moment first; the lengths are written into `folder`, for these settings, so
    that the same call goes on with the same ones.  `say` is called with a line of news.
    """
    path = folder / f"lengths-{seconds:g}.json"
    kept = storage.read_json(path) if path.is_file() else {}
    lengths = {}
    for name in ("glann", *recipe.compare.models):
        entry = f"{name} {digest_of(settings_of(recipe, name))}"
        if entry not in kept:
            if name == "glann":
                kept[entry] = _glann_lengths(recipe, seconds, train.images, device, say)
            else:
                kept[entry] = _images_seen(name, recipe, seconds, train.images, device)
            storage.write_json(path, kept)
        lengths[name] = kept[entry]
    glo, imle, finetune = copy.copy(recipe.glo), copy.copy(recipe.imle), copy.copy(recipe.finetune)
    own = lengths["glann"]
    glo.epochs, glo.feature_images = own["glo"], own.get("features", glo.feature_images)
    if isinstance(imle, IMLE):
        imle.epochs = own["imle"]
    if finetune is not None:
        finetune.epochs = own["finetune"]
    baselines = dict(recipe.baselines)
    for name in recipe.compare.models:
        baselines[name] = copy.copy(baselines[name])
        baselines[name].images_seen = lengths[name]
    return dataclasses.replace(recipe, glo=glo, imle=imle, finetune=finetune, baselines=baselines)


def _speed(train: Callable[[float], float], short: float, more: float) -> tuple[float, float]:
    """Seconds that training takes for a length of 1, and those besides, of any length.

    `train` trains for a length and says what it took.  The short trial is made twice: much happens
    once in a process, and would be taken for what training costs.
    """
    began = min(train(short), train(short))
    whole = train(short + more)
    if whole <= began:  # other work came between
        return whole / (short + more), 0.0
    each = (whole - began) / more
    return each, max(0.0, began - each * short)


def _images_seen(
    name: str, recipe: Recipe, seconds: float, images: torch.Tensor, device: str
) -> int:
    """How many images a baseline sees in that time."""
    sampler = copy.copy(recipe.baselines[name])

    def train(images_seen: float) -> float:
        sampler.images_seen = round(images_seen)
        return sampler.fit(images, device=device).seconds_

    more = TRIAL * sampler.batch_size
    if isinstance(sampler, PixelIMLE):  # all that it does with a matching, and the next matching
        more = sampler.keep * sampler.matched_at_once(images)
    each, once = _speed(train, FIRST * sampler.batch_size, more)
    return max(sampler.batch_size, round(_left(seconds, once) / each))


def _left(seconds: float, once: float) -> float:
    """What a budget has left for steps: a tenth of it, if what comes once takes more."""
    return max(seconds / 10, seconds - once)


def _glann_lengths(
    recipe: Recipe, seconds: float, images: torch.Tensor, device: str, say: Say
) -> dict[str, float]:
    """Epochs of GLANN's parts, and images that features are learned from, in that time.

    They keep the recipe's proportions: from each one's speed it is found how long the recipe takes,
    and all are made longer or shorter alike.
    """
    n, on_device = len(images), pick_device(device)
    glo, imle, finetune = copy.copy(recipe.glo), copy.copy(recipe.imle), copy.copy(recipe.finetune)
    glo.codes_on = "memory"  # it has no folder, and few codes
    some = images[: max(2 * glo.batch_size, min(n, TRIAL * glo.batch_size))]
    lengths = {"glo": recipe.glo.epochs}
    took = {}  # seconds, at the recipe's length
    once = {}  # seconds, in any length

    def trial(part: str, train: Callable[[float], float], batch_size: int, images: float) -> None:
        """Find how long a part takes that sees so many images."""
        short = max(FIRST * batch_size, 0.01 * len(some))  # no part takes less of an epoch
        each, once[part] = _speed(train, short, TRIAL * batch_size)
        took[part] = each * images

    if glo.loss == "contrastive":
        lengths["features"] = min(recipe.glo.feature_images, 2 * recipe.glo.epochs * n)
        learned: list[Any] = []

        def learn(seen: float) -> float:
            passes = dataclasses.replace(glo, feature_images=round(seen), epochs=seen / len(some))
            learned[:] = passes.learn_features(some, recipe.seed, on_device, None, False)
            return float(learned[1])

        trial("features", learn, glo.batch_size, lengths["features"])
        # Stage one's trials find them there, as if they had cost nothing.
        glo.learn_features = lambda *given: (learned[0], 0.0, 0.0)  # type: ignore[method-assign]

    def make(seen: float) -> float:
        glo.epochs = seen / len(some)
        return glo.fit(some, device=device).seconds_

    trial("glo", make, glo.batch_size, lengths["glo"] * n)
    if isinstance(imle, IMLE):
        lengths["imle"], codes = imle.epochs, to_sphere(torch.randn(n, glo.code_dim))

        def match(epochs: float) -> float:
            return dataclasses.replace(imle, epochs=epochs).fit(codes, device=device).seconds_

        # At least a step; then all that is done with a matching, and the next matching.
        step = max(0.01, 1 / Batches(n, imle.batch_size, 1).per_epoch)
        each, once["imle"] = _speed(match, step, imle.keep)
        took["imle"] = each * imle.epochs
        if imle.metric == "images":
            image_metric(glo.generator_, codes[:1], device=device)  # the first in this process
            start = time.monotonic()
            image_metric(glo.generator_, codes, device=device)
            once["metric"] = time.monotonic() - start
    if finetune is not None:
        lengths["finetune"], codes = finetune.epochs, glo.codes_
        features = glo.features_ or glo.learn_features(some, 0, on_device, None, False)[0]

        def tune(seen: float) -> float:
            tuning = dataclasses.replace(finetune, epochs=seen / len(some))
            how: dict[str, Any] = {"like": glo, "features": features, "device": device}
            return tuning.fit(some, codes, glo.generator_, samples=codes, **how).seconds_

        trial("finetune", tune, finetune.batch_size, lengths["finetune"] * n)
    before = sum(once.values())
    if before > 0.9 * seconds:
        say(
            f"note      GLANN needs about {before:.0f} s besides its steps (to match codes and the "
            f"like), however few these are: it takes longer than {seconds:g} s"
        )
    change = _left(seconds, before) / max(1e-3, sum(took.values()))
    lengths = {part: max(0.01, round(change * length, 3)) for part, length in lengths.items()}
    if "features" in lengths:
        lengths["features"] = max(1, round(lengths["features"]))
    return lengths
