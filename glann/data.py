"""Image sources: from files, archives and scikit-learn to one uint8 tensor with labels.

Sources differ in where their files are and how they are packed; each has one function here that
finds them.  Splitting, limiting, resizing and checking are the same for all of them.
"""

import contextlib
import io
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from glann import formats, processes
from glann.errors import GlannError
from glann.formats import LARGEST, SMALLEST
from glann.images import to_uint8
from glann.randomness import permutation
from glann.settings import check, setting
from glann.storage import fingerprint

SOURCES = ("digits", "mnist", "fashion-mnist", "cifar10", "faces", "folder", "array")
"""Names of the image sources, and of the folders that their files are looked for in."""

SPLITS = ("train", "test")

OTHER_SPLITS = ("val", "valid", "validation")
"""What others call the images that are not learned from."""

DARK = 64
"""Images without a pixel as bright are told of: they may have been meant to be scaled."""

_CLASS_NAMES = {
    "digits": "0,1,2,3,4,5,6,7,8,9",
    "mnist": "0,1,2,3,4,5,6,7,8,9",
    "fashion-mnist": "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot",
    "cifar10": "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck",
}

# For the sources with test images of their own: OpenML's name (version 1), how many training
# images come first there, before 10000 test images, and the shape of an image.
_OPENML = {
    "mnist": ("mnist_784", 60000, (1, 28, 28)),
    "fashion-mnist": ("Fashion-MNIST", 60000, (1, 28, 28)),
    "cifar10": ("CIFAR_10", 50000, (3, 32, 32)),
}


@dataclass(kw_only=True)
class Data:
    """Which images to learn from: the [data] section of a recipe."""

    source: str = setting("digits", "where the images come from", choices=SOURCES)
    path: str | None = setting(
        None, "where the files are: their folder or its parent; for 'array' also the file itself"
    )
    size: int | list[int] | None = setting(
        None,
        "images are scaled to cover size or [height, width] and cropped to it; none: as they are",
        minimum=SMALLEST,
        maximum=LARGEST,
    )
    channels: int | None = setting(
        None, "1 for grey, 3 for RGB; none: as the images are", minimum=1, maximum=3
    )
    limit: int | None = setting(None, "only the first so many images", minimum=1)
    train_limit: int | None = setting(
        None,
        "only the first so many training images are learned from; scores know the others besides, "
        "as the floor and as what the features' classifier has learned",
        minimum=1,
    )
    test_fraction: float = setting(
        0.0,
        "share of the images held out as test images, for sources without their own",
        minimum=0.0,
        maximum=0.9,
    )
    validation_fraction: float = setting(
        0.0,
        "share of the training images held out in place of the test images, which are left "
        "alone: to choose settings by",
        minimum=0.0,
        maximum=0.9,
    )

    def check_together(self) -> None:
        """Raise GlannError for settings that no images fit."""
        if self.channels == 2:
            raise GlannError("data.channels = 2; wanted 1 (grey), 3 (RGB) or none (as it is)")
        if isinstance(self.size, list) and len(self.size) != 2:
            raise GlannError(f"data.size = {self.size}; wanted one number or [height, width]")
        if self.source != "folder":  # which shows only in its subfolders what it has
            _check_split(self, "train", own_test=self.source in _OPENML)


@dataclass(frozen=True, eq=False)  # a generated == would compare tensors element by element
class Images:
    """The images of one split.

    Attributes:
        images: uint8 `(n, channels, height, width)`, 1 or 3 channels, sides of 8 to 256.
        labels: int64 `(n,)`, or None if the source has none.
        source: one of `SOURCES`.
        fingerprint: what `glann.storage.fingerprint` says of the images.
        place: where they were read from: an absolute path or "scikit-learn".
        class_names: the name of each label; () if there are none.
        note: what looks odd about them, for people, several things joined by "; "; "" if nothing.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    source: str
    fingerprint: str
    place: str
    class_names: tuple[str, ...]
    note: str = ""

    def __len__(self) -> int:
        return len(self.images)


@formats.os_errors()
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
            With `data.validation_fraction`, "test" are training images held out instead.

    Raises:
        GlannError: a setting is wrong, files are missing or damaged, or images don't fit together.
    """
    size = _target(data)
    if split not in SPLITS:
        raise GlannError(f"split = {split!r} is unknown; wanted 'train' or 'test'")
    # Both of them are training images then.
    source_split = "train" if data.validation_fraction > 0 else split
    if data.source != "folder":  # which shows only in its subfolders what it has
        _check_split(data, source_split, own_test=data.source in _OPENML)
    found = _READERS[data.source](_Search(data, path, source_split))
    names = _CLASS_NAMES.get(data.source)
    class_names = tuple(names.split(",")) if names else found.class_names
    _check_labels(found, len(class_names))
    rows = _rows(data, split, len(found.images))
    if isinstance(found.images, list):
        images = formats.decode([found.images[i] for i in rows.tolist()], size, found.channels)
    else:
        images = formats.fit(formats.take(found.images, rows), size, data.channels)
    labels = None if found.labels is None else found.labels[rows].long()
    return Images(
        images,
        labels,
        data.source,
        fingerprint(images),
        found.place,
        class_names,
        note="; ".join(filter(None, (found.note, _dark(images), _grey(images)))),
    )


