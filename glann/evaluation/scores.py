"""All scores at once, by one protocol: the same real images, features and number of samples."""

import statistics
from typing import Any

import torch

from glann.data import Images
from glann.errors import GlannError
from glann.evaluation.features import Features
from glann.evaluation.frechet import frechet_distance, kernel_distance
from glann.evaluation.manifold import density_coverage, precision_recall
from glann.evaluation.memorisation import memorisation
from glann.evaluation.prd import f_scores, prd_curve
from glann.images import as_images, interleave
from glann.randomness import permutation

FEWEST = 50
"""Real images and samples in a score, at the least: fewer say nothing about a distribution."""

FLOORS = 5
"""Draws of real images that the floor is the mean of, at the most: of 10,000 images one draw's FID
may be a fifth below the next one's, and by it all ratios would be."""


def scores(*, real: object, fake: object) -> dict[str, float]:
    """Every score of features `fake` against features `real`, both float `(n, dim)`."""
    kid, kid_std = kernel_distance(real=real, fake=fake)
    precision, recall = precision_recall(real=real, fake=fake)
    density, coverage = density_coverage(real=real, fake=fake)
    f8, f1_8 = f_scores(*prd_curve(real=real, fake=fake))
    return {
        "fid": frechet_distance(real=real, fake=fake),
        "kid": kid,
        "kid_std": kid_std,
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
        "f8": f8,
        "f1_8": f1_8,
    }


class Protocol:
    """Real images, features and a number of samples, against which samplers are scored.

    Real are the test images; where there are none, one half of the training images, and the other
    half is the floor.  The floor is the mean FID of as many training images, over up to `FLOORS`
    draws that have no image in common: what a perfect sampler would get.  Where samplers learn from
    only a few of the training images, all this is about the others.

    Args:
        train: the images that samplers learn from.
        test: images that they don't, or None.
        features: what scores are computed on.
        samples: samples and real images in a score, at the most.
        whole: all training images where `train` are only the first of them, or None.

    Attributes:
        n: samples and real images in a score.
        few: whether `train` are only some of the training images.
        rows: of `train`, those that reconstructions are of, int64 `(n,)`: the first draw's own, or
            of a few each as often as the next.
        draws: rows of all training images for each draw of the floor, int64 `(n,)` each.
        floor: its FID.
    """

    def __init__(
        self,
        train: Images,
        test: Images | None,
        features: Features,
        samples: int = 10_000,
        whole: Images | None = None,
    ) -> None:
        whole = train if whole is None else whole
        self.few = len(train) < len(whole)
        order = permutation(0, "protocol", 0, len(whole))
        if self.few:
            order = order[order >= len(train)]
        if test is None:
            self.n = min(samples, len(order) // 2)
            real, self.split = whole.images[order[self.n : 2 * self.n]], "train"
        else:
            self.n = min(samples, len(order), len(test))
            chosen = permutation(0, "protocol test", 0, len(test))[: self.n]
            real, self.split = test.images[chosen], "test"
        if self.n < FEWEST:
            raise GlannError(
                f"{self.n} real images are left to score samples against, of {len(order)} for "
                f"training and {0 if test is None else len(test)} for testing; wanted at least "
                f"{FEWEST}. Give more images, or hold out more (data.test_fraction)"
            )
        self.train, self.test, self.whole, self.features = train, test, whole, features
        self.rows = torch.arange(self.n) % len(train) if self.few else order[: self.n]
        if test is None:
            order = torch.cat([order[: self.n], order[2 * self.n :]])
        self.draws = order[: len(order) // self.n * self.n].split(self.n)[:FLOORS]
        self.real = features(real)
        self._drawn = [features(whole.images[rows]) for rows in self.draws]
        self._train_features: torch.Tensor | None = None
        self.floor = statistics.fmean(frechet_distance(real=self.real, fake=f) for f in self._drawn)

    def score(self, samples: object) -> dict[str, Any]:
        """Scores of the first n of `samples`, uint8 images `(≥ n, c, h, w)`.

        Everything of `scores`, and `fid_over_floor`.
        """
        images = as_images(samples, "samples")
        if len(images) < self.n:
            raise GlannError(f"{len(images)} samples were given; wanted {self.n}, as real images")
        return self._scores(self.features(images[: self.n]))

    def floors(self) -> list[dict[str, Any]]:
        """The scores of each draw of the floor, as `score` gives them."""
        return [self._scores(features) for features in self._drawn]

    def ratio(self, fid: float) -> float:
        """An FID divided by the floor."""
        return fid / max(self.floor, 1e-12)

    def _scores(self, fake: torch.Tensor) -> dict[str, Any]:
        found = scores(real=self.real, fake=fake)
        return {**found, "fid_over_floor": self.ratio(found["fid"])}

    def distance(self, samples: object) -> float:
        """The FID alone, of any number of samples: for scores against time."""
        return frechet_distance(real=self.real, fake=self.features(samples))

    def memorisation(self, samples: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
        """Whether samples copy training images: numbers, and a picture's images.

        The images are rows of eight samples above the training images that are closest to them.
        """
        if self.split == "train":
            raise GlannError("whether samples are copies shows only beside test images")
        if self._train_features is None:
            self._train_features = self._features_of_train()
        samples = samples[: self.n]
        found = memorisation(
            fake=self.features(samples), train=self._train_features, test=self.real
        )
        numbers = {"ratio": found.ratio, "share_closer_to_train": found.share_closer_to_train}
        mine, theirs = found.closest.T
        return numbers, interleave(samples[mine], self.train.images[theirs])

    def _features_of_train(self) -> torch.Tensor:
        if self.few:
            return self.features(self.train.images)
        drawn = torch.cat(self.draws)  # whose features are there already
        others = torch.ones(len(self.train), dtype=torch.bool)
        others[drawn] = False
        found = torch.empty(len(self.train), self.real.shape[1])
        found[drawn] = torch.cat(self._drawn)
        found[others] = self.features(self.train.images[others])
        return found

    def describe(self) -> dict[str, Any]:
        """The protocol for people and for files (JSON)."""
        kind = "test images" if self.split == "test" else "images, one half of those given,"
        note = (
            f"Models learn from the first {len(self.train):,} of {len(self.whole):,} training "
            f"images. The {self.features.name} features are made with all of them; the floor is of "
            "others."
        )
        return {
            "real": f"{self.n:,} {kind} of {self.train.source}",
            "n": self.n,
            "split": self.split,
            "floors": len(self.draws),
            "fingerprint": self.train.fingerprint,
            "test_fingerprint": None if self.test is None else self.test.fingerprint,
            "whole_fingerprint": self.whole.fingerprint,
            "image_shape": list(self.train.images.shape[1:]),
            "features": self.features.describe(),
            **({"notes": [note]} if self.few else {}),
        }
