"""Feature arrays as every score takes them: one row for each image, checked before any work."""

import numpy as np
import torch

from glann.errors import GlannError

_LARGEST = torch.finfo(torch.float32).max
"""Up to here the sixth powers that a score takes stay finite in float64."""


def as_features(
    array: object,
    name: str,
    at_least: int = 1,
    reason: str = "",
    like: torch.Tensor | None = None,
) -> torch.Tensor:
    """Check that `array` holds enough rows of finite numbers and give it as a tensor `(n, d)`.

    Args:
        array: NumPy array or tensor, any float dtype, `(n, d)`.
        name: what errors call it.
        at_least: the fewest rows that the score is defined for.
        reason: where that number comes from, for the error.
        like: features already checked: this one has to have their d and is moved to their device.

    Returns:
        float32 or, if it was, float64, on its own device or that of `like`; on the CPU if it was on
        Apple's mps, which has no float64.

    Raises:
        GlannError: on another type, dtype or shape, NaN, infinite or too large numbers, and on too
            few rows.
    """
    if isinstance(array, np.ndarray) and array.dtype.kind == "f":
        # Here and not in torch, which takes neither big-endian, nor long, nor read-only arrays.
        dtype = np.float32 if array.dtype.itemsize <= 4 else np.float64
        array = torch.from_numpy(np.require(array, dtype, ["C", "W"]))
    if not isinstance(array, (np.ndarray, torch.Tensor)):
        raise GlannError(f"{name} is a {type(array).__name__}; wanted a NumPy array or a tensor")
    if not isinstance(array, torch.Tensor) or not array.is_floating_point():
        raise GlannError(
            f"{name} has dtype {str(array.dtype).removeprefix('torch.')}; wanted floats (of uint8 "
            "images: glann.images.to_float(images).flatten(1))"
        )
    if array.ndim != 2 or array.shape[1] == 0:
        raise GlannError(f"{name} has shape {tuple(array.shape)}; wanted (n, d), one row an image")
    if like is not None and array.shape[1] != like.shape[1]:
        raise GlannError(
            f"{name} has shape {tuple(array.shape)}; wanted (n, {like.shape[1]}), features of the "
            "same network as the other set's"
        )
    if len(array) < at_least:
        raise GlannError(
            f"{name} has {len(array)} rows; wanted at least {at_least}{reason and f', {reason}'}"
        )
    features = array.detach()
    if features.dtype != torch.float64:
        features = features.float()
    if features.device.type == "mps":
        features = features.cpu()
    good = (features.abs() <= _LARGEST).all(1)
    if not good.all():
        raise GlannError(
            f"{name} holds NaN, infinite or too large numbers, first in row "
            f"{int((~good).nonzero()[0])}; look at the network or the sampler that made it"
        )
    return features if like is None else features.to(like.device)


def as_pair(
    real: object, fake: object, at_least: int, reason: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and fake features, checked by `as_features` and against each other.

    Returns:
        float32 or float64 `(n, d)` and `(m, d)`, n and m ≥ `at_least`, on the real ones' device.
    """
    first = as_features(real, "real", at_least, reason)
    return first, as_features(fake, "fake", at_least, reason, like=first)


def check_option(name: str, value: int, minimum: int) -> None:
    """Raise GlannError if an option of a score is too small."""
    if value < minimum:
        raise GlannError(f"{name} = {value} is out of range; wanted at least {minimum}")
