"""Images: uint8 in files and at every interface, floats inside the networks.

The only place where ranges and layouts change.  An image tensor is `(n, channels, height, width)`
with 1 channel (grey) or 3 (RGB), uint8 in 0..255 or float in [0, 1].
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from glann.errors import GlannError
from glann.storage import write_atomically

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""Endings of files that are taken for images."""


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 → float32 in [0, 1], same shape and device."""
    return images.to(torch.float32).div_(255)


def to_uint8(images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Float in [0, 1] (values outside are clipped) → uint8 in 0..255, same shape and device."""
    return torch.as_tensor(images).detach().float().mul(255).round_().clamp_(0, 255).to(torch.uint8)


def to_grey(images: torch.Tensor) -> torch.Tensor:
    """uint8 RGB `(…, 3, h, w)` → grey `(…, 1, h, w)`, weighted and rounded as Pillow does."""
    weights = images.new_tensor([19595, 38470, 7471], dtype=torch.int32).view(3, 1, 1)
    total = (images.to(torch.int32) * weights).sum(-3, keepdim=True)
    return ((total + 2**15) >> 16).to(torch.uint8)


def as_images(array: object, name: str = "images") -> torch.Tensor:
    """Check that `array` is a batch of images and give it as a uint8 CPU tensor `(n, c, h, w)`.

    Takes NumPy arrays and torch tensors, uint8 `(n, c, h, w)` with c = 1 or 3.
    """
    if not isinstance(array, (np.ndarray, torch.Tensor)):
        raise GlannError(f"{name} is a {type(array).__name__}; wanted a NumPy array or a tensor")
    if array.dtype not in (np.uint8, torch.uint8):
        raise GlannError(
            f"{name} has dtype {str(array.dtype).removeprefix('torch.')}; wanted uint8 in 0..255 "
            "(for floats in [0, 1]: glann.images.to_uint8)"
        )
    if isinstance(array, np.ndarray):  # a read-only one is copied: torch has no such tensors
        array = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        hint = ""
        if array.ndim == 3:
            hint = " (of grey images without them: array[:, None])"
        elif array.ndim == 4 and array.shape[3] in (1, 3):
            hint = " (with channels last: NumPy's array.transpose(0, 3, 1, 2))"
        raise GlannError(
            f"{name} has shape {tuple(array.shape)}; wanted (n, channels, height, width) with 1 "
            f"or 3 channels{hint}"
        )
    return array.cpu().contiguous()


def read_image(path: Path, channels: int | None = None) -> torch.Tensor:
    """Read one image file: uint8 `(c, h, w)`, turned upright as its EXIF data say.

    `channels` 1 or 3 converts to grey or RGB; None keeps grey images grey and makes all others RGB.
    What is transparent is laid on white, as browsers show it.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F" or image.mode.startswith("I"):
                image = _in_8_bits(np.asarray(image))
            if channels is None:
                channels = 1 if image.mode in ("1", "L", "LA") else 3
            if image.has_transparency_data:
                above = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
            image = image.convert("L" if channels == 1 else "RGB")
            pixels = np.array(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise GlannError(f"{path} can't be read as an image: {error}") from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def _in_8_bits(grey: np.ndarray) -> Image.Image:
    """Grey values of 16 bits, or floats from 0 to 1, in 8 bits: Pillow would cut them at 255."""
    least, most = float(grey.min()), float(grey.max())
    top = 255 if most <= 255 and grey.dtype.itemsize > 2 else 65_535
    if grey.dtype.kind == "f":
        top = 1
    if not 0 <= least <= most <= top:  # nor if there is NaN
        raise ValueError(f"its values go from {least:g} to {most:g}; wanted 0 to {top:,}")
    return Image.fromarray((grey * (255.999 / top)).astype(np.uint8))


def resize_and_crop(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scale a uint8 `(c, h, w)` image until it covers `size` = (height, width), crop the middle."""
    height, width = size
    if tuple(image.shape[1:]) == (height, width):
        return image
    fitted = ImageOps.fit(_to_pillow(image), (width, height), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted).reshape(height, width, -1)).permute(2, 0, 1)


