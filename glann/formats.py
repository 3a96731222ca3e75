"""Readers of files with images: idx, the batches of CIFAR-10, NumPy's arrays and image files.

Each makes uint8 tensors of what a path holds and raises GlannError if that is damaged.  Errors of
the operating system may pass through: `os_errors` is for their callers.
"""

import contextlib
import gzip
import math
import pickle
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from glann.errors import GlannError
from glann.images import SUFFIXES, as_images, read_image, resize_and_crop, to_grey, to_uint8

SMALLEST, LARGEST = 8, 256
"""Heights and widths that the generators work for, both inclusive."""

PROGRESS_FROM = 500
"""Decoding more files than this shows a progress bar."""


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Any step may meet a folder without rights, a dead disk or a name that is too long."""
    try:
        yield
    except OSError as error:
        raise GlannError(
            f"{error.filename or 'a file'} can't be read: {error.strerror or error}. Check its "
            "name, its rights and its disk"
        ) from error


# --- idx files ----------------------------------------------------------------------------------


def read_idx(path: Path, dimensions: int) -> torch.Tensor:
    """An idx file of bytes, packed with gzip or not: images have 3 dimensions, labels 1."""
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):  # whatever its name: some browsers unpack silently
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise GlannError(f"{path} is a damaged gzip file: {error}. Copy it again") from error
    start, wanted = 4 * (1 + dimensions), 0x800 + dimensions
    if len(content) < start:
        raise GlannError(f"{path} has {len(content)} bytes; wanted an idx file. Copy it again")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:start])
    if magic != wanted:
        raise GlannError(
            f"{path} starts with the magic number {magic}; wanted {wanted}, an idx file of "
            f"{'images' if dimensions == 3 else 'labels'}. Put the right file there"
        )
    if len(content) - start != math.prod(shape):
        raise GlannError(
            f"{path} has {len(content) - start} bytes after its header; its header says "
            f"{'×'.join(map(str, shape))} = {math.prod(shape)}. Copy it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


# --- CIFAR-10 -----------------------------------------------------------------------------------


def read_cifar10(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(images `(n, 3, 32, 32)`, int64 labels) of a batch: binary if it ends in .bin, or pickled."""
    pixels, labels = (_binary_batch if path.suffix == ".bin" else _pickled_batch)(path)
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(labels.astype(np.int64))


def _binary_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    content = np.fromfile(path, np.uint8)
    if len(content) % 3073:
        raise GlannError(
            f"{path} has {len(content)} bytes; wanted a multiple of 3073, as the binary batches of "
            "CIFAR-10 have. Copy it again"
        )
    records = content.reshape(-1, 3073)  # one label and 3 × 1024 pixels
    return records[:, 1:], records[:, 0]


def _pickled_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        with path.open("rb") as file:
            batch = _BatchUnpickler(file, encoding="bytes").load()
        # Python 2, which wrote the official files, made the keys bytes.
        batch = {key.decode() if isinstance(key, bytes) else key: batch[key] for key in batch}
        _, shape, dtype, columns_first, content = batch["data"].state
        if dtype.said[0] not in ("u1", b"u1"):
            raise ValueError(f"its images are of type {dtype.said[0]}, not uint8")
        pixels = np.frombuffer(content, np.uint8).reshape(
            shape, order="F" if columns_first else "C"
        )
        labels = np.array(batch["labels"], dtype=np.uint8)
        if pixels.shape != (*labels.shape, 3072):
            raise ValueError(f"its images are {pixels.shape}, its labels {labels.shape}")
        return pixels, labels
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise GlannError(
            f"{path} is not a batch of CIFAR-10, or it is damaged ({type(error).__name__}: "
            f"{error}). Nothing that it asks to run was run; copy it again from its source"
        ) from error


class _Said:
    """Keeps what a pickle says of an array or of its dtype, and makes nothing of it."""

    def __init__(self, *said: object) -> None:
        self.said = said

    def __setstate__(self, state: object) -> None:
        self.state = state


class _BatchUnpickler(pickle.Unpickler):
    """Knows only what arrays are made of: a pickle may name any function and have it called."""

    def find_class(self, module: str, name: str) -> type[_Said]:
        """A stand-in for what arrays are made of; UnpicklingError for everything else."""
        if f"{module}.{name}" not in (
            *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
            *("numpy.ndarray", "numpy.dtype"),
        ):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return _Said


# --- arrays -------------------------------------------------------------------------------------


