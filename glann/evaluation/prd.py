"""Precision and recall of distributions, as a curve and as two F-scores (Sajjadi et al. 2018)."""

import math

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from glann.errors import GlannError
from glann.evaluation.arrays import as_pair, check_option
from glann.randomness import generator

_NEARLY_0 = 1e-10
"""In place of the slopes 0 and ∞, as in the authors' code."""


def prd_curve(
    *,
    real: object,
    fake: object,
    clusters: int = 20,
    angles: int = 1001,
    runs: int = 10,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The PRD curve (Sajjadi et al. 2018, arXiv 1806.00035).

    Both sets are clustered together; P and Q are the shares of the real and of the fake ones in
    each cluster.  At the slope λ precision is Σ min(λP, Q) and recall Σ min(P, Q/λ).

    Args:
        real: float `(n, d)`, n ≥ `clusters`, NumPy or tensor.
        fake: float `(n, d)`: as many, or clusters would lean to the larger set.
        clusters: of k-means, at least 2.
        angles: points on the curve, evenly spaced in arctan λ, at least 3.
        runs: clusterings to average over, at least 1.
        seed: of the clusterings.

    Returns:
        Precision and recall, float64 `(angles,)` in [0, 1] on the CPU, from λ ≈ 0 to λ ≈ ∞.

    Raises:
        GlannError: on arrays that `as_features` refuses, sets of different sizes and options out
            of range.
    """
    check_option("clusters", clusters, 2)
    check_option("angles", angles, 3)
    check_option("runs", runs, 1)
    reals, fakes = as_pair(real, fake, clusters, "as many as clusters")
    if len(reals) != len(fakes):
        raise GlannError(
            f"real has {len(reals)} rows and fake {len(fakes)}; wanted as many of both, as the "
            "clusters lean to the larger set: drop rows of it, or sample more"
        )
    union = torch.cat([reals, fakes]).cpu().double().numpy()
    slopes = torch.linspace(_NEARLY_0, math.pi / 2 - _NEARLY_0, angles, dtype=torch.float64).tan()
    precision, recall = torch.zeros(2, angles, dtype=torch.float64)
    for run in range(runs):
        labels = torch.from_numpy(_cluster(union, clusters, seed, run))
        counts = [part.bincount(minlength=clusters) for part in labels.split(len(reals))]
        p, q = (count.double() / len(reals) for count in counts)
        precision += torch.minimum(slopes[:, None] * p, q).sum(1) / runs
        recall += torch.minimum(p, q / slopes[:, None]).sum(1) / runs
    return precision.clamp_max_(1), recall.clamp_max_(1)


def _cluster(points: np.ndarray, clusters: int, seed: int, run: int) -> np.ndarray:
    """The cluster of each point, int64 `(n,)`."""
    random = torch.randint(2**31, (), generator=generator(seed, "PRD", run))
    kmeans = MiniBatchKMeans(n_clusters=clusters, n_init=10, random_state=int(random))
    with threadpool_limits(1):  # its steps are so small that threads only wait for one another
        return np.asarray(kmeans.fit(points).labels_, dtype=np.int64)


def f_scores(precision: torch.Tensor, recall: torch.Tensor, beta: float = 8) -> tuple[float, float]:
    """F_β and F_1/β, each the best along a PRD curve (arXiv 1806.00035).

    F_β = (1 + β²) p r / (β² p + r).

    Args:
        precision: float `(n,)` in [0, 1], from `prd_curve`.
        recall: float `(n,)` in [0, 1].
        beta: above 1.

    Returns:
        F_8, which weights **recall**: low if modes are missing.  F_1/8, which weights
        **precision**: low if samples look wrong.

    Raises:
        GlannError: on a curve that is none, or β ≤ 1.
    """
    if not 1 < beta < math.inf:
        raise GlannError(f"beta = {beta} is out of range; wanted more than 1")
    if precision.ndim != 1 or precision.shape != recall.shape or len(precision) == 0:
        raise GlannError(
            f"precision {tuple(precision.shape)} and recall {tuple(recall.shape)} don't fit; "
            "wanted both (n,), from prd_curve"
        )
    p, r = precision.double(), recall.double()
    if not ((p >= 0) & (p <= 1) & (r >= 0) & (r <= 1)).all():
        raise GlannError("precision or recall is not in [0, 1]; wanted a curve from prd_curve")

    def best(squared: float) -> float:
        below = squared * p + r
        return float(((1 + squared) * p * r / below.where(below > 0, 1)).max())

    return best(beta**2), best(beta**-2)
