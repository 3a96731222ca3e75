"""How fast glann is, beside a plain reading of the method, other libraries and the machine."""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from glann.bench import machine
from glann.bench.rows import MACHINE, Costs, Row, rows
from glann.bench.timing import Round
from glann.bench.ways import sizes
from glann.bench.workers import Task, Worker
from glann.devices import pick_device
from glann.errors import GlannError
from glann.runner import environment
from glann.settings import nearest_name

__all__ = ["FORMAT", "bench"]

FORMAT = 2
"""Version of what `bench` returns."""


def bench(
    *,
    only: Sequence[str] = (),
    rounds: int = 3,
    quick: bool = False,
    device: str = "auto",
    threads: int | None = None,
    command: str = "",
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Measure, and give all that was found (JSON).

    Args:
        only: names of what is measured; () is all.
        rounds: of each way of doing the work, which take turns; medians count.
        quick: sizes that take no time: it shows that all works, and measures nothing.
        device: "auto", "cpu", "cuda", …
        threads: None: as many as torch would take.
        command: what the user typed, to be noted.
        say: called with a line when a row begins.

    Returns:
        "rows", each with its "ways", with every round's items and seconds, the median "rate" and
        "memory_bytes", its process's peak; "ratios" of our rate to the others'; "of_limit", the
        share of our time that an item's "costs" would take at the machine's limits.  A row with a
        "part" is a part of the row before it.  "failed" says what could not be measured, and why:
        for want of memory, say; the rest goes on without it.
        "machine" has the limits; "environment", "command", … say how it was measured.

    Raises:
        GlannError: an unknown name or device; nothing at all could be measured.
    """
    on_device = str(pick_device(device))
    threads = threads or torch.get_num_threads()
    every = rows(sizes(torch.device(on_device), quick))
    names = list(dict.fromkeys(row.name for row in every))
    for name in only:
        if name not in names:
            raise GlannError(f"--only {name} is unknown; {nearest_name(name, names)}")
    chosen = [number for number, row in enumerate(every) if row.name in (only or names)]

    failed: list[str] = []

    def measured(
        what: str, row: int | None, ways: Sequence[str], rounds: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for way, its in _measured(
            [Task(row, way, on_device, threads, quick) for way in ways], rounds
        ):
            if isinstance(its, str):
                failed.append(f"{what}: {its}")
                say(f"not measured: {failed[-1]}")
            else:
                yield way, its

    limits = {}
    for name, (unit, _) in MACHINE.items():
        if name != "bfloat16" or machine.has_fast_bfloat16(torch.device(on_device)):
            say(f"the machine: {name}")
            for _, its in measured("the machine", None, [name], rounds):
                limits[name] = {"unit": unit, **its}
    found = []
    for position, number in enumerate(chosen, start=1):
        row = every[number]
        say(f"{position} of {len(chosen)}: {row.what} ({', '.join(row.ways)})")
        its = dict(measured(row.what, number, list(row.ways), 1 if row.once else rounds))
        if "ours" in its:
            found += _results(row, its, limits)
    if not found:
        raise GlannError(f"nothing could be measured: {'; '.join(failed)}")
    return {
        "format": FORMAT,
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "quick": quick,
        "rounds": rounds,
        "environment": environment(on_device)
        | {"threads": threads, "processor": machine.processor()}
        | {"libraries": _libraries()},
        "machine": limits,
        "rows": found,
        "failed": failed,
    }


def _measured(tasks: Sequence[Task], rounds: int) -> list[tuple[str, dict[str, Any] | str]]:
    """All rounds of all tasks, which take turns: (way, what was found, or why nothing was)."""
    found: dict[str, dict[str, Any] | str] = {}

    @contextlib.contextmanager
    def trying(way: str) -> Iterator[None]:
        try:
            yield
        except GlannError as error:
            found[way] = str(error)

    with contextlib.ExitStack() as stack:
        workers: dict[str, tuple[Worker, list[Round]]] = {}
        for task in tasks:
            with trying(task.way):
                workers[task.way] = stack.enter_context(Worker(task)), []
        for _ in range(rounds):
            for way, (worker, done) in workers.items():
                if way not in found:
                    with trying(way):
                        done.append(worker.round())
        for way, (worker, done) in workers.items():
            if way not in found:
                with trying(way):
                    found[way] = _way(done) | {"memory_bytes": worker.memory()}
    return [(task.way, found[task.way]) for task in tasks]


def _way(done: Sequence[Round]) -> dict[str, Any]:
    rates = [one.rate for one in done]
    return {
        "rate": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "rounds": [
            {"items": one.items, "seconds": one.seconds, "parts": one.parts} for one in done
        ],
    }


def _results(row: Row, ways: dict[str, Any], limits: dict[str, Any]) -> list[dict[str, Any]]:
    """The row as it is given back, and one for each of its parts."""
    if not row.inside:
        ways = {name: way | {"memory_bytes": None} for name, way in ways.items()}
    costs = row.costs()
    found = [_result(row, None, ways, costs.pop("", {}), limits)]
    for part, its in costs.items():
        of_part = {
            name: _way([Round(one["items"], one["parts"][part]) for one in way["rounds"]])
            | {"memory_bytes": None}
            for name, way in ways.items()
        }
        found.append(_result(row, part, of_part, its, limits))
    return found


def _result(
    row: Row, part: str | None, ways: dict[str, Any], costs: Costs, limits: dict[str, Any]
) -> dict[str, Any]:
    rate = ways["ours"]["rate"]
    known = costs and all(limit in limits for limit in costs)
    at_best = sum(cost / limits[limit]["rate"] for limit, cost in costs.items()) if known else None
    return {
        "name": row.name,
        "part": part,
        "what": row.what,
        "note": row.note,
        "n": row.n,
        "points": row.points,
        "unit": row.unit,
        "costs": costs,
        "of_limit": None if at_best is None else rate * at_best,
        "ratios": {name: rate / way["rate"] for name, way in ways.items() if name != "ours"},
        "ways": ways,
    }


def _libraries() -> dict[str, str]:
    """Versions of the libraries that are compared with: their rows have no others."""
    imported = {"scikit-learn": "sklearn", "faiss": "faiss"}
    return {
        name: str(sys.modules[module].__version__)
        for name, module in imported.items()
        if module in sys.modules
    }
