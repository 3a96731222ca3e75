"""Distances between whole distributions of features: FID and KID."""

import torch

from glann.evaluation.arrays import as_pair, check_option
from glann.randomness import permutation

_ROWS = 4096
"""Rows that are in float64 at one time."""


def frechet_distance(*, real: object, fake: object) -> float:
    """The FID (Heusel et al. 2017, arXiv 1706.08500, eq. 6) of two sets of features.

    ‖μ_r − μ_f‖² + tr(C_r + C_f − 2 (C_r C_f)^½), with covariances over n − 1.  It falls as the
    number of samples grows: compare only scores of equally many.

    Args:
        real: float `(n, d)`, n ≥ 2, NumPy or tensor.
        fake: float `(m, d)`, m ≥ 2.

    Returns:
        0 or more, in squared units of the features; 0 for equal sets.

    Raises:
        GlannError: on arrays that `as_features` refuses.
    """
    reals, fakes = as_pair(real, fake, 2, "for a covariance")
    mean_r, mean_f = _mean(reals), _mean(fakes)
    factor_r, factor_f = _factor(reals, mean_r), _factor(fakes, mean_f)
    # C = RᵀR gives tr (C_r C_f)^½ = Σ singular values of R_r R_fᵀ.  No covariance is formed and no
    # root taken of an eigenvalue that should be 0, so it holds all digits where C is singular.
    cross = torch.linalg.svdvals(factor_r @ factor_f.T).sum()
    spread = factor_r.square().sum() + factor_f.square().sum()
    return max(0.0, float((mean_r - mean_f).square().sum() + spread - 2 * cross))


def _mean(features: torch.Tensor) -> torch.Tensor:
    sums = [part.double().sum(0) for part in features.split(_ROWS)]
    return torch.stack(sums).sum(0) / len(features)


def _factor(features: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """R, float64 `(min(n, d), d)`, with RᵀR the covariance of the features: by QR, in parts."""
    factor = mean.new_empty(0, len(mean))
    for part in features.split(_ROWS):
        factor = torch.linalg.qr(torch.cat([factor, part - mean]), mode="r").R
    return factor.div_((len(features) - 1) ** 0.5)


def kernel_distance(
    *, real: object, fake: object, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The KID (Bińkowski et al. 2018, arXiv 1801.01401) of two sets of features.

    The unbiased estimate of MMD² with the kernel (x·y/d + 1)³, over random subsets.

    Args:
        real: float `(n, d)`, n ≥ 2, NumPy or tensor.
        fake: float `(m, d)`, m ≥ 2.
        subsets: how many subsets, at least 1.
        subset_size: rows of each, at least 2; with fewer samples, as many as the smaller set has.
        seed: which subsets.

    Returns:
        Mean and standard deviation over the subsets.  The mean is about 0, and may be below, for
        two sets of one distribution.

    Raises:
        GlannError: on arrays that `as_features` refuses and options out of range.
    """
    check_option("subsets", subsets, 1)
    check_option("subset_size", subset_size, 2)
    reals, fakes = as_pair(real, fake, 2, "for pairs of different samples")
    size = min(subset_size, len(reals), len(fakes))
    if size == len(reals) == len(fakes):
        subsets = 1  # all are the same
    scores = []
    for number in range(subsets):
        x = reals[permutation(seed, "KID real", number, len(reals))[:size].to(reals.device)]
        y = fakes[permutation(seed, "KID fake", number, len(fakes))[:size].to(fakes.device)]
        scores.append(_mmd2(x.double(), y.double()))
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


def _mmd2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Unbiased MMD² of two float64 `(n, d)`."""
    n = len(x)
    within = sum(k.sum() - k.diagonal().sum() for k in (_kernel(x, x), _kernel(y, y)))
    return within / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)
