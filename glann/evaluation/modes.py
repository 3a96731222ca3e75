"""Modes of the data: which of them samples reach, how well, and in what proportions."""

from dataclasses import dataclass

import torch

from glann.errors import GlannError
from glann.evaluation.arrays import as_features, as_pair
from glann.evaluation.manifold import neighbour_radii
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


def birthday(*, fake: object, threshold: float, trials: int = 200) -> int | None:
    """The smallest sample size at which half of random samples hold a near-duplicate.

    Arora & Zhang 2017 (arXiv 1706.08224): of a sampler with a support of N equally likely images,
    about √N samples hold two that are alike with probability 1/2; s such samples mean a support of
    about s².

    Args:
        fake: features or pixels, float `(n, d)`, n ≥ 2, in the order in which they were drawn.
        threshold: two samples at this distance or nearer are duplicates, 0 or more.
        trials: disjoint groups of samples of a size, at the most.

    Returns:
        The size, found to within a tenth; None if there is no such size up to n.

    Raises:
        GlannError: on arrays that `as_features` refuses.
    """
    samples = as_features(fake, "fake", 2, "for a pair")
    size = 2
    while size <= len(samples):
        groups = list(samples[: size * min(trials, len(samples) // size)].split(size))
        alike = sum(_has_duplicate(group, threshold) for group in groups)
        if alike >= len(groups) / 2:
            return size
        size = max(size + 1, round(1.1 * size))
    return None


def _has_duplicate(group: torch.Tensor, threshold: float) -> bool:
    return float(neighbour_radii(group.double(), 1).min()) <= threshold**2


def closest_pairs(*, fake: object, shown: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest pairs among samples, nearest first, each once.

    Args:
        fake: features or pixels, float `(n, d)`, n ≥ 2.
        shown: how many pairs, at the most.

    Returns:
        Rows of both, int64 `(shown, 2)`, and their Euclidean distances, float32 `(shown,)`.

    Raises:
        GlannError: on arrays that `as_features` refuses.
    """
    samples = as_features(fake, "fake", 2, "for a pair").float()
    best: list[torch.Tensor] = []
    places: list[torch.Tensor] = []
    for start in range(0, len(samples), 512):
        part = samples[start : start + 512]
        distances = torch.cdist(part, samples)
        # Each pair once: only with the rows after its own.
        later = torch.arange(len(samples)) > torch.arange(start, start + len(part))[:, None]
        flat = distances.masked_fill(~later.to(distances.device), torch.inf).flatten()
        nearest_of_part, at = flat.topk(min(shown, len(flat)), largest=False)
        best.append(nearest_of_part)
        places.append(torch.stack([at // len(samples) + start, at % len(samples)], 1))
    all_of_them, pairs = torch.cat(best), torch.cat(places)
    order = all_of_them.argsort(stable=True)[:shown]
    order = order[all_of_them[order].isfinite()]
    return pairs[order].cpu(), all_of_them[order].cpu()
