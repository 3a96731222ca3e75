"""Image sources: from files, archives and scikit-learn to one uint8 tensor with labels.

Sources differ in where their files are and how they are packed; each has one function here that
finds and reads them.  Splitting, limiting, resizing and checking are the same for all of them.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import math
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from glann.errors import GlannError
from glann.images import SUFFIXES, as_images, read_image, resize_and_crop, to_uint8
from glann.randomness import permutation
from glann.settings import check, setting

SOURCES = ("digits", "mnist", "fashion-mnist", "cifar10", "faces", "folder", "array")
"""Names of the image sources, and of the folders that their files are looked for in."""

SPLITS = ("train", "test")

SMALLEST, LARGEST = 8, 256
"""Heights and widths that the generators work for, both inclusive."""

PROGRESS_FROM = 500
"""Decoding more files than this shows a progress bar."""

_CLASS_NAMES = {
    "digits": tuple("0123456789"),
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
}

# For the sources with test images of their own: OpenML's name (version 1), how many training
# images come first there, and the shape of an image.
_OPENML = {
    "mnist": ("mnist_784", 60000, (1, 28, 28)),
    "fashion-mnist": ("Fashion-MNIST", 60000, (1, 28, 28)),
    "cifar10": ("CIFAR_10", 50000, (3, 32, 32)),
}
_OPENML_TEST = 10000


@dataclass(kw_only=True)
class Data:
    """Which images to learn from: the [data] section of a recipe."""

    source: str = setting("digits", "where the images come from", choices=SOURCES)
    path: str | None = setting(
        None, "where the files are: their folder or its parent; for 'array' also the file itself"
    )
    size: int | list[int] | None = setting(  # noqa: RUF009 (the default is None)
        None,
        "images are scaled to cover size or [height, width] and cropped to it; none: as they are",
        minimum=SMALLEST,
        maximum=LARGEST,
    )
    channels: int | None = setting(
        None, "1 for grey, 3 for RGB; none: as the images are", minimum=1, maximum=3
    )
    limit: int | None = setting(None, "only the first so many images", minimum=1)
    test_fraction: float = setting(
        0.0,
        "share of the images held out as test images, for sources without their own",
        minimum=0.0,
        maximum=0.9,
    )


@dataclass(frozen=True, eq=False)  # a generated == would compare tensors element by element
class Images:
    """The images of one split.

    Attributes:
        images: uint8 `(n, channels, height, width)`, 1 or 3 channels, sides of 8 to 256.
        labels: int64 `(n,)`, or None if the source has none.
        source: one of `SOURCES`.
        fingerprint: what `fingerprint` says of the images.
        place: where they were read from, for people: a path or "scikit-learn".
        class_names: the name of each label; () if there are none.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    source: str
    fingerprint: str
    place: str
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class _Found:
    """What a source gave for a split, before holding out, limiting and resizing.

    `images` is a uint8 tensor `(n, c, h, w)`, or files that are decoded only once chosen.
    """

    images: torch.Tensor | list[Path]
    labels: torch.Tensor | None
    place: str
    class_names: tuple[str, ...] = ()
    channels: int | None = None


def load(data: Data, path: str | Path | None = None, split: str = "train") -> Images:
    """Read the images that `data` describes.

    Files are looked for in `path`, else `data.path`, else in the folder with the source's name
    under `$GLANN_DATA` and then under `data/`.  Only when no path was given and these two hold
    nothing are they fetched, through scikit-learn.  "digits" is part of scikit-learn.

    Args:
        data: the settings; they are checked first.
        path: goes before `data.path`.
        split: "train" or "test".  A source without test images of its own holds out
            `data.test_fraction` of its images: the same ones whatever the seed of the recipe.

    Raises:
        GlannError: a setting is wrong, files are missing or damaged, or images don't fit together.
    """
    check(data, "data")
    size = _target(data.size, data.channels)
    if split not in SPLITS:
        raise GlannError(f"split = {split!r} is unknown; wanted 'train' or 'test'")
    if data.source != "folder":  # which shows only in its subfolders what it has
        _check_split(data, split, own_test=data.source in _OPENML)
    with _os_errors():
        found = _READERS[data.source](_search(data, path, split))
        _check_labels(found)
        rows = _rows(data, split, len(found.images))
        if isinstance(found.images, list):
            images = _decode([found.images[i] for i in rows.tolist()], size, found.channels)
        else:
            images = _fit(found.images[rows], size, data.channels)
    return Images(
        images=images,
        labels=None if found.labels is None else found.labels[rows],
        source=data.source,
        fingerprint=fingerprint(images),
        place=found.place,
        class_names=found.class_names,
    )


