"""How sharp images are: the energy of their Laplacian, beside that of real images."""

import torch

from glann.errors import GlannError
from glann.images import as_images, to_float

_IMAGES = 1024
"""Images that are floats at one time."""


def laplacian_energy(images: object) -> float:
    """E |Δx|² over all pixels and channels, Δ the Laplacian of the four neighbours.

    (Δx)(p) = Σ_q x(q) − 4 x(p), q over p's neighbours; a neighbour beyond the edge is p itself, so
    that an edge of the image is no edge in it.  Blurred images have less of it, noise has most: it
    says nothing of quality by itself.  A measure of focus (Subbarao, Choi & Nikzad 1993, "Focusing
    techniques", Optical Engineering 32).

    Args:
        images: uint8 `(n, c, h, w)`, n ≥ 1; taken as floats in [0, 1].

    Returns:
        0 (each image is one colour) to 16, for pixels in [0, 1].

    Raises:
        GlannError: on arrays that `as_images` refuses, and on none at all.
    """
    found = as_images(images)
    if not len(found):
        raise GlannError("0 images were given; wanted at least 1 to tell how sharp they are")
    energy = sum(
        float(_laplacian(to_float(part)).double().square().sum()) for part in found.split(_IMAGES)
    )
    return energy / found.numel()


def relative_sharpness(*, real: object, fake: object) -> float:
    """The Laplacian energy of `fake` over that of `real`, both uint8 images.

    1 is right: below it samples are more blurred than real images, above it rougher.

    Raises:
        GlannError: as `laplacian_energy`, and if every real image is one colour.
    """
    of_real = laplacian_energy(real)
    if of_real == 0:
        raise GlannError("every real image is one colour; wanted real images with edges in them")
    return laplacian_energy(fake) / of_real


def _laplacian(images: torch.Tensor) -> torch.Tensor:
    """Δ of float images `(n, c, h, w)`, of the same shape."""
    around = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = around[..., :-2, 1:-1] + around[..., 2:, 1:-1]
    columns = around[..., 1:-1, :-2] + around[..., 1:-1, 2:]
    return rows + columns - 4 * images
