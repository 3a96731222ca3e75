"""Exact nearest neighbours on an NVIDIA GPU, by one kernel that never writes a score to memory.

Tiles in torch write all scores, for a row maximum to read them back, and leave the tensor cores
idle, as these don't multiply float32.  Here a score lives in registers alone, and a float32 is
three bfloat16, whose six products that matter make float32's.  60,000 queries of 64 numbers find
the nearest of 120,000 points in 9 ms on an H200, by tiles in 66 ms.

A task is a block of queries and the points to search, so many small searches are one launch too.
"""

import functools
import warnings

import torch
import triton
import triton.language as tl

_WHOLE = 128
"""Numbers of a query up to which all of it stays loaded while the points pass by."""

_CHUNK = 64
"""Numbers of longer queries and points that are multiplied at a time."""

_PROGRAMS = 2048
"""Programs wanted: many a multiprocessor, else most stand still while the last few run."""

_TILES = 8
"""Tiles of points that a program has at the least, to be worth loading its queries for."""

_AMID = 64
"""Points whose mean is taken for the middle of a group."""

_AT_ONCE = 2**26
"""Numbers of queries that are moved and split at a time, which takes up to a gigabyte."""


@functools.cache
def available(device: torch.device) -> bool:
    """Whether `search` runs on this device; warns if it should but does not.

    On GPUs other than Hopper's it is untested, and the kernel may want more registers than it gets.
    """
    if device.type != "cuda" or torch.version.cuda is None:  # AMD's are called cuda too
        return False
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    point, one = torch.zeros(1, 1, device=device), torch.tensor([1])
    try:
        search(point, point, one, one).cpu()
    except Exception as error:  # of Triton, a C compiler that it needs, the driver
        told = next(iter(str(error).splitlines()), "")
        warnings.warn(
            f"Triton built no search for {device}, so a slower one is used: "
            f"{type(error).__name__}: {told}",
            stacklevel=2,
        )
        return False
    return True


