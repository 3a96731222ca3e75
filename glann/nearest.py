"""Nearest neighbours: the inner loop of IMLE.

Exact in torch, on any device, by tiles: the matrix of all distances is never held.  Hopper GPUs
have a kernel that is faster still (`nearest_triton`).  faiss (CPU or GPU) is the other exact back
end and gives the same neighbours.  Its inverted lists look only among the points of the nearest
clusters: faster, and as good as `recall` says on the codes at hand.
"""

from collections.abc import Callable
from typing import Any

import torch

from glann.errors import GlannError

EXACT = ("torch", "faiss")
SEARCHES = (*EXACT, "ivf")

_LISTS_FROM = 4096
"""Points from which on inverted lists are worth their clustering."""

_PROBES = 12
"""Lists that a query looks into, at the least."""

_TILE = {"cpu": (1024, 1024), "cuda": (16384, 16384)}
"""Queries × points of a tile.  On a CPU a tile of scores, 4 MB, stays in the cache: most of the
time goes into writing scores to memory otherwise."""


def nearest(
    queries: torch.Tensor, points: torch.Tensor, search: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of `points` to each of `queries` in Euclidean distance.

    Args:
        queries: float `(n, d)`.
        points: float `(m, d)`, m ≥ 1, on the same device.
        search: "torch", "faiss", or "ivf", which may miss the nearest.

    Returns:
        Indices into `points`, int64 `(n,)`, and the squared distances, float32 `(n,)`, both on the
        queries' device.  Of points that are equally near to within float32 rounding, even of equal
        ones, any may be found.

    Raises:
        GlannError: on shapes that don't fit, and on NaN or infinite numbers.
    """
    _check(queries, points, search)
    if len(points) == 0:
        raise GlannError("there are no points to search")
    n, m = (torch.tensor([len(rows)]) for rows in (queries, points))
    return _nearest(queries, points, n, m, search)


def nearest_in_groups(
    queries: torch.Tensor,
    points: torch.Tensor,
    query_counts: torch.Tensor,
    point_counts: torch.Tensor,
    search: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `nearest`, but each query is searched for among the points of its own group only.

    Args:
        queries: float `(n, d)`, group by group.
        points: float `(m, d)`, likewise, on the same device.
        query_counts: queries in each group, int64 `(groups,)`, on the CPU.
        point_counts: points in each, likewise; ≥ 1 where there are queries.
        search: as of `nearest`.

    Returns:
        As of `nearest`: indices into all `points`, and the squared distances.

    Raises:
        GlannError: as `nearest`, and on counts that don't fit.
    """
    _check(queries, points, search)
    for rows, counts, name in (queries, query_counts, "query"), (points, point_counts, "point"):
        if (counts.dtype, counts.device.type, counts.ndim) != (torch.int64, "cpu", 1):
            raise GlannError(
                f"{name}_counts are {counts.dtype}, {tuple(counts.shape)}, on {counts.device}; "
                "wanted int64 (groups,) on the CPU"
            )
        if (counts < 0).any() or counts.sum() != len(rows):
            raise GlannError(
                f"{name}_counts sum to {counts.sum()} or some are negative; wanted those of "
                f"{len(rows)} rows"
            )
    if len(query_counts) != len(point_counts):
        raise GlannError(
            f"there are {len(query_counts)} query_counts and {len(point_counts)} point_counts; "
            "wanted one of each for every group"
        )
    lacking = ((query_counts > 0) & (point_counts == 0)).nonzero()[:, 0].tolist()
    if lacking:
        raise GlannError(f"there are no points to search for the queries of group {lacking[0]}")
    return _nearest(queries, points, query_counts, point_counts, search)


def _check(queries: torch.Tensor, points: torch.Tensor, search: str) -> None:
    if queries.ndim != 2 or points.ndim != 2 or queries.shape[1] != points.shape[1]:
        raise GlannError(
            f"queries {tuple(queries.shape)} and points {tuple(points.shape)} don't fit; wanted "
            "(n, d) and (m, d)"
        )
    if search not in SEARCHES:
        raise GlannError(f"search = {search!r} is unknown; wanted one of {', '.join(SEARCHES)}")


def _nearest(
    queries: torch.Tensor,
    points: torch.Tensor,
    query_counts: torch.Tensor,
    point_counts: torch.Tensor,
    search: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    queries, points = queries.detach().float(), points.detach().float()
    with torch.autocast(queries.device.type, enabled=False):  # half precision finds others
        groups = (queries, points, query_counts, point_counts)
        at_once = search_at_once(queries.device) if search == "torch" else None
        indices = at_once(*groups) if at_once else _by_group(*groups, search)
    distances = _squared_distances(queries, points, indices)
    if not (points.sum(0).isfinite().all() & distances.isfinite().all()):
        raise GlannError(
            "queries or points hold NaN, infinite or too large numbers; if training made them, try "
            "a lower learning rate"
        )
    return indices, distances


def search_at_once(device: torch.device) -> Callable[..., torch.Tensor] | None:
    """The search of all groups in one go, `nearest_triton.search`, if this device has it."""
    if device.type != "cuda":
        return None
    try:
        from glann.nearest_triton import available, search
    except ImportError:  # Triton, which comes with torch for CUDA only
        return None
    return search if available(device) else None


def _by_group(
    queries: torch.Tensor,
    points: torch.Tensor,
    query_counts: torch.Tensor,
    point_counts: torch.Tensor,
    search: str,
) -> torch.Tensor:
    found = [torch.empty(0, dtype=torch.int64, device=queries.device)]
    first = 0
    of_queries, of_points = query_counts.tolist(), point_counts.tolist()
    for own, among in zip(queries.split(of_queries), points.split(of_points), strict=True):
        if len(own):
            # Distances don't change when all is moved, and near the origin fewer digits cancel.
            middle = among.mean(0)
            if search == "torch":
                indices = _by_tiles(own, among - middle, middle)
            else:
                indices = _by_faiss(own - middle, among - middle, search)
            found.append(indices + first)
        first += len(among)
    return torch.cat(found)


def _squared_distances(
    queries: torch.Tensor, points: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    parts = zip(queries.split(8192), indices.split(8192), strict=True)
    return torch.cat([(q - points[i]).square().sum(1) for q, i in parts])


def _by_tiles(queries: torch.Tensor, points: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    # Queries, which may be larger than memory, are moved by `middle` a tile at a time.
    # argmin |q − p|² = argmax q·p − |p|²/2: one matrix product and a row maximum a tile.
    rows, columns = _TILE["cpu" if queries.device.type == "cpu" else "cuda"]
    half_norms = points.square().sum(1).div_(2)
    tiles = list(zip(points.split(columns), half_norms.split(columns), strict=True))

    # First which tile holds the nearest: a maximum without its index costs next to nothing,
    # one with its index as much as the product.
    winners = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for query, winner in zip(queries.split(rows), winners.split(rows), strict=True):
        moved = query - middle
        best = torch.full((len(query),), -torch.inf, device=queries.device)
        for number, (tile, half_norm) in enumerate(tiles):
            score = torch.addmm(half_norm, moved, tile.T, beta=-1).amax(1)
            winner.masked_fill_(score > best, number)
            best = torch.maximum(best, score)

    # Then where in it: the queries of one winning tile go together.
    indices = torch.empty_like(winners)
    order = winners.argsort()
    groups = order.split(winners.bincount(minlength=len(tiles)).tolist())
    for number, (group, (tile, half_norm)) in enumerate(zip(groups, tiles, strict=True)):
        for part in group.split(rows):
            scores = torch.addmm(half_norm, queries[part] - middle, tile.T, beta=-1)
            indices[part] = scores.argmax(1) + number * columns
    return indices


def recall(
    queries: torch.Tensor, points: torch.Tensor, found: torch.Tensor, sample: int = 1000
) -> float:
    """The share of queries whose nearest point was found, measured on `sample` of them.

    `found` is int64 `(n,)`, indices into `points`, as `nearest` gives them.
    """
    rows = torch.linspace(0, len(queries) - 1, min(sample, len(queries))).long().to(found.device)
    _, wanted = nearest(queries[rows], points)
    distances = _squared_distances(queries[rows].float(), points.float(), found[rows])
    return float((distances <= wanted * (1 + 1e-5)).float().mean())


def _by_faiss(queries: torch.Tensor, points: torch.Tensor, search: str) -> torch.Tensor:
    try:
        import faiss
    except ImportError as error:
        raise GlannError(
            f"search = '{search}' needs faiss, which is not installed; wanted `pip install "
            "glann[faiss]` (or glann[gpu]), or search = 'torch', which finds the nearest"
        ) from error
    n, dim = points.shape
    faiss.omp_set_num_threads(torch.get_num_threads())
    index: Any = faiss.IndexFlatL2(dim)
    if search == "ivf" and n >= _LISTS_FROM:
        lists = round(1.5 * n**0.5)
        index = faiss.IndexIVFFlat(index, dim, lists)
        index.nprobe = max(_PROBES, lists // 32)
        index.cp.max_points_per_centroid = 64  # more hardly move the centres
        index.train(points.cpu().numpy())
    if queries.device.type == "cuda" and getattr(faiss, "get_num_gpus", int)() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(points.cpu().numpy())
    _, found = index.search(queries.cpu().numpy(), 1)
    found = found[:, 0].clip(min=0)  # −1 for a query that is NaN
    return torch.from_numpy(found).to(queries.device)
