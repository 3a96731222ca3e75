"""Nearest neighbours: the inner loop of IMLE.

Exact in torch, on any device, by tiles: the matrix of all distances is never held.  CPUs that are
made for bfloat16 find out by it which tiles may hold the nearest, and look into these in float32.
Hopper GPUs have a kernel that is faster still (`nearest_triton`).  faiss (CPU or GPU) is the other
exact back end and gives the same neighbours.  Its inverted lists look only among the points of the
nearest clusters: faster, and as good as `recall` says on the codes at hand.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from glann.devices import pick_precision
from glann.errors import GlannError, NotFinite

EXACT = ("torch", "faiss")
SEARCHES = (*EXACT, "ivf")

_LISTS_FROM = 4096
"""Points from which on inverted lists are worth their clustering."""

_PROBES = 12
"""Lists that a query looks into, at the least."""

_TILE = {"cpu": (1024, 1024), "cuda": (16384, 16384)}
"""Queries × points of a tile.  On a CPU a tile of distances, 4 MB, stays in the cache: most of the
time goes into writing them to memory otherwise."""

_TOO_MANY = 0.15
"""Share of the tiles, besides one, that is in question where bfloat16 is of no use."""


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
        raise NotFinite(
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
    # Queries, which may be larger than memory, are moved by `middle` some at a time.
    on_cpu = queries.device.type == "cpu"
    rows, columns = _TILE["cpu" if on_cpu else "cuda"]
    precision = pick_precision("auto", queries.device) if on_cpu else torch.float32
    tiles = points.split(columns)
    indices = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for some, found in zip(queries.split(8 * rows), indices.split(8 * rows), strict=True):
        own = some - middle
        # First in which tiles the nearest may be: a minimum without its place costs next to
        # nothing, one with its place more than the product.
        maybe = torch.ones(len(tiles), len(own), dtype=torch.bool, device=own.device)
        if len(tiles) > 1:
            maybe = _in_question(own, tiles, precision, rows)
            if maybe.float().mean() > _TOO_MANY + 1 / len(tiles):
                precision = torch.float32
        # Then where in them.
        left = _left(own)
        least = torch.full((len(own),), torch.inf, device=own.device)
        for number, (tile, here) in enumerate(zip(tiles, maybe, strict=True)):
            right = _right(tile)
            for part in here.nonzero()[:, 0].split(rows):
                values, places = torch.mm(left[part], right.T).min(1)
                better = values < least[part]
                part = part[better]
                least[part] = values[better]
                found[part] = places[better] + number * columns
    return indices


def _in_question(
    queries: torch.Tensor, tiles: Sequence[torch.Tensor], precision: torch.dtype, rows: int
) -> torch.Tensor:
    """Which tiles of points may hold a query's nearest: bool `(tiles, queries)`."""
    least, error = _least(queries, tiles, precision, rows)
    lowest = (least - error).masked_fill_(least < 0, -torch.inf)
    return lowest <= (least + error).amin(0)


def _least(
    queries: torch.Tensor, tiles: Sequence[torch.Tensor], precision: torch.dtype, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least ½|q − p|² of a query and a tile's points, and by how much it is off at the most.

    Products of `_left` and `_right` are off by what rounding u of their numbers makes of them, 2u
    |q| |p| by Cauchy and Schwarz, u of themselves, and what sums in float32 are off.

    Returns:
        Both float32 `(tiles, queries)`.  Below 0, where rounding may put it, `least` is any of the
        tile's that are.
    """
    rounding = torch.finfo(precision).eps / 2
    sums = (queries.shape[1] + 8) * 2.0**-24
    left = _left(queries, precision)
    rows *= 4 // precision.itemsize
    room = left.new_empty(rows * len(tiles[0]))
    least, error = (queries.new_empty(len(tiles), len(queries)) for _ in range(2))
    norms = queries.norm(dim=1)
    for number, tile in enumerate(tiles):
        right = _right(tile, precision)
        for part, out in zip(left.split(rows), least[number].split(rows), strict=True):
            halves = room[: len(part) * len(tile)].view(len(part), len(tile))
            out.copy_(_minimum(torch.mm(part, right.T, out=halves)))
        largest = tile.norm(dim=1).amax()
        error[number] = 2 * rounding * norms * largest + sums / 2 * (norms + largest).square()
    return least, error.add_(least.abs(), alpha=rounding)


def _left(queries: torch.Tensor, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """(−q, 1, ½|q|²), which times (p, ½|p|², 1) is ½|q − p|²: `(n, d + 2)`, more where coarse."""
    halves = _halves(queries, precision)
    return torch.cat([-queries.to(precision), torch.ones_like(halves), halves], 1)


def _right(points: torch.Tensor, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """(p, ½|p|², 1)."""
    halves = _halves(points, precision)
    return torch.cat([points.to(precision), halves, torch.ones_like(halves)], 1)


def _halves(vectors: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    """½|v|² in `precision`, as the sum of a row if one such number has too few digits."""
    left = vectors.square().sum(1, keepdim=True).div_(2)
    parts = []
    for _ in range(1 if precision == torch.float32 else 3):
        parts.append(left.to(precision))
        left = left - parts[-1].float()
    return torch.cat(parts, 1)


def _minimum(numbers: torch.Tensor) -> torch.Tensor:
    """The least of each row, `(n,)`; of numbers below 0 any counts as the least."""
    if numbers.dtype != torch.bfloat16:
        return numbers.amin(1)
    # Bits of floats from 0 on are ordered as integers are, of which the minimum is eight times
    # as fast in torch.
    return numbers.view(torch.int16).amin(1).view(torch.bfloat16)


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
