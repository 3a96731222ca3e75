"""Time and peak memory of one measurement, and the real training loops under a stopwatch."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from glann import matching
from glann.training import Training


@dataclass(frozen=True)
class Round:
    """How many items were done in how many seconds; `parts`: the seconds by kind of work."""

    items: float
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Items a second."""
        return self.items / self.seconds


def now(device: torch.device) -> float:
    """Seconds, when all work that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes."""
    start = now(device)
    work()
    return now(device) - start


class _Enough(Exception):
    """Ends a training whose steps have been timed."""


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def time_steps(
    fit: Callable[[], object], skip: int, count: int | None, device: torch.device
) -> tuple[int, float, float]:
    """Run a training as it is and time some of its steps: (their items, start, end).

    The stopwatch is in `Training.steps`, which every loop asks for its batches: what comes before
    the loop is not counted, nor are the first `skip` steps, and the training ends `count` steps
    later, or with None where it ends by itself.
    """
    original = Training.steps
    items, start, end = 0, 0.0, 0.0

    def steps(self: Training, *args: Any, **kwargs: Any) -> Iterator[tuple[int, torch.Tensor]]:
        nonlocal items, start, end
        for step, rows in original(self, *args, **kwargs):
            if step == skip:
                start = now(device)
            elif count is not None and step == skip + count:
                end = now(device)
                raise _Enough
            items += len(rows) if step >= skip else 0
            yield step, rows
        end = now(device)

    with _replaced(Training, "steps", steps), contextlib.suppress(_Enough):
        fit()
    return items, start, end


def time_matching(fit: Callable[[], object], device: torch.device) -> Round:
    """Run IMLE with one cell for one epoch, which has one matching, at its first step.

    Until that begins the step has only drawn candidates; afterwards there are only steps.
    """
    original = matching.nearest_in_groups  # type: ignore[attr-defined]
    times: list[float] = []

    def nearest_in_groups(*given: Any) -> Any:
        times.append(now(device))
        found = original(*given)
        times.append(now(device))
        return found

    with _replaced(matching, "nearest_in_groups", nearest_in_groups):
        items, start, end = time_steps(fit, 0, None, device)
    called, returned = times
    parts = {"drawing": called - start, "matching": returned - called, "steps": end - returned}
    return Round(items, end - start, parts)
