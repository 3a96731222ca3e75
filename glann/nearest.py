"""Exact nearest neighbours: the inner loop of IMLE.

In torch, on any device, by tiles: the matrix of all distances is never held.  faiss (CPU or GPU)
is the other back end and gives the same neighbours.
"""

from typing import Any

import torch

from glann.errors import GlannError

SEARCHES = ("torch", "faiss")

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
        search: "torch" or "faiss".

    Returns:
        Indices into `points`, int64 `(n,)`, and the squared distances, float32 `(n,)`, both on the
        queries' device.  Of points that are equally near to within float32 rounding, even of equal
        ones, any may be found.

    Raises:
        GlannError: on shapes that don't fit, and on NaN or infinite numbers.
    """
    if queries.ndim != 2 or points.ndim != 2 or queries.shape[1] != points.shape[1]:
        raise GlannError(
            f"queries {tuple(queries.shape)} and points {tuple(points.shape)} don't fit; wanted "
            "(n, d) and (m, d)"
        )
    if len(points) == 0:
        raise GlannError("there are no points to search")
    queries, points = queries.detach().float(), points.detach().float()
    # Distances don't change when all is moved, and near the origin fewer digits cancel.
    middle = points.mean(0)
    with torch.autocast(queries.device.type, enabled=False):  # half precision finds others
        if search == "torch":
            indices = _by_tiles(queries, points - middle, middle)
        elif search == "faiss":
            indices = _by_faiss(queries - middle, points - middle)
        else:
            raise GlannError(f"search = {search!r} is unknown; wanted one of {', '.join(SEARCHES)}")
    distances = _squared_distances(queries, points, indices)
    if not (middle.isfinite().all() and distances.isfinite().all()):
        raise GlannError(
            "queries or points hold NaN, infinite or too large numbers; if training made them, try "
            "a lower learning rate"
        )
    return indices, distances


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


def _by_faiss(queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    try:
        import faiss
    except ImportError as error:
        raise GlannError(
            "search = 'faiss' needs faiss, which is not installed; wanted `pip install "
            "glann[faiss]` (or glann[gpu]), or search = 'torch', which finds the same neighbours"
        ) from error
    index: Any = faiss.IndexFlatL2(points.shape[1])
    if queries.device.type == "cuda" and getattr(faiss, "get_num_gpus", int)() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(points.cpu().numpy())
    _, found = index.search(queries.cpu().numpy(), 1)
    return torch.from_numpy(found[:, 0]).to(queries.device)
