"""Whether samples copy training images: how near they are to them, against real test images."""

from dataclasses import dataclass

import numpy as np
import torch

from glann.errors import GlannError
from glann.evaluation.arrays import as_features, check_option
from glann.evaluation.manifold import neighbour_radii
from glann.nearest import nearest


@dataclass(frozen=True, eq=False)
class Memorisation:
    """What `memorisation` found.

    With t(x) the distance from x to the nearest of all training images, and s(x) to the nearest
    test image other than x itself, "leaning" is t(x) / s(x): low if x is near a training image
    for one that looks as real.
    """

    ratio: float
    """Median leaning of the samples over that of the test images: 1 = no copying, ≪ 1 = copies."""
    share_closer_to_train: float
    """Share of samples that lean more to the training images than the median test image does (ties
    count half): 1/2 = no copying, 1 = all copies."""
    baseline: float
    """Median leaning of the test images: about 1 where there are as many training as test images,
    lower where there are more."""
    closest: torch.Tensor
    """The nearest (sample, training row) pairs, nearest first, each sample once: int64
    `(shown, 2)`."""
    distances: torch.Tensor
    """Their Euclidean distances, float32 `(shown,)`."""


def memorisation(*, fake: object, train: object, test: object, shown: int = 8) -> Memorisation:
    """Compare samples' distances to training and to test images with those of real images.

    Three sets, as in Meehan, Chaudhuri and Dasgupta (2020, arXiv 2004.05675).  Dividing t by s
    keeps blurred samples, near all images, from passing for copies.  Dividing by the test images'
    own leaning makes up for training sets that are larger than test sets; thinning the training
    set instead would hide the copies of whatever was left out.

    Real images that are in neither set give a ratio of 1 and a share of 1/2, but for the noise of
    so many; copies of training images give 0 and 1.  Copies of test images, and samples unlike
    any image, give more than 1.

    Args:
        fake: features or flattened pixels, float `(n, d)`, n ≥ 1 and n ≥ `shown`.
        train: the images the model was trained on, float `(m, d)`.
        test: images of the same kind that it was not trained on, float `(l, d)`, l ≥ 2.
        shown: how many of the closest pairs to give, 0 or more.

    Raises:
        GlannError: on arrays that `as_features` refuses, on `shown` below 0, and if half of the
            test images are copies of training or of other test images.
    """
    check_option("shown", shown, 0)
    fakes = as_features(fake, "fake", max(1, shown), "as many as are shown")
    trains = as_features(train, "train", like=fakes)
    tests = as_features(test, "test", 2, "for a nearest other one", like=fakes)

    indices, to_train = nearest(fakes, trains)
    leaning = _ratios(to_train, nearest(fakes, tests)[1])
    real = _ratios(nearest(tests, trains)[1], neighbour_radii(tests.double(), 1))
    baseline = float(np.median(real))
    if not 0 < baseline < np.inf:
        raise GlannError(
            "half of the test rows or more are equal to training rows or to other test rows; "
            "wanted test images that the model was not trained on, each once"
        )
    share = (leaning < baseline).mean() + (leaning == baseline).mean() / 2
    order = to_train.argsort(stable=True)[:shown]
    return Memorisation(
        ratio=float(np.median(leaning)) / baseline,
        share_closer_to_train=float(share),
        baseline=baseline,
        closest=torch.stack([order, indices[order]], 1).cpu(),
        distances=to_train[order].sqrt().cpu(),
    )


def _ratios(to_train: torch.Tensor, to_test: torch.Tensor) -> np.ndarray:
    """Quotients of distances from squared ones, float64; 0/0 is 1, as neither is nearer."""
    both_0 = (to_train == 0) & (to_test == 0)
    ratios = (to_train.double() / to_test.double()).sqrt()
    return ratios.masked_fill(both_0, 1).cpu().numpy()
