"""Readers of files with images: idx, the batches of CIFAR-10, NumPy's arrays and image files.

Each makes uint8 tensors of what a path holds and raises GlannError if that is damaged.  Errors of
the operating system may pass through: `os_errors` is for their callers.
"""

import contextlib
import gzip
import hashlib
import itertools
import math
import mmap
import os
import pickle
import pickletools
import re
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from glann import processes
from glann.errors import GlannError
from glann.images import SUFFIXES, as_images, read_image, resize_and_crop, to_grey, to_uint8
from glann.places import cache_folder
from glann.storage import fingerprint, mapped, reserve, write_atomically

SMALLEST, LARGEST = 8, 256
"""Heights and widths that the generators work for, both inclusive."""

ARRAYS = (".npy", ".npz")
"""Endings of files that are taken for arrays."""

PROGRESS_FROM = 500
"""Decoding more files than this shows a progress bar."""

VERSION = "images 1"
"""How images are decoded and scaled: to be raised with it, as files of the cache stay for ever."""

IN_MEMORY = 2**31
"""Images that are made of others, decoded or scaled, are kept in memory up to so many bytes: more
of them go to a file in the cache, from which they are mapped."""

STALE_SECONDS = 86_400
"""A file of the cache that was begun so long ago and isn't whole is not being written any more."""

