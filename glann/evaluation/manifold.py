"""Balls around samples: precision and recall, density and coverage.

A ball around each sample reaches to its k-th neighbour in its own set.  Exact, in float64, and by
rows: the matrix of all distances is never held.

Balls are closed, as in Kynkäänniemi et al.'s equation 1: what lies on the edge is inside.  Naeem
et al.'s code leaves the edge out.  That differs only on exact ties, as when fakes are copies of
real ones; and an image that the data hold more than k times, whose ball has radius 0, no sampler
could cover.
"""

from collections.abc import Iterator

import torch

from glann.evaluation.arrays import as_pair, check_option

_DISTANCES = 2**22
"""Distances held at one time: 32 MB."""


def precision_recall(*, real: object, fake: object, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    Args:
        real: float `(n, d)`, n > k, NumPy or tensor.
        fake: float `(m, d)`, m > k.
        k: which neighbour a ball reaches to, not counting the sample itself.

    Returns:
        Precision, the share of fakes inside a ball of a real one: low if samples look wrong.
        Recall, the share of reals inside a ball of a fake one: low if modes are missing.

    Raises:
        GlannError: on arrays that `as_features` refuses, and on k < 1.
    """
    reals, fakes = _centred(real, fake, k)
    real_radii, fake_radii = neighbour_radii(reals, k), neighbour_radii(fakes, k)
    precise = torch.zeros(len(fakes), dtype=torch.bool, device=reals.device)
    recalled = 0
    for rows, distances in _squared_distances(reals, fakes, lowered=True):
        precise |= (distances <= real_radii[rows, None]).any(0)
        recalled += int((distances <= fake_radii).any(1).sum())
    return int(precise.sum()) / len(fakes), recalled / len(reals)


def density_coverage(*, real: object, fake: object, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797).

    Only balls of real ones count, so a stray fake can't raise them; a stray real one, whose ball is
    large, hardly raises density as it does precision.

    Args:
        real: float `(n, d)`, n > k, NumPy or tensor.
        fake: float `(m, d)`, m > k.
        k: which neighbour a ball reaches to, not counting the sample itself.

    Returns:
        Density, in how many balls of real ones a fake lies, over k: about 1 for samples of the real
        distribution, and above 1 for samples that crowd where the real ones are dense.
        Coverage, the share of balls of real ones that hold a fake: about 1 − 2^−k for many samples
        of the real distribution.

    Raises:
        GlannError: on arrays that `as_features` refuses, and on k < 1.
    """
    reals, fakes = _centred(real, fake, k)
    radii = neighbour_radii(reals, k)
    pairs = covered = 0
    for rows, distances in _squared_distances(reals, fakes, lowered=True):
        inside = distances <= radii[rows, None]
        pairs += int(inside.sum())
        covered += int(inside.any(1).sum())
    return pairs / (k * len(fakes)), covered / len(reals)


def neighbour_radii(points: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distances to the k-th nearest of the other points, float64 `(n,)`.

    `points` is float64 `(n, d)`, n > k, best centred.  A point's copies count as others.
    """
    radii = []
    for rows, distances in _squared_distances(points, points):
        distances.diagonal(rows.start).fill_(torch.inf)
        found = distances.topk(k, dim=1, largest=False).indices[:, -1]
        # Of differences, in which nothing cancels: 0 for copies.
        radii.append((points[rows] - points[found]).square().sum(1))
    return torch.cat(radii)


def _centred(real: object, fake: object, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_option("k", k, 1)
    reals, fakes = as_pair(real, fake, k + 1, f"as each needs k = {k} neighbours")
    # Distances don't change when all is moved, and near the origin fewer digits cancel.
    middle = reals.mean(0, dtype=torch.float64)
    return reals - middle, fakes - middle


def _squared_distances(
    x: torch.Tensor, y: torch.Tensor, lowered: bool = False
) -> Iterator[tuple[slice, torch.Tensor]]:
    """|x_i|² − 2 x_i·y_j + |y_j|², float64, some rows of x at a time.

    `lowered` by as much as rounding may have raised it, a share of the squared norms: then what is
    on the edge of a ball is found inside whatever the order of the sums.
    """
    share = 8 * (x.shape[1] + 4) * 2.0**-53 if lowered else 0.0
    x_norms, y_norms = (z.square().sum(1).mul_(1 - share) for z in (x, y))
    step = max(1, _DISTANCES // len(y))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        yield rows, torch.addmm(y_norms, x[rows], y.T, alpha=-2).add_(x_norms[rows, None])