def fingerprint(images: torch.Tensor) -> str:
    """The sha256 (hex) of the shape and the pixels of uint8 images `(n, c, h, w)`, in order."""
    images = as_images(images)
    digest = hashlib.sha256(f"{tuple(images.shape)}\n".encode())
    digest.update(images.numpy().data)
    return digest.hexdigest()


def read_images(
    path: str | Path, size: int | Sequence[int] | None = None, channels: int | None = None
) -> torch.Tensor:
    """Read an image file, an array file (.npy, .npz) or a folder: uint8 `(n, c, h, w)`.

    `size` and `channels` are as in `Data`.  A folder is read as by the source "folder", without
    splits.  GlannError if anything is missing, damaged or does not fit together.
    """
    target = _target(size, channels)
    path = _user_path(path)
    with _os_errors():
        if path.is_dir():
            files = [file for inside in _by_class(path).values() for file in inside]
        elif not path.is_file():
            raise GlannError(f"{path} is missing; wanted an image, a .npy or .npz file or a folder")
        elif path.suffix.lower() in (".npy", ".npz"):
            return _fit(_read_array(path)[0], target, channels)
        else:
            files = [path]
        return _decode(files, target, channels or _channels(files))


# --- the same for all sources -------------------------------------------------------------------


def _target(size: int | Sequence[int] | None, channels: int | None) -> tuple[int, int] | None:
    """Check what `settings.check` can't express; (height, width) to resize to, or None."""
    if channels not in (None, 1, 3):
        raise GlannError(f"data.channels = {channels}; wanted 1 (grey), 3 (RGB) or none (as it is)")
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(SMALLEST <= side <= LARGEST for side in sides):
        raise GlannError(
            f"data.size = {size}; wanted one number or [height, width], each {SMALLEST} to "
            f"{LARGEST}"
        )
    return sides[0], sides[1]


def _check_split(data: Data, split: str, own_test: bool) -> None:
    if own_test and data.test_fraction > 0:
        raise GlannError(
            f"data.test_fraction = {data.test_fraction}, but the source '{data.source}' has its "
            "own test images here; wanted 0. Take the setting out"
        )
    if not own_test and split == "test" and data.test_fraction == 0:
        raise GlannError(
            f"the source '{data.source}' has no test images of its own here and data.test_fraction "
            "= 0 holds none out; set data.test_fraction, to 0.2 for example"
        )


def _check_labels(found: _Found) -> None:
    if found.labels is None:
        return
    if len(found.labels) != len(found.images):
        raise GlannError(
            f"{found.place} has {len(found.labels)} labels for {len(found.images)} images; wanted "
            "one for each. Copy both again, or take the labels away"
        )
    classes = len(found.class_names)
    if classes and len(found.labels) and int(found.labels.max()) >= classes:
        raise GlannError(
            f"{found.place} has labels up to {int(found.labels.max())}; wanted 0 to {classes - 1}. "
            "These are other images than the source's name says, or the file is damaged"
        )


def _rows(data: Data, split: str, n: int) -> torch.Tensor:
    """Indices of the images that were asked for among n, in order: int64."""
    rows = torch.arange(n)
    if data.test_fraction > 0:
        held_out = round(n * data.test_fraction)
        if not 0 < held_out < n:
            raise GlannError(
                f"data.test_fraction = {data.test_fraction} holds out {held_out} of {n} images; "
                "wanted at least one for training and one for testing. Set another share"
            )
        order = permutation(0, "test split", 0, n)
        rows = (order[:held_out] if split == "test" else order[held_out:]).sort().values
    return rows[: data.limit]