_SIDE_FILES = (
    *(".txt", ".md", ".rst", ".html", ".htm", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml"),
    *(".yml", ".toml", ".log", ".ini", ".db", ".xmp", ".aae", "license", "licence", "copying"),
    *("readme", "notice", "authors"),
)
"""Endings, and names without one, of what often lies beside images and that nobody misses."""

_AT_ONCE = 4096
"""Images that are decoded or copied between two looks at how far it has come."""


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
            _check_numbering(file, path.stat().st_size)
            file.seek(0)
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


def _check_numbering(file: IO[bytes], size: int) -> None:
    """Refuse a pickle that numbers its parts beyond what there can be: memory is taken for all."""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name.endswith("PUT") and int(str(argument)) > size:
            raise pickle.UnpicklingError(f"it numbers a part {argument}, in {size} bytes")


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

    What a .npy file holds is mapped, not read: it may be larger than memory, unless it has to be
    copied because its channels come last.  `floats` also takes floats in [0, 1].
    """
    arrays, keys = {}, "none"
    try:
        with path.open("rb") as file:  # numpy leaves files open that it fails to read
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                arrays["images"] = mapped_array(path)
            else:
                file.seek(0)
                loaded = np.load(file, allow_pickle=False)
                arrays = {key: np.asarray(loaded[key]) for key in {"images", "labels"} & {*loaded}}
                keys = ", ".join(loaded) or keys
    except Exception as error:  # of zipfile, zlib, numpy's own, MemoryError, …
        reason = str(error).partition(". If you")[0]  # numpy's advice is how to unpickle it
        raise GlannError(
            f"{path} can't be read as an array: {reason}. Save it again with numpy.save or "
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


def mapped_array(path: Path) -> NDArray[Any]:
    """What a .npy file holds, without reading it: see `glann.storage.mapped`."""
    # numpy's own map is read-only, which torch has no tensors for, or one that Linux refuses if it
    # is larger than memory; here it checks the header.
    array: Any = np.lib.format.open_memmap(path, mode="r")
    order: Any = "C" if array.flags.c_contiguous else "F"
    with path.open("rb") as file:
        return np.ndarray(array.shape, array.dtype, mapped(file), array.offset, order=order)


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
        others = left_out(folder)
        raise GlannError(
            f"{folder} holds no images{f' ({others})' if others else ''}; wanted files that end in "
            f"{' '.join(SUFFIXES)}, together or one folder for each class"
        )
    return {"": flat} if flat else classes


def left_out(folder: Path) -> str:
    """How many files aren't taken for images: "5 other files left out: .heic", or "" if none."""
    # A file without an ending is told by its name.
    endings = Counter(file.suffix.lower() or file.name for file in _files(folder))
    others = {e: n for e, n in endings.items() if e.lower() not in (*SUFFIXES, *_SIDE_FILES)}
    if not others:
        return ""
    count = sum(others.values())
    commonest = sorted(others, key=lambda ending: (-others[ending], ending))
    return f"{count:,} other file{'s' if count > 1 else ''} left out: {some_of(commonest)}"


def holds_images(path: Path) -> bool:
    """Whether a path is an image file, or a folder with one in it or in a class of it."""
    return any(file.suffix.lower() in SUFFIXES for file in _files(path))


def _files(path: Path, levels: int = 3) -> Iterator[Path]:
    """A file, or those in a folder without hidden ones: train/CLASS/FILE are three levels."""
    if path.is_file():
        yield path
    elif levels and path.is_dir():
        for entry in visible(path):
            yield from _files(entry, levels - 1)


def some_of(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


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
    """Decode image files into one tensor `(n, c, h, w)`, each scaled and cropped to `size`.

    Raises:
        GlannError: files can't be read, all of which have been tried then, or are of several sizes.
    """
    reasons: dict[int, str] = {}  # an error itself would keep what was decoded until it came

    def read(i: int) -> torch.Tensor | None:
        try:
            image = read_image(files[i], channels)
        except GlannError as error:
            reasons[i] = str(error)
            return None
        return image if size is None else resize_and_crop(image, size)

    readable = ((i, image) for i in range(len(files)) if (image := read(i)) is not None)
    start, first = next(readable, (0, None))
    if first is None:
        raise _unreadable(files, reasons)
    shape = first.shape
    _check_sides(*shape[1:])

    def put(images: torch.Tensor, i: int) -> None:
        image = read(i)
        if image is None:
            return
        if image.shape != shape:
            sizes = ["×".join(map(str, shown[1:])) for shown in (shape, image.shape)]
            raise GlannError(
                f"{files[start]} is {sizes[0]} and {files[i]} is {sizes[1]}; wanted one size. Set "
                "data.size (glann evaluate: --size), to which all are then scaled and cropped"
            )
        images[i] = image

    def fill(images: torch.Tensor) -> None:
        # No bar where stderr is no terminal (disable=None).
        disable = None if len(files) > PROGRESS_FROM and processes.is_first() else True
        with (
            ThreadPoolExecutor() as pool,
            tqdm(
                total=len(files), desc="decoding", unit="image", leave=False, disable=disable
            ) as bar,
        ):
            for part in torch.arange(len(files)).split(_AT_ONCE):
                # Cancels what is left if one fails.
                for _ in pool.map(put, itertools.repeat(images), part.tolist()):
                    bar.update()
        if reasons:
            raise _unreadable(files, reasons)

    def made_of() -> Iterator[str]:
        yield f"{VERSION} {size} {channels}"
        for path in files:
            about = path.stat()
            yield f"{path.absolute()} {about.st_size} {about.st_mtime_ns}"

    return _kept((len(files), *shape), fill, made_of)


def _unreadable(files: list[Path], reasons: dict[int, str]) -> GlannError:
    """One error for all files that can't be read, of which `reasons` has the indices."""
    bad = sorted(reasons)
    if len(bad) == 1:  # what was given by itself may well be whole, but no image
        return GlannError(reasons[bad[0]] + (". Delete or mend it" if len(files) > 1 else ""))
    folder = os.path.commonpath(files)
    names = some_of([str(files[i].relative_to(folder)) for i in bad])
    return GlannError(
        f"{len(bad):,} of {len(files):,} images in {folder} can't be read: {names}. The first: "
        f"{reasons[bad[0]]}. Delete or mend them"
    )


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

    def fill(fitted: torch.Tensor) -> None:
        for i, image in enumerate(images):
            grey = to_grey(image) if channels < given else image
            fitted[i] = resize_and_crop(grey, size)  # one grey channel fills all three

    def made_of() -> Iterator[str]:
        yield f"{VERSION} fit {size} {channels} {fingerprint(images)}"

    return _kept((count, channels, *size), fill, made_of)


def take(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The images of ascending rows: a view, unless some between them are left out."""
    if len(rows) == 0 or int(rows[-1] - rows[0]) == len(rows) - 1:
        first = int(rows[0]) if len(rows) else 0
        return images[first : first + len(rows)]

    def fill(taken: torch.Tensor) -> None:
        for part, some in zip(taken.split(_AT_ONCE), rows.split(_AT_ONCE), strict=True):
            part.copy_(images[some])

    def made_of() -> Iterator[str]:
        yield f"take {fingerprint(rows)} {fingerprint(images)}"

    return _kept((len(rows), *images.shape[1:]), fill, made_of)


def _kept(
    shape: tuple[int, ...],
    fill: Callable[[torch.Tensor], None],
    made_of: Callable[[], Iterator[str]],
) -> torch.Tensor:
    """uint8 images `(n, c, h, w)` that `fill` writes, in memory or mapped from the cache.

    `made_of` says all that they follow from: what is there of the same is not made again.
    """
    size = math.prod(shape)
    if size <= IN_MEMORY:
        images = torch.empty(shape, dtype=torch.uint8)
        fill(images)
        return images
    digest = hashlib.sha256()
    for text in made_of():
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    path = cache_folder() / f"images-{digest.hexdigest()[:16]}.npy"

    def write(file: IO[bytes]) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        start = file.tell()
        reserve(file, start + size)
        room = mmap.mmap(file.fileno(), start + size)
        fill(torch.frombuffer(room, dtype=torch.uint8, offset=start).view(shape))
        room.flush()

    if processes.is_first() and not path.is_file():
        for left in path.parent.glob(".images-*"):  # by a process that was killed
            with contextlib.suppress(OSError):
                if left.stat().st_mtime < time.time() - STALE_SECONDS:
                    left.unlink()
        tqdm.write(
            f"{shape[0]:,} images take {size / 2**20:,.0f} MB and are kept in {path}; to keep them "
            "elsewhere, set GLANN_CACHE",
            file=sys.stderr,
        )
        write_atomically(path, write)
    processes.wait()  # the first of several writes it for all
    if not path.is_file():
        raise GlannError(
            f"{path} is not there, though another process made it; set GLANN_CACHE to a folder "
            "that all machines share"
        )
    return read_array(path)[0]


def _check_sides(height: int, width: int) -> None:
    if not (SMALLEST <= height <= LARGEST and SMALLEST <= width <= LARGEST):
        raise GlannError(
            f"the images are {height}×{width}; wanted a height and a width of {SMALLEST} to "
            f"{LARGEST}. Set data.size, to 64 for example (glann evaluate: --size 64)"
        )
