"""Matching: which noise makes what is nearest to a code.

Candidates are drawn cell by cell, and each code takes the nearest of its own cell's.  A pool never
comes near enough to codes of many numbers: the noise that won is improved by small changes, as if
the pool had been many times larger.
"""

from functools import partial

import torch

from glann import processes
from glann.devices import autocast, pick_precision, upload
from glann.nearest import EXACT, nearest, nearest_in_groups, recall
from glann.networks import Mapper, evaluation_mode
from glann.randomness import noise

GROUP = 65_536
"""Candidates that are drawn at a time, about: those of whole cells."""

CHANGES = 4
"""Changes of a code's noise that a round of refinement tries."""

FRESH = 4
"""Rounds in which a level after the first draws as many candidates."""

REFINED = {"cpu": 1024, "cuda": 16_384}
"""Codes whose noise is refined at a time: no more than a CPU's cache holds."""


def match(
    mapper: Mapper,
    codes: torch.Tensor,
    cells: torch.Tensor,
    counts: torch.Tensor,
    *,
    pool: float,
    refine: int,
    radius: float = 0.0,
    search: str = "torch",
    precision: str = "auto",
    seed: int,
    number: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each code the noise whose candidate is the nearest of its cell's, then refined.

    Further levels' noise is chosen after that, each level's for what those before it made.
    With several processes all make candidates, and each has codes of its own.

    Args:
        mapper: T, on the codes' device.
        codes: float32 `(n, code_dim)`.
        cells: each one's cell, int64 `(n,)`.
        counts: codes in each cell, int64 `(cells,)`: those of all processes.
        pool: candidates for each code.
        refine: rounds in which changes of the chosen noise are tried.
        radius: candidates that are nearer to a code are refused, and what was chosen is not
            refined.
        search: how the nearest is found.
        precision: of the mapper's matrix products.
        seed: of the candidates, with `number`.
        number: of the matching; each has other candidates.

    Returns:
        Noise, float32 `(n, noise_dim)`; where the search is not exact, also how many codes
        found their nearest, by trials.
    """
    device, pinned = codes.device, codes.is_cuda
    chosen = codes.new_zeros(len(codes), mapper.config["noise_dim"])
    recalled = torch.zeros((), dtype=torch.float64)
    sizes = (pool * counts).round().clamp_min(1).long()
    products = pick_precision(precision, device)
    order, members = cells.argsort(), cells.bincount(minlength=len(counts)).cpu()
    drawn, done = 0, 0
    for group in _groups(sizes):
        own, theirs = sizes[group], members[group]
        to = drawn + int(own.sum())
        purpose, numbers = f"candidates {number}", mapper.noise_dims[0]
        e = upload(noise(seed, purpose, drawn, to, numbers, pinned), device)
        of = upload(torch.repeat_interleave(group, own), device)
        mine = order[done : done + int(theirs.sum())]
        drawn, done = drawn + len(e), done + len(mine)
        rows = torch.arange(len(e), device=device).split(8192)
        with autocast(products, device):
            made = processes.by_parts(rows, partial(_first_level, mapper, e, of))
        if radius:
            kept, own = _not_refused(made, codes[mine], own, theirs, radius)
            e, made = e[kept], made[kept]
        best, _ = nearest_in_groups(codes[mine], made, theirs, own, search)
        chosen[mine, : mapper.noise_dims[0]] = e[best]
        if search not in EXACT:
            recalled += _recalled(codes[mine], made, theirs, own, best, len(codes))
    rounds = 0 if radius else refine  # what is refused comes no nearer
    if not rounds and not mapper.further:
        return chosen, recalled
    at_a_time = REFINED["cuda" if device.type == "cuda" else "cpu"]
    for first in range(0, len(codes), at_a_time):
        part = slice(first, first + at_a_time)
        chosen[part] = _refined(
            mapper, chosen[part], codes[part], cells[part], first, rounds, seed, number, products
        )
    return chosen, recalled


def _refined(
    mapper: Mapper,
    e: torch.Tensor,
    codes: torch.Tensor,
    cells: torch.Tensor,
    first: int,
    rounds: int,
    seed: int,
    number: int,
    precision: torch.dtype,
) -> torch.Tensor:
    """Noise whose T(e) is nearer to codes, or the same: the best of changes, in so many rounds.

    A change √(1 − h²) e + h ε of e ~ N(0, I) is itself N(0, I), for any step h; steps get
    smaller.  Choosing again around what was chosen makes few candidates act like very many.
    A level after the first has no candidates yet and begins with steps of 1, which are just
    that; it has those of its own for what each code's noise has made before: so the pool grows
    exponentially with levels (CHIMLE: Peng, Moazeni & Li, arXiv 2211.14286).  What comes in as
    such a level's noise doesn't count.

    `first` is the row of the first of the codes in this process's tables.
    """
    k = len(e)
    # Each item has its own changes, whichever process it belongs to.
    start, count = first * processes.count(), processes.count()
    items = slice(processes.rank(), None, count)
    of_changes = cells.repeat_interleave(CHANGES)
    rows = torch.arange(k, device=e.device)
    refining = [0.7 * 0.75**turn for turn in range(rounds)]
    chosen: list[torch.Tensor] = []
    before: torch.Tensor | None = None
    with evaluation_mode(mapper), autocast(precision, e.device):
        for level, own in enumerate(e.split(mapper.noise_dims, 1)):
            purpose = f"change {number}" + (f" of level {level}" if level else "")
            made = mapper.level(level, own, cells, before)
            best = (made - codes).square().sum(1)
            if level:  # nothing was chosen yet
                best.fill_(torch.inf)
            was = None if before is None else before.repeat_interleave(CHANGES, 0)
            numbers = own.shape[1]
            for turn, h in enumerate([1.0] * FRESH * (level > 0) + refining):
                of_turn, stop = f"{purpose} {turn}", start + k * count
                changes = noise(seed, of_turn, start, stop, CHANGES * numbers, e.is_cuda)
                changes = upload(changes[items].view(k, CHANGES, numbers), e.device)
                tried = (1 - h * h) ** 0.5 * own[:, None] + h * changes
                found = mapper.level(level, tried.flatten(0, 1), of_changes, was)
                found = found.view(k, CHANGES, -1)
                errors = (found - codes[:, None]).square().sum(2)
                least, which = errors.min(1)
                better = least < best
                best = torch.where(better, least, best)
                own = torch.where(better[:, None], tried[rows, which], own)
                made = torch.where(better[:, None], found[rows, which], made)
            chosen.append(own)
            before = made
    return torch.cat(chosen, 1)


def _groups(sizes: torch.Tensor) -> list[torch.Tensor]:
    """Cells in order, int64, in groups with about GROUP of their candidates, `sizes`, each."""
    _, lengths = ((sizes.cumsum(0) - 1) // GROUP).unique_consecutive(return_counts=True)
    return list(torch.arange(len(sizes)).split(lengths.tolist()))


def _not_refused(
    candidates: torch.Tensor,
    codes: torch.Tensor,
    own: torch.Tensor,
    theirs: torch.Tensor,
    radius: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates are no nearer than `radius` to any of their cell's codes.

    RS-IMLE (Vashist, Peng & Li 2024, arXiv 2409.17439): a code that always chooses the nearest
    learns from noise such as is hardly ever drawn, so what has arrived already is left out, and the
    noise learned from is more like all noise.  Where all of a cell have arrived, all are kept.

    Args:
        candidates: float32 `(m, code_dim)`, cell after cell.
        codes: float32 `(n, code_dim)`, likewise.
        own: how many candidates each cell has, int64 `(cells,)`.
        theirs: how many of the codes.
        radius: the distance.

    Returns:
        Rows of `candidates`, int64 `(≤ m,)`, and how many of them each cell has, int64 `(cells,)`.
    """
    near = torch.zeros(len(candidates))
    cells = zip(
        near.split(own.tolist()),
        candidates.split(own.tolist()),
        codes.split(theirs.tolist()),
        strict=True,
    )
    for flags, some, around in cells:
        if len(around):
            flags.copy_(nearest(some, around)[1] < radius**2)
    processes.total(near)  # of the codes of all processes
    free = near == 0
    for flags in free.split(own.tolist()):
        if not flags.any():
            flags.fill_(True)
    counts = torch.tensor([int(flags.sum()) for flags in free.split(own.tolist())])
    return free.nonzero()[:, 0].to(candidates.device), counts


def _recalled(
    codes: torch.Tensor,
    candidates: torch.Tensor,
    theirs: torch.Tensor,
    own: torch.Tensor,
    best: torch.Tensor,
    n: int,
) -> float:
    """About how many of a group's codes found their nearest, by trials: a thousand of all n codes.

    `best` is what they found, rows of `candidates`; for the others see `_not_refused`.
    """
    found = 0.0
    starts = own.cumsum(0) - own
    parts = (table.split(counts.tolist()) for table, counts in ((codes, theirs), (best, theirs)))
    cells = zip(*parts, candidates.split(own.tolist()), starts.tolist(), strict=True)
    for mine, chosen, some, start in cells:
        if len(mine):
            tried = max(1, 1000 * len(mine) // n)
            found += len(mine) * recall(mine, some, chosen - start, tried)
    return found


def _first_level(
    mapper: Mapper, noise: torch.Tensor, cells: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """What the first level makes of some rows of its noise, as when sampling."""
    with evaluation_mode(mapper):
        codes: torch.Tensor = mapper.level(0, noise[rows], cells[rows])
    return codes