def _check_extent(height: int, width: int) -> None:
    if not (SMALLEST <= height <= LARGEST and SMALLEST <= width <= LARGEST):
        raise GlannError(
            f"the images are {height}×{width}; wanted a height and a width of {SMALLEST} to "
            f"{LARGEST}. Set data.size, to 64 for example"
        )


def _fit(images: torch.Tensor, size: tuple[int, int] | None, channels: int | None) -> torch.Tensor:
    """Give uint8 images `(n, c, h, w)` the size and channels wanted; None leaves them."""
    count, given, height, width = images.shape
    if images.numel() == 0:
        raise GlannError(
            f"{count} images of {height}×{width} were found; wanted at least 1, with pixels. Look "
            "into the files that were given"
        )
    size, channels = size or (height, width), channels or given
    _check_extent(*size)
    if (channels, *size) == (given, height, width):
        return images
    fitted = torch.empty((count, channels, *size), dtype=torch.uint8)
    for i, image in enumerate(images):
        if given == 3 and channels == 1:
            image = _grey(image)
        fitted[i] = resize_and_crop(image, size)  # one grey channel fills all three
    return fitted


def _grey(image: torch.Tensor) -> torch.Tensor:
    """uint8 RGB `(3, h, w)` → `(1, h, w)`, with the weights and rounding that Pillow uses."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32).view(3, 1, 1)
    total = (image.to(torch.int32) * weights).sum(0, keepdim=True)
    return ((total + 2**15) >> 16).to(torch.uint8)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Any step may meet a folder without rights, a dead disk or a name that is too long."""
    try:
        yield
    except OSError as error:
        raise GlannError(
            f"{error.filename or 'a file'} can't be read: {error.strerror or error}. Check its "
            "name, its rights and its disk"
        ) from error


# --- finding and fetching -----------------------------------------------------------------------


@dataclass
class _Search:
    """What is looked for, in which places (best first), and whether the user named them."""

    data: Data
    split: str
    places: list[Path]
    given: bool

    def file(self, *names: str) -> Path | None:
        files = (place / name for place in self.places for name in names)
        return next((file for file in files if file.is_file()), None)

    def missing(self, wanted: str) -> GlannError:
        places = " or ".join(map(str, self.places))
        return GlannError(
            f"data.source = '{self.data.source}': {wanted} not found in {places}. Put the files "
            "there, or say where they are with data.path, --data or GLANN_DATA"
        )