@formats.os_errors()
def read_images(
    path: str | Path, size: int | Sequence[int] | None = None, channels: int | None = None
) -> torch.Tensor:
    """Read an image file, an array file (.npy, .npz) or a folder: uint8 `(n, c, h, w)`.

    `size` and `channels` are as in `Data`.  A folder is read as by the source "folder", without
    splits.  GlannError if anything is missing, damaged or does not fit together.
    """
    sides = list(size) if isinstance(size, Sequence) else size
    target, path = _target(Data(size=sides, channels=channels)), _user_path(path)
    if path.is_dir():
        files = list(itertools.chain(*formats.files_by_class(path).values()))
    elif not path.is_file():
        raise GlannError(f"{path} is missing; wanted an image, a .npy or .npz file or a folder")
    elif path.suffix.lower() in formats.ARRAYS:
        return formats.fit(formats.read_array(path)[0], target, channels)
    else:
        files = [path]
    return formats.decode(files, target, channels or formats.common_channels(files))


@dataclass
class _Found:
    """What a source gave for a split, before holding out, limiting and resizing.

    `images` is a uint8 tensor `(n, c, h, w)`, or files to decode, once chosen, to `channels`.
    """

    images: torch.Tensor | list[Path]
    labels: torch.Tensor | None
    place: str = "scikit-learn"
    class_names: tuple[str, ...] = ()
    channels: int = 0
    note: str = ""


def _target(data: Data) -> tuple[int, int] | None:
    """Check the settings; (height, width) to resize to, or None."""
    check(data, "data")
    if data.size is None:
        return None
    height, width = [data.size] * 2 if isinstance(data.size, int) else data.size
    return height, width


def _check_split(data: Data, split: str, own_test: bool) -> None:
    fraction = f"data.test_fraction = {data.test_fraction}"
    if own_test and data.test_fraction > 0:
        raise GlannError(
            f"{fraction}, but the source '{data.source}' has its own test images here; wanted 0. "
            "Take the setting out"
        )
    if not own_test and split == "test" and data.test_fraction == 0:
        raise GlannError(
            f"the source '{data.source}' has no test images of its own here and {fraction} holds "
            "none out; set data.test_fraction, to 0.2 for example"
        )


def _check_labels(found: _Found, classes: int) -> None:
    if found.labels is None:
        return
    labels, images = len(found.labels), len(found.images)
    if labels != images:
        raise GlannError(
            f"{found.place} has {labels} labels for {images} images; wanted one for each. Copy "
            "both again, or take the labels away"
        )
    if classes and labels and (largest := int(found.labels.max())) >= classes:
        raise GlannError(
            f"{found.place} has labels up to {largest}; wanted 0 to {classes - 1}. These are other "
            "images than the source's name says, or the file is damaged"
        )