def read_array(path: Path, floats: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(images `(n, c, h, w)`, int64 labels or None) of a .npy or .npz file of uint8.

    `floats` also takes floats in [0, 1].
    """
    arrays, keys = {}, "none"
    try:
        with path.open("rb") as file:  # numpy leaves files open that it fails to read
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                arrays["images"] = loaded
            else:
                arrays = {key: np.asarray(loaded[key]) for key in {"images", "labels"} & {*loaded}}
                keys = ", ".join(loaded) or keys
    except Exception as error:  # of zipfile, zlib, numpy's own, MemoryError, …
        raise GlannError(
            f"{path} can't be read as an array: {error}. Save it again with numpy.save or "
            "numpy.savez, without objects in it"
        ) from error
    if "images" not in arrays:
        raise GlannError(
            f"{path} has these keys: {keys}; wanted 'images' and optionally 'labels'. Save it with "
            "numpy.savez(path, images=…, labels=…)"
        )
    pixels, labels = arrays["images"], arrays.get("labels")
    if floats and pixels.dtype.kind == "f":
        if not ((pixels >= 0) & (pixels <= 1)).all():
            raise GlannError(f"{path} has floats outside [0, 1]. Scale them, or save uint8")
        pixels = to_uint8(torch.from_numpy(pixels.astype(np.float32))).numpy()
    if pixels.dtype != np.uint8:
        raise GlannError(
            f"{path} has dtype {pixels.dtype}; wanted uint8 in 0..255. Save it so; floats in "
            "[0, 1] as (images * 255).round().astype('uint8')"
        )
    images = as_images(_channels_first(pixels, path), str(path))
    if labels is None:
        return images, None
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise GlannError(
            f"{path} has labels of dtype {labels.dtype} and shape {labels.shape}; wanted integers "
            "(n,). Save them so"
        )
    return images, torch.from_numpy(labels.astype(np.int64))


def _channels_first(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """`(n, h, w)` or `(n, h, w, c)` → `(n, c, h, w)`; what can be read in two ways is refused."""
    first = array.ndim == 4 and array.shape[1] in (1, 3)
    last = array.ndim >= 3 and array.shape[-1] in (1, 3)
    if last and (first or array.ndim == 3):
        raise GlannError(
            f"{path} has shape {array.shape}, in which the channels could be in two places; wanted "
            "(n, channels, height, width). Save it so"
        )
    if array.ndim == 3:
        return array[:, None]
    return array.transpose(0, 3, 1, 2) if last else array


# --- image files --------------------------------------------------------------------------------


def files_by_class(folder: Path) -> dict[str, list[Path]]:
    """Image files by the name of their class; a flat folder is one class without a name."""
    flat, folders = _entries(folder)
    classes = {}
    for inner in folders:
        files, deeper = _entries(inner)
        if files:
            classes[inner.name] = files
        for deep in deeper:
            if _entries(deep)[0]:
                raise GlannError(
                    f"{deep} holds images two folders below {folder}; wanted images in {folder}, "
                    "or one folder for each class. Move them"
                )
    if flat and classes:
        raise GlannError(
            f"{folder} holds both images ({flat[0].name}) and folders of images; wanted one of the "
            "two: all images together, or each in the folder of its class"
        )
    if not flat and not classes:
        raise GlannError(
            f"{folder} holds no images; wanted files that end in {' '.join(SUFFIXES)}, together or "
            "one folder for each class"
        )
    return {"": flat} if flat else classes


def visible(folder: Path) -> list[Path]:
    """What a folder holds, without hidden files."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The image files and the subfolders of a folder in natural order, without hidden ones."""
    entries = sorted(visible(folder), key=lambda entry: natural(entry.name))
    files = [file for file in entries if file.suffix.lower() in SUFFIXES and file.is_file()]
    return files, [entry for entry in entries if entry.is_dir()]


def natural(name: str) -> tuple[list[str | int], str]:
    """Sorts "2.png" before "10.png"; text and numbers alternate, so that they never compare."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def common_channels(files: Iterable[Path]) -> int:
    """1 if all files are grey, else 3, from their headers alone."""
    for path in files:
        # What is wrong with a file is told when it is decoded.
        with contextlib.suppress(Exception), Image.open(path) as image:
            if Image.getmodebase(image.mode) != "L":
                return 3
    return 1


def decode(files: list[Path], size: tuple[int, int] | None, channels: int) -> torch.Tensor:
    """Decode image files into one tensor `(n, c, h, w)`, each scaled and cropped to `size`."""

    def read(path: Path) -> torch.Tensor:
        image = read_image(path, channels)
        return image if size is None else resize_and_crop(image, size)

    first = read(files[0])
    _check_sides(*first.shape[1:])
    images = torch.empty((len(files), *first.shape), dtype=torch.uint8)

    def put(i: int) -> None:
        image = read(files[i])
        if image.shape != first.shape:
            sizes = ["×".join(map(str, shown.shape[1:])) for shown in (first, image)]
            raise GlannError(
                f"{files[0]} is {sizes[0]} and {files[i]} is {sizes[1]}; wanted one size. Set "
                "data.size, to which all images are then scaled and cropped"
            )
        images[i] = image

    # No bar where stderr is no terminal (disable=None).
    disable = None if len(files) > PROGRESS_FROM else True
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(files), desc="decoding", unit="image", leave=False, disable=disable) as bar,
    ):
        for _ in pool.map(put, range(len(files))):  # cancels what is left if one fails
            bar.update()
    return images


def fit(images: torch.Tensor, size: tuple[int, int] | None, channels: int | None) -> torch.Tensor:
    """Give images `(n, c, h, w)` the size and channels wanted; None leaves them as they are."""
    count, given, height, width = images.shape
    if images.numel() == 0:
        raise GlannError(
            f"{count} images of {height}×{width} were found; wanted at least 1, with pixels. Look "
            "into the files that were given"
        )
    size, channels = size or (height, width), channels or given
    _check_sides(*size)
    if (channels, *size) == (given, height, width):
        return images
    fitted = torch.empty((count, channels, *size), dtype=torch.uint8)
    for i, image in enumerate(images):
        grey = to_grey(image) if channels < given else image
        fitted[i] = resize_and_crop(grey, size)  # one grey channel fills all three
    return fitted


def _check_sides(height: int, width: int) -> None:
    if not (SMALLEST <= height <= LARGEST and SMALLEST <= width <= LARGEST):
        raise GlannError(
            f"the images are {height}×{width}; wanted a height and a width of {SMALLEST} to "
            f"{LARGEST}. Set data.size, to 64 for example"
        )