def search(
    queries: torch.Tensor,
    points: torch.Tensor,
    query_counts: torch.Tensor,
    point_counts: torch.Tensor,
) -> torch.Tensor:
    """The nearest to each query among the points of its own group: argmax q·p − |p|²/2.

    Args:
        queries: float32 `(n, d)`, one group after the other.
        points: float32 `(m, d)`, likewise, on the same GPU.
        query_counts: queries of each group, int64 `(groups,)`, on the CPU.
        point_counts: points of each, likewise; at least one where there are queries.

    Returns:
        Indices into `points`, int64 `(n,)`; of equal scores the lowest, and any of the group's own
        where there are NaN.
    """
    n, d = queries.shape
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=queries.device)
    width = max(16, triton.next_power_of_2(d)) if d <= _WHOLE else triton.cdiv(d, _CHUNK) * _CHUNK
    counts = _upload(point_counts, queries.device)
    # Distances don't change when a group is moved, and near the origin fewer digits cancel.
    middles = _middles(points, counts)
    points = points - middles.repeat_interleave(counts, 0, output_size=len(points))
    half_norms = points.square().sum(1).div_(2)
    terms = _terms(points, width)

    found, stops, start = [], query_counts.cumsum(0), 0
    for part in queries.split(max(1, _AT_ONCE // width)):
        bounds = torch.stack([stops - query_counts, stops]).clamp(start, start + len(part)) - start
        counts = _upload(bounds[1] - bounds[0], part.device)
        part = part - middles.repeat_interleave(counts, 0, output_size=len(part))
        found.append(_launch(_terms(part, width), terms, half_norms, bounds, point_counts))
        start += len(part)
    return torch.cat(found)


def _upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, which goes on with what it has to do meanwhile."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _middles(points: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """About the mean of each group of points: `(groups, d)`, from some evenly spaced ones."""
    evenly = torch.arange(_AMID, device=counts.device)
    places = (counts.cumsum(0) - counts)[:, None] + counts[:, None] * evenly // _AMID
    return points[places.clamp(max=len(points) - 1)].mean(1)  # an empty last group starts past it


def _terms(x: torch.Tensor, width: int) -> torch.Tensor:
    """Bfloat16 `(n, 3, width)` that sum to `x`, float32 `(n, d)`, with zeros from column d on."""
    terms = torch.zeros(len(x), 3, width, dtype=torch.bfloat16, device=x.device)
    for term in terms[:, :, : x.shape[1]].unbind(1):
        term.copy_(x)
        x = x - term
    return terms


def _launch(
    queries: torch.Tensor,
    points: torch.Tensor,
    half_norms: torch.Tensor,
    bounds: torch.Tensor,
    point_counts: torch.Tensor,
) -> torch.Tensor:
    """Indices int64 `(n,)` for the terms of queries, whose groups have `bounds`, int64 `(2, g)`."""
    n, _, width = queries.shape
    shape = _shape(width)
    tasks = _tasks(bounds, point_counts, shape["BLOCK_Q"])
    most = triton.cdiv(int((tasks[:, 3] - tasks[:, 2]).max()), shape["BLOCK_P"])
    parts = min(triton.cdiv(_PROGRAMS, len(tasks)), triton.cdiv(most, _TILES))
    scores = torch.empty(n, parts, device=queries.device)
    indices = torch.empty(n, parts, dtype=torch.int32, device=queries.device)
    tasks = _upload(tasks, queries.device)
    with torch.cuda.device_of(queries):  # Triton launches on the current one
        _search[(len(tasks), parts)](
            queries, points, half_norms, tasks, scores, indices, WIDTH=width, **shape
        )
    return indices.gather(1, scores.argmax(1, keepdim=True))[:, 0].long()


def _shape(width: int) -> dict[str, int]:
    """What a program of the kernel works on: as much as registers and shared memory hold.

    Better are two or three small ones a multiprocessor, one multiplying while others compare.
    """
    whole = width <= _WHOLE
    points = 32 if width > 64 and whole else 64
    numbers = width if whole else _CHUNK
    return {"BLOCK_Q": 64, "BLOCK_P": points, "BLOCK_D": numbers, "num_warps": 4, "num_stages": 2}


def _tasks(bounds: torch.Tensor, point_counts: torch.Tensor, block: int) -> torch.Tensor:
    """Int32 `(tasks, 4)`: first query and end of its group, first point of it and their end.

    A task has `block` queries, or what is left of its group's.
    """
    starts, stops = bounds
    blocks = (stops - starts + block - 1) // block
    group = torch.arange(len(blocks)).repeat_interleave(blocks)
    number = torch.arange(len(group)) - (blocks.cumsum(0) - blocks)[group]
    ends = point_counts.cumsum(0)
    first = starts[group] + number * block
    return torch.stack([first, stops[group], (ends - point_counts)[group], ends[group]], 1).int()


@triton.jit
def _search(
    queries: tl.tensor,
    points: tl.tensor,
    half_norms: tl.tensor,
    tasks: tl.tensor,
    scores: tl.tensor,
    indices: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Best scores and indices (n, parts): a task's queries by one part of its points."""
    task = tasks + tl.program_id(0) * 4
    end_query, first_point, end_point = tl.load(task + 1), tl.load(task + 2), tl.load(task + 3)
    part, parts = tl.program_id(1), tl.num_programs(1)
    rows = tl.load(task) + tl.arange(0, BLOCK_Q)
    lanes = tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_D)
    # Rows past the last are the last again: cheaper than a mask, and nothing comes of them.
    row = tl.minimum(rows, end_query - 1).to(tl.int64)
    query = queries + row[:, None] * (3 * WIDTH) + columns[None, :]
    if WIDTH == BLOCK_D:
        q0 = tl.load(query)
        q1 = tl.load(query + WIDTH)
        q2 = tl.load(query + 2 * WIDTH)

    # A best for each row and lane, and its tile: a row's maximum over lanes, taken for each tile,
    # would cost more than the product.
    best = tl.full((BLOCK_Q, BLOCK_P), float("-inf"), tl.float32)
    best_tile = tl.zeros((BLOCK_Q, BLOCK_P), tl.int32)
    tiles = tl.cdiv(end_point - first_point, BLOCK_P)
    each = tl.cdiv(tiles, parts)
    for tile in range(part * each, tl.minimum((part + 1) * each, tiles)):
        place = first_point + tile * BLOCK_P + lanes
        inside = tl.minimum(place, end_point - 1)
        # Past the last point half a norm is infinite and the score −∞, or NaN: never better.
        half_norm = tl.where(place < end_point, tl.load(half_norms + inside), float("inf"))
        point = points + inside.to(tl.int64)[None, :] * (3 * WIDTH) + columns[:, None]
        product = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
        for done in range(0, WIDTH, BLOCK_D):
            if WIDTH != BLOCK_D:
                q0 = tl.load(query + done)
                q1 = tl.load(query + done + WIDTH)
                q2 = tl.load(query + done + 2 * WIDTH)
            p0 = tl.load(point + done)
            p1 = tl.load(point + done + WIDTH)
            p2 = tl.load(point + done + 2 * WIDTH)
            # The small products first; those of q1 and p2, q2 and p1 or p2 are float32's rounding.
            product = tl.dot(q0, p2, product)
            product = tl.dot(q2, p0, product)
            product = tl.dot(q1, p1, product)
            product = tl.dot(q0, p1, product)
            product = tl.dot(q1, p0, product)
            product = tl.dot(q0, p0, product)
        # Less half a norm here, not from the start: tensor cores don't round sums to nearest.
        score = product - half_norm[None, :]
        better = score > best  # never where it is NaN
        best = tl.where(better, score, best)
        best_tile = tl.where(better, tile, best_tile)

    # Where nothing was better than −∞, the first lane of tile 0: a point of the group still.
    top = tl.max(best, 1)
    place = first_point + best_tile * BLOCK_P + lanes[None, :]
    index = tl.min(tl.where(best == top[:, None], place, end_point - 1), 1)
    out = rows.to(tl.int64) * parts + part
    tl.store(scores + out, top, mask=rows < end_query)
    tl.store(indices + out, index, mask=rows < end_query)