def _some(images: torch.Tensor) -> torch.Tensor:
    """Of many, a thousand are looked at."""
    return images[:: -(-len(images) // 1000)]


def _grey(images: torch.Tensor) -> str:
    """What is said of grey images in colour, as other programs like to save them."""
    if images.shape[1] != 3 or any((image != image[:1]).any() for image in _some(images)):
        return ""
    return "grey images in three channels: data.channels = 1 would take one, which is less to learn"


def _dark(images: torch.Tensor) -> str:
    """What is said of images that are all but black."""
    brightest = 0
    for image in _some(images):
        brightest = max(brightest, int(image.max()))
        if brightest >= DARK:
            return ""
    return f"the brightest pixel is {brightest} of 255: were they meant to be scaled?"


def _rows(data: Data, split: str, n: int) -> torch.Tensor:
    """Indices of the images that were asked for among n, in order: int64."""
    rows, validated = torch.arange(n), data.validation_fraction > 0
    if data.test_fraction > 0:
        rows = _held_out(rows, data, "test", split == "test" and not validated)
    if validated:
        rows = _held_out(rows, data, "validation", split == "test")
    rows = rows[: data.limit]
    return rows[: data.train_limit] if split == "train" else rows


def _held_out(rows: torch.Tensor, data: Data, kind: str, held_out: bool) -> torch.Tensor:
    """Those of `rows` that are held out as `kind`, "test" or "validation", or else the others."""
    fraction, n = getattr(data, f"{kind}_fraction"), len(rows)
    count = round(n * fraction)
    if not 0 < count < n:
        raise GlannError(
            f"data.{kind}_fraction = {fraction} holds out {count} of {n} images; wanted at least "
            f"one for training and one for {kind}. Set another share"
        )
    order = permutation(0, f"{kind} split", 0, n)
    return rows[(order[:count] if held_out else order[count:]).sort().values]


# --- finding and fetching -----------------------------------------------------------------------


def _user_path(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user


def _first(folders: list[Path], names: list[str]) -> Path | None:
    files = (folder / name for folder in folders for name in names)
    return next((file for file in files if file.is_file()), None)


class _Search:
    """What is looked for, in which places (best first), and whether the user named them."""

    def __init__(self, data: Data, path: str | Path | None, split: str) -> None:
        self.data, self.split = data, split
        given = data.path if path is None else path
        self.given = given is not None
        if given is None:
            roots = filter(None, (os.environ.get("GLANN_DATA"), "data"))
            self.places = [_user_path(root).absolute() / data.source for root in roots]
        else:
            base = _user_path(given).absolute()
            # A class of images may well be named "folder": that source's path is the folder.
            self.places = [base] if data.source == "folder" else [base / data.source, base]

    def missing(self, wanted: str) -> GlannError:
        """What to do where `wanted` is in none of the places."""
        return GlannError(f"data.source = '{self.data.source}': {self._reason(wanted)}")

    def _reason(self, wanted: str) -> str:
        last = self.places[-1]  # what was given, if anything was
        if last.suffix.lower() in formats.ARRAYS:
            if last.is_file():
                return f'{last} is an array. To learn from it set data.source = "array"'
            if not last.exists():
                return f"{last} is not there. Mend the path, which data.path or --data gives"
        reason = (
            f"{wanted} not found in {' or '.join(map(str, self.places))}. Put the files there, or "
            "say where they are with data.path, --data or GLANN_DATA"
        )
        for place in self.places:
            if place.is_dir() and formats.holds_images(place):
                return f'{reason}; to learn from the images in {place} set data.source = "folder"'
        return reason

    def fetch(self, wanted: str, what: str, call: Callable[[], _Found]) -> _Found:
        """Let scikit-learn fetch `what`, unless `wanted` should have been in a place."""
        if self.given or any(place.is_dir() and formats.visible(place) for place in self.places):
            raise self.missing(wanted)  # images from elsewhere in their stead would be a surprise
        if processes.is_first():
            tqdm.write(f"{what}: through scikit-learn, which downloads it once", file=sys.stderr)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                return call()
        except Exception as error:  # of urllib, http, gzip, joblib, the ARFF parser, …
            raise GlannError(
                f"{what} could not be fetched through scikit-learn ({type(error).__name__}: "
                f"{error}). Put {wanted} into {self.places[-1]}, or set --data or GLANN_DATA to "
                "their folder"
            ) from error

    def openml(self, wanted: str) -> _Found:
        from sklearn import datasets

        name, train, shape = _OPENML[self.data.source]

        def call() -> _Found:
            bunch = datasets.fetch_openml(name, version=1, as_frame=False, parser="liac-arff")
            pixels = bunch.data.reshape(train + 10000, *shape)
            rows = slice(0, train) if self.split == "train" else slice(train, None)
            labels = np.asarray(bunch.target)[rows].astype(np.int64)
            return _Found(torch.from_numpy(pixels[rows].astype(np.uint8)), torch.from_numpy(labels))

        return self.fetch(wanted, f"OpenML's {name}", call)


# --- the sources --------------------------------------------------------------------------------


def _digits(search: _Search) -> _Found:
    """Optical digits: 1797 grey images of 8×8, values 0 to 16."""
    from sklearn import datasets

    if search.given:  # whoever says where images are wants to learn from these
        place = search.places[-1]
        source = "array" if place.suffix.lower() in formats.ARRAYS else "folder"
        raise GlannError(
            f"data.source = 'digits': {place} was given, but the digits come with scikit-learn. To "
            f'learn from what is there set data.source = "{source}", or else leave --data or '
            "data.path out"
        )
    digits = datasets.load_digits()
    images = to_uint8(torch.from_numpy(digits.images[:, None] / 16))
    return _Found(images, torch.from_numpy(digits.target))


def _mnist(search: _Search) -> _Found:
    """MNIST or Fashion-MNIST from their idx files, packed with gzip or not."""
    prefix = "train" if search.split == "train" else "t10k"
    images, labels = (
        [f"{prefix}-{kind}-ubyte{ending}" for kind in kinds for ending in ("", ".gz")]
        for kinds in (("images-idx3", "images.idx3"), ("labels-idx1", "labels.idx1"))
    )
    file = _first(search.places, images)
    if file is None:
        return search.openml(f"{images[0]}(.gz) and {labels[0]}(.gz)")
    beside = _first([file.parent], labels)
    return _Found(
        images=formats.read_idx(file, 3).unsqueeze(1),
        labels=formats.read_idx(beside, 1) if beside else None,
        place=str(file.parent),
    )


def _cifar10(search: _Search) -> _Found:
    """CIFAR-10 from its Python or binary batches."""
    train = search.split == "train"
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    inner = ("", "cifar-10-batches-py", "cifar-10-batches-bin")
    for place, folder, ending in itertools.product(search.places, inner, ("", ".bin")):
        files = [place / folder / f"{name}{ending}" for name in names]
        if all(file.is_file() for file in files):
            images, labels = zip(*map(formats.read_cifar10, files), strict=True)
            return _Found(torch.cat(images), torch.cat(labels), str(place / folder))
    return search.openml(f"{', '.join(names)} (all of them, or all with .bin)")


def _array(search: _Search) -> _Found:
    """A .npy or .npz file, or else the Olivetti faces: 400 grey images of 64×64, 40 people."""
    from sklearn import datasets

    def call() -> _Found:
        faces = datasets.fetch_olivetti_faces()
        images = to_uint8(torch.from_numpy(faces.images[:, None]))
        return _Found(images, torch.from_numpy(faces.target))

    source, given = search.data.source, [place for place in search.places if place.is_file()]
    file = given[0] if given else _first(search.places, [f"{source}.npy", f"{source}.npz"])
    if file:
        return _Found(*formats.read_array(file, floats=source == "faces"), str(file))
    if source == "array":
        raise search.missing("array.npy or array.npz (or give the path of the file itself)")
    return search.fetch("faces.npy or faces.npz", "the Olivetti faces", call)


def _folder(search: _Search) -> _Found:
    """Image files, flat or by class, with the splits train/ and test/ or without."""
    root = next((place for place in search.places if place.is_dir()), None)
    if root is None:
        raise search.missing("a folder of images")
    own_test = all((root / name).is_dir() for name in SPLITS)
    if own_test:
        _check_beside(root)
    for name in OTHER_SPLITS:  # which hardly is a class beside a class named "train"
        if (root / "train").is_dir() and (root / name).is_dir() and not own_test:
            raise GlannError(
                f"{root} holds train/ and {name}/; wanted train/ and test/, to learn from the one "
                f"and be scored against the other: rename {name}/, or give {root / 'train'} alone"
            )
    _check_split(search.data, search.split, own_test)
    # Channels and labels follow from both splits, so that they mean the same in each.
    trees = [formats.files_by_class(root / name) for name in (SPLITS if own_test else ("",))]
    tree = trees[SPLITS.index(search.split) if own_test else 0]
    names = sorted({name for tree in trees for name in tree if name}, key=formats.natural)
    labels = [names.index(name) for name in tree if name for _ in tree[name]]
    files = (file for tree in trees for inside in tree.values() for file in inside)
    return _Found(
        images=list(itertools.chain(*tree.values())),
        labels=torch.tensor(labels) if labels else None,
        place=str(root),
        class_names=tuple(names),
        channels=search.data.channels or formats.common_channels(files),
        note=formats.left_out(root),
    )


def _check_beside(root: Path) -> None:
    """Refuse images beside train/ and test/, which nothing would be learned from."""
    beside = [entry for entry in formats.visible(root) if entry.name not in SPLITS]
    names = [entry.name for entry in beside if formats.holds_images(entry)]
    if names:
        raise GlannError(
            f"{root} holds train/ and test/, which are taken for the two splits, and images "
            f"beside them: {formats.some_of(sorted(names, key=formats.natural))}. No others may "
            "lie there: move them away or, if all of these are classes, rename train/ or test/"
        )


_READERS = {"digits": _digits, "mnist": _mnist, "fashion-mnist": _mnist, "cifar10": _cifar10}
_READERS |= {"faces": _array, "folder": _folder, "array": _array}