def _user_path(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user


def _search(data: Data, path: str | Path | None, split: str) -> _Search:
    given = data.path if path is None else path
    if given is not None:
        base = _user_path(given)
        # A class of images may well be called "folder": that source's path is always the folder.
        places = [base] if data.source == "folder" else [base / data.source, base]
    else:
        roots = [os.environ.get("GLANN_DATA"), "data"]
        places = [_user_path(root) / data.source for root in roots if root]
    return _Search(data, split, places, given is not None)


def _fetch(search: _Search, wanted: str, what: str, call: Callable[[], Any]) -> Any:
    """Let scikit-learn fetch `what`, unless `wanted` should have been in a place."""
    if search.given or any(place.is_dir() and _visible(place) for place in search.places):
        raise search.missing(wanted)  # images from elsewhere in their stead would be a surprise
    tqdm.write(f"{what}: through scikit-learn, which downloads it once", file=sys.stderr)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return call()
    except Exception as error:  # of urllib, http, gzip, joblib, the ARFF parser, …
        raise GlannError(
            f"{what} could not be fetched through scikit-learn ({type(error).__name__}: {error}). "
            f"Put {wanted} into {search.places[-1]}, or set --data or GLANN_DATA to their folder"
        ) from error


def _openml(search: _Search, wanted: str) -> _Found:
    from sklearn import datasets

    name, train, shape = _OPENML[search.data.source]

    def call() -> tuple[NDArray[Any], NDArray[Any]]:
        bunch = datasets.fetch_openml(name, version=1, as_frame=False, parser="liac-arff")
        expected = (train + _OPENML_TEST, math.prod(shape))
        if bunch.data.shape != expected:
            raise ValueError(f"it came with the shape {bunch.data.shape}, not {expected}")
        return bunch.data, np.asarray(bunch.target).astype(np.int64)

    pixels, labels = _fetch(search, wanted, f"OpenML's {name}", call)
    rows = slice(0, train) if search.split == "train" else slice(train, None)
    return _Found(
        images=torch.from_numpy(pixels[rows].astype(np.uint8).reshape(-1, *shape)),
        labels=torch.from_numpy(labels[rows]),
        place="scikit-learn",
        class_names=_CLASS_NAMES[search.data.source],
    )


# --- digits and faces ---------------------------------------------------------------------------


def _digits(search: _Search) -> _Found:
    """Optical digits: 1797 grey images of 8×8, values 0 to 16."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = to_uint8(torch.from_numpy(digits.images / 16)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return _Found(images, labels, "scikit-learn", _CLASS_NAMES["digits"])


def _faces(search: _Search) -> _Found:
    """Olivetti faces: 400 grey images of 64×64, 40 people."""
    from sklearn import datasets

    if file := _array_file(search):
        return _Found(*_read_array(file, floats=True), str(file))
    wanted = "faces.npy or faces.npz"
    bunch = _fetch(search, wanted, "the Olivetti faces", datasets.fetch_olivetti_faces)
    images = to_uint8(torch.from_numpy(bunch.images)).unsqueeze(1)
    return _Found(images, torch.from_numpy(bunch.target.astype(np.int64)), "scikit-learn")


# --- idx files ----------------------------------------------------------------------------------


def _mnist(search: _Search) -> _Found:
    """MNIST or Fashion-MNIST from their idx files, packed with gzip or not."""
    prefix = "train" if search.split == "train" else "t10k"
    file = search.file(*_idx_names(f"{prefix}-images", "idx3-ubyte"))
    if file is None:
        wanted = f"{prefix}-images-idx3-ubyte(.gz) and {prefix}-labels-idx1-ubyte(.gz)"
        return _openml(search, wanted)
    beside = (file.parent / name for name in _idx_names(f"{prefix}-labels", "idx1-ubyte"))
    labels_file = next((name for name in beside if name.is_file()), None)
    return _Found(
        images=torch.from_numpy(_read_idx(file, 2051)).unsqueeze(1),
        labels=torch.from_numpy(_read_idx(labels_file, 2049)).long() if labels_file else None,
        place=str(file.parent),
        class_names=_CLASS_NAMES[search.data.source],
    )


def _idx_names(stem: str, kind: str) -> list[str]:
    return [f"{stem}{joint}{kind}{ending}" for joint in "-." for ending in ("", ".gz")]


def _read_idx(path: Path, magic: int) -> NDArray[np.uint8]:
    """An idx file of bytes; the magic number (2051 images, 2049 labels) gives the dimensions."""
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):  # whatever its name: some browsers unpack silently
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise GlannError(f"{path} is a damaged gzip file: {error}. Copy it again") from error
    dimensions = magic % 256
    start = 4 * (1 + dimensions)
    if len(content) < start:
        raise GlannError(f"{path} has {len(content)} bytes; wanted an idx file. Copy it again")
    found, *shape = struct.unpack(f">{1 + dimensions}I", content[:start])
    if found != magic:
        raise GlannError(
            f"{path} starts with the magic number {found}; wanted {magic}, an idx file of "
            f"{'images' if dimensions == 3 else 'labels'}. Put the right file there"
        )
    if len(content) - start != math.prod(shape):
        raise GlannError(
            f"{path} has {len(content) - start} bytes after its header; its header says "
            f"{'×'.join(map(str, shape))} = {math.prod(shape)}. Copy it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


# --- CIFAR-10 -----------------------------------------------------------------------------------


def _cifar10(search: _Search) -> _Found:
    """CIFAR-10 from its Python or binary batches."""
    train = search.split == "train"
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    for folder, ending in itertools.product(_cifar10_folders(search), ("", ".bin")):
        files = [folder / f"{name}{ending}" for name in names]
        if all(file.is_file() for file in files):
            batches = map(_read_binary_batch if ending else _read_pickled_batch, files)
            images, labels = map(np.concatenate, zip(*batches, strict=True))
            return _Found(
                images=torch.from_numpy(images.reshape(-1, 3, 32, 32)),
                labels=torch.from_numpy(labels.astype(np.int64)),
                place=str(folder),
                class_names=_CLASS_NAMES["cifar10"],
            )
    return _openml(search, f"{', '.join(names)} (all of them, or all with .bin)")


def _cifar10_folders(search: _Search) -> Iterator[Path]:
    for place in search.places:
        yield from (place, place / "cifar-10-batches-py", place / "cifar-10-batches-bin")


def _read_binary_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(images `(n, 3072)`, labels `(n,)`): records of one label and 3 × 1024 pixels."""
    content = np.fromfile(path, np.uint8)
    if len(content) % 3073:
        raise GlannError(
            f"{path} has {len(content)} bytes; wanted a multiple of 3073, as the binary batches of "
            "CIFAR-10 have. Copy it again"
        )
    records = content.reshape(-1, 3073)
    return records[:, 1:], records[:, 0]


def _read_pickled_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(images `(n, 3072)`, labels `(n,)`) of a Python batch, without running what it asks for."""
    try:
        with path.open("rb") as file:
            batch = _BatchUnpickler(file, encoding="bytes").load()
        # Python 2, which wrote the official files, made the keys bytes.
        batch = {key.decode() if isinstance(key, bytes) else key: batch[key] for key in batch}
        images, labels = batch["data"].array, np.array(batch["labels"], dtype=np.uint8)
        if images.shape != (*labels.shape, 3072):
            raise ValueError(f"its images are {images.shape}, its labels {labels.shape}")
        return images, labels
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise GlannError(
            f"{path} is not a batch of CIFAR-10, or it is damaged ({type(error).__name__}: "
            f"{error}). Nothing that it asks to run was run; copy it again from its source"
        ) from error


class _PickledDtype:
    """Stands in for numpy.dtype, whose own unpickling trusts the file too much."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code = code if isinstance(code, str) else code.decode()

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment: nothing to a byte


class _PickledArray:
    """Stands in for numpy.ndarray: takes the bytes of uint8 arrays and nothing else."""

    def __init__(self, *_: object) -> None:
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, columns_first, content = state
        if dtype.code != "u1":
            raise ValueError(f"an array of type {dtype.code}; wanted uint8")
        self.array = np.frombuffer(content, np.uint8).reshape(
            shape[::-1] if columns_first else shape
        )
        if columns_first:
            self.array = self.array.T


class _BatchUnpickler(pickle.Unpickler):
    """Knows only stand-ins for arrays: a pickle may name any function and have it called."""

    _allowed: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for module.name; UnpicklingError for everything else."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return self._allowed[module, name]


# --- arrays -------------------------------------------------------------------------------------


def _array(search: _Search) -> _Found:
    """A .npy or .npz file of uint8 images."""
    file = _array_file(search)
    if file is None:
        raise search.missing("array.npy or array.npz (or give the path of the file itself)")
    return _Found(*_read_array(file), str(file))


def _array_file(search: _Search) -> Path | None:
    given = next((place for place in search.places if place.is_file()), None)
    return given or search.file(*(f"{search.data.source}{ending}" for ending in (".npy", ".npz")))


def _read_array(path: Path, floats: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(uint8 images `(n, c, h, w)`, labels or None); `floats` also takes floats in [0, 1]."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = {"images": loaded}
        else:
            with loaded:
                arrays = {key: np.asarray(loaded[key]) for key in {"images", "labels"} & {*loaded}}
                keys = ", ".join(loaded) or "none"
    except (
        *(OSError, EOFError, ValueError, SyntaxError, MemoryError, OverflowError),
        *(zipfile.BadZipFile, zlib.error, NotImplementedError),
    ) as error:
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


# --- folders of image files ---------------------------------------------------------------------


def _folder(search: _Search) -> _Found:
    """Image files, flat or by class, with the splits train/ and test/ or without."""
    root = next((place for place in search.places if place.is_dir()), None)
    if root is None:
        raise search.missing("a folder of images")
    own_test = all((root / name).is_dir() for name in SPLITS)
    _check_split(search.data, search.split, own_test)
    # Channels and labels follow from both splits, so that they mean the same in each.
    trees = [_by_class(root / name) for name in SPLITS] if own_test else [_by_class(root)]
    tree = trees[SPLITS.index(search.split)] if own_test else trees[0]
    names = sorted({name for tree in trees for name in tree if name}, key=_natural)
    labels = [names.index(name) for name in tree if name for _ in tree[name]]
    files = [file for tree in trees for inside in tree.values() for file in inside]
    return _Found(
        images=[file for inside in tree.values() for file in inside],
        labels=torch.tensor(labels) if labels else None,
        place=str(root),
        class_names=tuple(names),
        channels=search.data.channels or _channels(files),
    )


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sorts "2.png" before "10.png"; text and numbers alternate, so that they never compare."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _visible(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The image files and the subfolders of a folder in natural order, without hidden ones."""
    entries = sorted(_visible(folder), key=lambda entry: _natural(entry.name))
    files = [file for file in entries if file.suffix.lower() in SUFFIXES and file.is_file()]
    return files, [entry for entry in entries if entry.is_dir()]


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """Image files by the name of their class; a flat folder is one class without a name."""
    flat, folders = _entries(folder)
    classes = {}
    for inner in folders:
        classes[inner.name], deeper = _entries(inner)
        for deep in deeper:
            if _entries(deep)[0]:
                raise GlannError(
                    f"{deep} holds images two folders below {folder}; wanted images in {folder}, "
                    "or one folder for each class. Move them"
                )
    named = any(classes.values())
    if flat and named:
        raise GlannError(
            f"{folder} holds both images ({flat[0].name}) and folders of images; wanted one of the "
            "two: all images together, or each in the folder of its class"
        )
    if not flat and not named:
        raise GlannError(
            f"{folder} holds no images; wanted files that end in {' '.join(SUFFIXES)}, together or "
            "one folder for each class"
        )
    return {"": flat} if flat else classes


def _channels(files: Iterable[Path]) -> int:
    """1 if all files are grey, else 3, from their headers alone."""
    for path in files:
        # What is wrong with a file is told when it is decoded.
        with contextlib.suppress(Exception), Image.open(path) as image:
            if Image.getmodebase(image.mode) != "L":
                return 3
    return 1


def _decode(files: list[Path], size: tuple[int, int] | None, channels: int | None) -> torch.Tensor:
    """Decode image files, in threads, into one uint8 tensor `(n, c, h, w)`."""

    def read(path: Path) -> torch.Tensor:
        image = read_image(path, channels)
        return image if size is None else resize_and_crop(image, size)

    first = read(files[0])
    _check_extent(*first.shape[1:])
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
    bar = tqdm(
        total=len(files),
        desc="decoding",
        unit="image",
        leave=False,
        disable=None if len(files) > PROGRESS_FROM else True,
    )
    pool = ThreadPoolExecutor()
    try:
        with bar:
            for _ in pool.map(put, range(len(files))):
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return images


_READERS: dict[str, Callable[[_Search], _Found]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion-mnist": _mnist,
    "cifar10": _cifar10,
    "faces": _faces,
    "folder": _folder,
    "array": _array,
}
