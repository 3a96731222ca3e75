"""Randomness without hidden state: everything random follows from (seed, purpose, index).

Nothing has to be saved to resume a run, and sample 7 of seed 3 is the same whatever else is drawn.
"""

import contextlib
import functools
import hashlib
import operator
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from glann.errors import GlannError

BLOCK = 1024
"""Rows that `noise` draws from one generator.  Part of the meaning of a seed: never change it."""

NUMBERS_OF_A_THREAD = 2**18
"""Numbers that are worth a thread: a millisecond or two of drawing."""

_GLOBAL = threading.RLock()
"""Whose turn it is with torch's global generator."""


def _number(seed: int, purpose: str, index: int) -> int:
    try:
        seed = operator.index(seed)  # NumPy's 3 is 3, and 3.0 would be another seed
    except TypeError as error:
        raise GlannError(f"seed = {seed!r}; wanted a whole number, 0 or more") from error
    if seed < 0:
        raise GlannError(f"seed = {seed} is negative; wanted 0 or more")
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch takes 63 bits


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU `torch.Generator` that depends on (seed, purpose, index) alone.

    Random numbers are always drawn on the CPU and then moved, so that they are the same on every
    device.
    """
    return torch.Generator().manual_seed(_number(seed, purpose, index))


def noise(
    seed: int, purpose: str, start: int, stop: int, dim: int, pinned: bool = False
) -> torch.Tensor:
    """Rows `start` to `stop` of an endless matrix of N(0, 1): float32 `(stop - start, dim)`.

    Drawn by whole blocks, so row 7 is the same whichever rows are asked for with it.  `pinned` puts
    them where a GPU reads them by itself, into memory that is kept and used again.
    """
    if stop <= start:
        return torch.empty(0, dim, dtype=torch.float32)
    first, last = start // BLOCK, (stop - 1) // BLOCK
    shape = (last + 1 - first) * BLOCK, dim
    rows = torch.empty(shape, dtype=torch.float32, pin_memory=pinned)

    def draw(number: int, block: torch.Tensor) -> None:
        torch.randn(BLOCK, dim, generator=generator(seed, purpose, number), out=block)

    blocks = rows.split(BLOCK)
    threads = min(torch.get_num_threads(), rows.numel() // NUMBERS_OF_A_THREAD)
    if threads > 1:
        drawn = _pool(threads, os.getpid()).map(draw, range(first, last + 1), blocks)
        list(drawn)  # which raises what they raise
    else:
        for number, block in enumerate(blocks, first):
            draw(number, block)
    return rows[start - first * BLOCK : stop - first * BLOCK]


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads to draw by: to start them takes longer than a thousand numbers of each."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"noise of {process}")


def permutation(seed: int, purpose: str, index: int, n: int) -> torch.Tensor:
    """A random order of n items, int64 `(n,)`: epoch `index`'s order of the images, say."""
    return torch.randperm(n, generator=generator(seed, purpose, index))


@contextlib.contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Within it torch's global CPU generator starts from (seed, purpose); outside it is untouched.

    For the starting weights of networks, which torch draws from its global generator.
    """
    with _GLOBAL, torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would also seed the GPUs' generators, and not give them back.
        torch.default_generator.manual_seed(_number(seed, purpose, 0))
        yield