def pad(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Put zeros evenly around float images until they have `size` = (height, width)."""
    extra_h, extra_w = size[0] - images.shape[-2], size[1] - images.shape[-1]
    top, left = extra_h // 2, extra_w // 2
    return torch.nn.functional.pad(images, (left, extra_w - left, top, extra_h - top))


def crop(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The middle of the images, of `size` = (height, width): undoes `pad`."""
    top, left = (images.shape[-2] - size[0]) // 2, (images.shape[-1] - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]]


def moved(images: torch.Tensor, ways: torch.Tensor) -> torch.Tensor:
    """Each image moved by up to a ninth of a side; what comes in repeats the edge.

    Args:
        images: float `(n, c, h, w)`.
        ways: how far down and across, float `(n, 2)`: uniform in [0, 1), from all the way up and
            left to all the way down and right.

    Returns:
        float `(n, c, h, w)`; gradients flow to the pixels that are seen.
    """

    def seen_at(side: int, way: torch.Tensor) -> torch.Tensor:
        most = side // 9
        at = torch.arange(side, device=images.device)
        return (at - most + (way[:, None] * (2 * most + 1)).long()).clamp(0, side - 1)

    height, width = images.shape[-2:]
    rows, columns = seen_at(height, ways[:, 0]), seen_at(width, ways[:, 1])
    every = torch.arange(len(images), device=images.device)[:, None, None]
    return images[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def grid(images: torch.Tensor, columns: int | None = None, gap: int = 2) -> torch.Tensor:
    """Lay uint8 images `(n, c, h, w)` out row by row: one uint8 image `(c, H, W)`.

    `columns` defaults to the square root of n.  Small images are magnified by whole factors, so
    that a grid of 8×8 digits can be looked at.
    """
    images = as_images(images)
    n, channels, height, width = images.shape
    if n == 0:
        raise GlannError("a grid of 0 images was asked for; wanted at least 1")
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    magnify = max(1, min(8, 480 // (columns * width)))
    images = images.repeat_interleave(magnify, dim=2).repeat_interleave(magnify, dim=3)
    height, width = height * magnify, width * magnify
    # A middle grey between the images: it shows on dark as well as on light ones.
    sheet = torch.full(
        (channels, rows * (height + gap) + gap, columns * (width + gap) + gap),
        128,
        dtype=torch.uint8,
    )
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def side_by_side(batches: dict[str, torch.Tensor], gap: int = 12) -> torch.Tensor:
    """Grids of several batches beside one another, each under its title: one uint8 `(3, H, W)`."""
    grids = {title: grid(images).expand(3, -1, -1) for title, images in batches.items()}
    height = max(sheet.shape[1] for sheet in grids.values())
    font, line = ImageFont.load_default(16), 28
    columns = []
    for title, sheet in grids.items():
        column = torch.full((3, height + line, sheet.shape[2] + gap), 255, dtype=torch.uint8)
        column[:, line : line + sheet.shape[1], : sheet.shape[2]] = sheet
        picture = _to_pillow(column)
        ImageDraw.Draw(picture).text((2, 4), title, fill="black", font=font)
        columns.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.cat(columns, dim=2)[:, :, :-gap]


def _to_pillow(image: torch.Tensor) -> Image.Image:
    pixels = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def write_png(image: torch.Tensor, path: Path) -> None:
    """Write one uint8 image `(c, h, w)` as PNG, whole or not at all."""
    write_atomically(path, lambda file: _to_pillow(image).save(file, format="PNG"))


def save_grid(images: torch.Tensor, path: str | Path, columns: int | None = None) -> None:
    """Write uint8 images `(n, c, h, w)` as one PNG grid; GlannError if `path` ends otherwise."""
    if ending(Path(path)) != ".png":
        raise GlannError(f"a grid is written as PNG; wanted a name that ends in .png, got {path}")
    write_png(grid(images, columns), Path(path))


def interleave(above: torch.Tensor, below: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """Two batches of images in one, for a grid: each row of `above` over its row of `below`."""
    pairs = zip(above.split(columns), below.split(columns), strict=True)
    rows = []
    for pair in pairs:
        for row in pair:
            blank = row.new_full((columns - len(row), *row.shape[1:]), 128)
            rows.append(torch.cat([row, blank]) if len(above) > columns else row)
    return torch.cat(rows)


def check_output(path: Path) -> None:
    """Refuse a name that `save_images` can't write, before the work is done."""
    if ending(path) not in ("", ".png", ".npy", ".npz"):
        raise GlannError(
            f"{path} ends in '{path.suffix}'; wanted .png (a grid), .npy or .npz (the array), or "
            "a name without an ending (a folder of PNGs)"
        )
    if ending(path):
        return
    if str(path) in (".", "-"):
        raise GlannError(f"'{path}' was given; wanted the name of a file, or of a new folder")
    # Images of a folder are numbered from 0, and might be somebody's photographs.
    there = sorted(path.iterdir()) if path.is_dir() else []
    if there:
        raise GlannError(
            f"{path} holds {there[0].name} already, and perhaps more; wanted a new folder or an "
            "empty one"
        )


def ending(path: Path) -> str:
    """What a file's name says that it is: ".png" of X.PNG, "" of a folder's."""
    return path.suffix.lower()


def save_array(array: torch.Tensor, path: str | Path) -> str:
    """Write a tensor as `.npy`; returns what was written."""
    write_atomically(Path(path), lambda file: np.save(file, array.numpy()))
    return f"{path} ({str(array.dtype).removeprefix('torch.')} {tuple(array.shape)})"


def save_images(
    images: torch.Tensor, path: str | Path, columns: int | None = None, shown: int | None = None
) -> str:
    """Write uint8 images `(n, c, h, w)` as `path`'s ending says; returns what was written.

    `.png`: one grid.  `.npy`, `.npz` (key `images`): the array.  No ending: a folder with one PNG
    for each image.  `shown` is how many they are without those that `interleave` left blank.
    """
    path, images = Path(path), as_images(images)
    check_output(path)
    if ending(path) == ".png":
        save_grid(images, path, columns)
        count = len(images) if shown is None else shown
        return f"{path} (a grid of {count} image{'s' * (count != 1)})"
    if ending(path) == ".npy":
        return save_array(images, path)
    if ending(path) == ".npz":
        write_atomically(path, lambda file: np.savez_compressed(file, images=images.numpy()))
        return f"{path} (uint8 {tuple(images.shape)}, key 'images')"
    digits = len(str(max(0, len(images) - 1)))
    for i, image in enumerate(images):
        write_png(image, path / f"{i:0{digits}d}.png")
    return f"{path}/ ({len(images)} PNG{'s' * (len(images) != 1)})"
