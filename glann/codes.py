"""Codes as they come from stage one, or from any other model."""

import numpy as np
import torch

from glann.errors import GlannError
from glann.storage import CHUNK


def as_codes(array: object) -> torch.Tensor:
    """Check that `array` is a table of codes and give it as a float32 CPU tensor `(n, code_dim)`.

    Takes NumPy arrays and torch tensors of any real dtype; refuses numbers that are not finite.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiu":
            raise _wrong_dtype(array.dtype)
        # Here and not in torch, which takes neither big-endian nor read-only arrays.
        with np.errstate(over="ignore"):
            array = torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
    if not isinstance(array, torch.Tensor):
        raise GlannError(f"codes are a {type(array).__name__}; wanted a NumPy array or a tensor")
    if array.is_complex() or array.dtype == torch.bool:
        raise _wrong_dtype(array.dtype)
    if array.ndim != 2 or 0 in array.shape:
        raise GlannError(f"codes have shape {tuple(array.shape)}; wanted (n, code_dim), not empty")
    codes = array.detach().float().cpu().contiguous()
    first = 0
    for part in codes.split(in_hand(codes)):  # codes may be larger than memory
        finite = part.isfinite().all(1)
        if not finite.all():
            bad = first + int(finite.logical_not().nonzero()[0])
            raise GlannError(f"codes have numbers that are not finite, first in row {bad}")
        first += len(part)
    return codes


def in_hand(codes: torch.Tensor) -> int:
    """How many rows of `(n, code_dim)` to take at a time where they are copied."""
    return max(1, CHUNK // (4 * codes.shape[1]))


def _wrong_dtype(dtype: object) -> GlannError:
    return GlannError(f"codes have dtype {dtype}; wanted numbers, such as float32")


def on_sphere(codes: torch.Tensor) -> bool:
    """Whether all codes have norm 1, to the rounding of float16."""
    return bool(((codes.norm(dim=1) - 1).abs() < 2e-3).all())
