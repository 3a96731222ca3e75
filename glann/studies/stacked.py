"""Stacked MNIST: colour images of three digits, one in each channel, so 1,000 modes.

PacGAN's protocol (Lin et al. 2018, arXiv 1712.04086, section 4.2, after Metz et al. 2017): 128,000
composites to learn from, 26,000 samples, whose digits a classifier reads.
"""

import dataclasses
import time
from collections.abc import Sequence

import torch

from glann.comparison import LABELS, SAMPLE_SEED
from glann.data import Images
from glann.errors import GlannError
from glann.evaluation.features import Features, make_features
from glann.evaluation.modes import reverse_kl
from glann.randomness import generator
from glann.recipes import load_recipe
from glann.report.studies import Section, Table
from glann.studies.study import Place, Row, failures, settings_of, spread
from glann.studies.support import BIRTHDAY, HEAD, SCORED, cells, pictures, support
from glann.studies.trained import fitted, images_of, name_of

PUBLISHED = [
    ("DCGAN", "99", "3.40"),
    ("VEEGAN", "150", "2.95"),
    ("PacGAN", "1000", "0.06"),
    ("WGAN-GP", "959", "0.73"),
    ("R3GAN", "1000", "0.029"),
]
"""After 50 epochs of 128,000 composites: Lin et al. 2018, Huang et al. 2024 (arXiv 2501.05441)."""


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


def stacked_features(stacked: torch.Tensor, features: Features) -> torch.Tensor:
    """The features of the three digits, one after another: float32 `(n, 3 × dim)`."""
    n, channels, height, width = stacked.shape
    return features(stacked.reshape(n * channels, 1, height, width)).view(n, -1)


def stacked_row(
    place: Place,
    *,
    recipe: str,
    changes: list[str],
    model: str,
    seed: int,
    composed: int,
    samples: int,
) -> Row:
    """Train a model of a recipe on stacked images and count the modes that it reaches.

    `changes` are of the recipe's settings, as `glann train --set` takes them.  The model "floor"
    is the training images themselves.

    Returns:
        "found" modes of 1,000, reverse "kl" in nats, the classifier's "accuracy" on single test
        images, "cpu_seconds" of training; and what `support` gives.
    """
    asked = dataclasses.replace(load_recipe(recipe, changes), seed=seed)
    digits, test = images_of(place, asked)
    reader = _reader(digits, test, place)
    learn_from = composites(digits.images, composed, seed)
    held_out = composites(test.images, min(SCORED, samples), seed)
    began = time.process_time()
    pipeline = None
    if model != "floor":
        checkpoints = place.training([settings_of(asked, [model]), composed])
        pipeline = fitted(asked, model, learn_from, place.device, checkpoints)
    cpu_seconds = time.process_time() - began
    made = learn_from[:samples] if pipeline is None else pipeline.sample(samples, SAMPLE_SEED)
    counts = torch.bincount(mode_of(made, reader), minlength=1000)
    return {
        "found": int((counts > 0).sum()),
        "kl": reverse_kl(counts),
        "accuracy": reader.accuracy,
        "cpu_seconds": round(cpu_seconds, 3),
        **support(place, made, held_out, lambda images: stacked_features(images, reader)),
    }


def _reader(digits: Images, test: Images, place: Place) -> Features:
    """The classifier of single digits."""
    if digits.labels is None or digits.images.shape[1] != 1 or int(digits.labels.max()) > 9:
        raise GlannError(
            f"{digits.source} has no grey images of digits 0 to 9 with labels to be stacked; name "
            "a recipe of mnist or digits"
        )
    return make_features("classifier", train=digits, test=test, device=place.device)


def stacked_section(recipe: str, samples: int, rows: Sequence[Row]) -> Section:
    """What the rows of `stacked_row` show, beside the published ones."""
    lines = []
    done = [row for row in rows if "failed" not in row]
    for model in dict.fromkeys(row["model"] for row in done):
        own = [row for row in done if row["model"] == model]
        found, kl = spread([row["found"] for row in own], 0), spread([row["kl"] for row in own], 3)
        cpu = spread([row["cpu_seconds"] for row in own], 0)
        lines.append([LABELS[model], found, kl, *cells(own), cpu])
    lines += [[f"{name}, published", modes, kl, *"––––"] for name, modes, kl in PUBLISHED]
    accuracy = done[0]["accuracy"] if done else None
    read = "unknown accuracy" if accuracy is None else f"accuracy {accuracy:.2%} on test digits"
    note = (
        f"Stacked digits of {recipe}, {samples:,} samples, read by a classifier of {read}. So many "
        f"samples of a sampler that has all modes in equal shares have a reverse KL of about "
        f"{999 / (2 * samples):.3f} by chance. Recall and coverage: beside stacked test images, on "
        f"the features of that classifier. {BIRTHDAY}{failures(rows, name_of)}"
    )
    head = ["model", "modes of 1,000", "reverse KL", *HEAD, "CPU seconds"]
    ours = [line for line in lines if line[0] == LABELS["glann"]]
    return Section(
        "".join(f"stacked digits: GLANN {line[1]} of 1,000 modes, KL {line[2]}" for line in ours),
        tables=[Table(head, lines, note, [LABELS["glann"]])],
        pictures=pictures(done, "stacked digits"),
    )
