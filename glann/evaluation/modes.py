"""Modes of the data: which of them samples reach, how well, and in what proportions."""

from dataclasses import dataclass

import torch

from glann.errors import GlannError
from glann.evaluation.arrays import as_pair
from glann.nearest import nearest


@dataclass(frozen=True)
class Modes:
    """What `count_modes` found."""

    found: int
    """Modes with a sample of high quality."""
    high_quality: float
    """Share of samples that are near a mode's centre."""
    kl: float
    """Reverse KL: of the samples' distribution over the modes to the data's, in nats."""
    counts: list[int]
    """Samples whose nearest centre is each mode's."""


def count_modes(*, fake: object, centres: object, sigma: float, within: float = 3.0) -> Modes:
    """Modes found, share of high quality and reverse KL of a mixture of equal Gaussians.

    Srivastava et al. 2017 (VEEGAN, arXiv 1705.07761), section 4.1: a sample is of high quality
    within three standard deviations of the nearest centre, and a mode is found if one such sample
    is nearest to it.

    Args:
        fake: samples, float `(n, d)`, n ≥ 1.
        centres: of the modes, float `(modes, d)`, all equally likely.
        sigma: standard deviation of each mode in each dimension, above 0.
        within: what is of high quality, in standard deviations.

    Raises:
        GlannError: on arrays that `as_features` refuses and on a sigma that is not above 0.
    """
    if not sigma > 0:
        raise GlannError(f"sigma = {sigma} is out of range; wanted above 0")
    middles, samples = as_pair(centres, fake, 1, "")
    which, squared = nearest(samples, middles)
    good = squared.sqrt() <= within * sigma
    counts = torch.bincount(which, minlength=len(middles))
    return Modes(
        found=len(which[good].unique()),
        high_quality=float(good.double().mean()),
        kl=reverse_kl(counts),
        counts=counts.tolist(),
    )


def reverse_kl(counts: torch.Tensor) -> float:
    """KL(samples ‖ data) over modes that are equally likely in the data, in nats.

    Args:
        counts: samples of each mode, int64 `(modes,)`, at least one in all.

    Raises:
        GlannError: if there is no sample.
    """
    if not int(counts.sum()):
        raise GlannError("no sample was counted for any mode; wanted at least one")
    shares = counts.double() / counts.sum()
    return float((torch.xlogy(shares, shares * len(counts))).sum())
