"""Equal times for all: how long each model has to be trained to take so many seconds."""

import copy
import dataclasses
import functools
import time
from pathlib import Path

import torch

from glann import storage
from glann.data import Images
from glann.devices import pick_device
from glann.imle import IMLE
from glann.metric import image_metric
from glann.networks import to_sphere
from glann.recipes import Recipe


def with_budget(recipe: Recipe, seconds: float, folder: Path, train: Images, device: str) -> Recipe:
    """The recipe with each model's length changed so that it trains for about `seconds`.

    Each is tried for a moment first; the lengths are written into `folder`, so that the same call
    goes on with the same ones.
    """
    path = folder / f"lengths-{seconds:g}.json"
    lengths = storage.read_json(path) if path.is_file() else {}
    for name in ("glann", *recipe.compare.models):
        if name not in lengths:
            length = _glann_lengths if name == "glann" else functools.partial(_images_seen, name)
            lengths[name] = length(recipe, seconds, train.images, device)
            storage.write_json(path, lengths)
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


TRIAL = 30
"""Batches of a trial."""


def _images_seen(
    name: str, recipe: Recipe, seconds: float, images: torch.Tensor, device: str
) -> int:
    """How many images a baseline sees in that time."""
    sampler = copy.copy(recipe.baselines[name])
    sampler.images_seen = TRIAL * sampler.batch_size
    rate = sampler.images_seen / sampler.fit(images, device=device).seconds_
    return max(sampler.batch_size, round(rate * seconds))


def _glann_lengths(
    recipe: Recipe, seconds: float, images: torch.Tensor, device: str
) -> dict[str, float]:
    """Epochs of GLANN's parts, and images that features are learned from, in that time.

    They keep the recipe's proportions: from each one's speed it is found how long the recipe takes,
    and all are made longer or shorter alike.
    """
    n = len(images)
    glo, imle, finetune = copy.copy(recipe.glo), copy.copy(recipe.imle), copy.copy(recipe.finetune)
    some = images[: max(2 * glo.batch_size, min(n, TRIAL * glo.batch_size))]
    glo.epochs, glo.codes_on = 1, "memory"  # it has no folder, and few codes
    lengths = {"glo": recipe.glo.epochs}
    took = {}  # seconds, at the recipe's length
    learned = 0.0
    if glo.loss == "contrastive":
        lengths["features"] = min(recipe.glo.feature_images, 2 * recipe.glo.epochs * n)
        _, learned, _ = glo.learn_features(some, recipe.seed, pick_device(device), None, False)
        took["features"] = learned * lengths["features"] / min(glo.feature_images, 2 * len(some))
    own = max(0.0, glo.fit(some, device=device).seconds_ - learned)
    took["glo"] = own * lengths["glo"] * n / len(some)
    if isinstance(imle, IMLE):
        lengths["imle"] = imle.epochs
        codes = to_sphere(torch.randn(n, glo.code_dim))
        matched, kept = (
            dataclasses.replace(imle, epochs=epochs).fit(codes, device=device).seconds_
            for epochs in (0.01, imle.keep)
        )
        again = max(0, imle.epochs / imle.keep - 1)  # matchings after the first
        took["imle"] = max(0.0, kept - matched) * imle.epochs / imle.keep + matched * again
        start = time.monotonic()
        if imle.metric == "images":
            image_metric(glo.generator_, codes, device=device)
        first = matched + time.monotonic() - start  # in any length
        seconds = max(seconds / 10, seconds - first)
    if finetune is not None:
        lengths["finetune"], finetune.epochs = finetune.epochs, 1
        finetune.fit(
            *(some, glo.codes_, glo.generator_),
            samples=glo.codes_,
            like=glo,
            features=glo.features_,
            device=device,
        )
        took["finetune"] = finetune.seconds_ * lengths["finetune"] * n / len(some)
    change = seconds / max(1e-3, sum(took.values()))
    lengths = {part: max(0.01, round(change * length, 3)) for part, length in lengths.items()}
    if "features" in lengths:
        lengths["features"] = max(1, round(lengths["features"]))
    return lengths
