import dataclasses
import gzip
import pickle
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image

from glann.data import SOURCES, Data, load, read_images
from glann.errors import GlannError
from glann.storage import fingerprint

IDX_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
IDX_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """An empty current folder, no GLANN_DATA, and no way to the network."""
    cwd = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(cwd)
    monkeypatch.delenv("GLANN_DATA", raising=False)
    # pytest.fail is not an Exception, so that no handler turns it into an expected error.
    for name in ("fetch_openml", "fetch_olivetti_faces"):
        monkeypatch.setattr(sklearn.datasets, name, lambda *_, **__: pytest.fail("a download"))
    return cwd


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array):
    magic = 0x800 + array.ndim
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def write_idx(folder, images, labels=None, names=IDX_TRAIN):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_bytes(idx_bytes(images))
    if labels is not None:
        (folder / names[1]).write_bytes(idx_bytes(np.array(labels, dtype=np.uint8)))


def write_image(path, *shape, seed=0, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = pixels(*shape, seed=seed)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "mnits"}, r"data\.source = 'mnits'.*did you mean 'mnist'"),
        ({"size": 7}, r"data\.size = 7.*8 to 256"),
        ({"size": 257}, r"data\.size = 257.*8 to 256"),
        ({"size": [8, 300]}, r"data\.size.*300.*8 to 256"),
        ({"size": [8]}, r"data\.size = \[8\].*\[height, width\]"),
        ({"size": [8, 8, 8]}, r"data\.size = \[8, 8, 8\].*\[height, width\]"),
        ({"channels": 2}, r"data\.channels = 2.*1 \(grey\), 3 \(RGB\)"),
        ({"channels": 4}, r"data\.channels = 4"),
        ({"limit": 0}, r"data\.limit = 0.*at least 1"),
        ({"test_fraction": 0.95}, r"data\.test_fraction = 0\.95.*0.*0\.9"),
        ({"path": 3}, r"data\.path = 3.*text"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(GlannError, match=message):
        load(Data(**settings))


@pytest.mark.parametrize(("given", "source"), [("photos", "folder"), ("mine/x.npz", "array")])
def test_of_a_place_that_is_given_the_digits_are_not_taken(given, source):
    """Whoever gives a place wants to learn from what is there."""
    wanted = rf'{given} was given.*set data\.source = "{source}"'
    with pytest.raises(GlannError, match=wanted):
        load(Data(source="digits"), given)
    with pytest.raises(GlannError, match=wanted):
        load(Data(source="digits", path=given))


def test_every_setting_has_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(Data))


def test_unknown_split():
    with pytest.raises(GlannError, match=r"split = 'val'.*'train' or 'test'"):
        load(Data(), split="val")


# --- digits, splitting, limiting, resizing ------------------------------------------------------


def test_digits():
    digits = load(Data())
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.uint8
    raw = sklearn.datasets.load_digits()
    expected = torch.from_numpy(raw.images * 255 / 16).round().to(torch.uint8)
    assert torch.equal(digits.images[:, 0], expected)
    assert digits.images.max() == 255
    assert digits.labels.dtype == torch.int64
    assert digits.labels.tolist() == raw.target.tolist()
    assert (len(digits), digits.source, digits.place) == (1797, "digits", "scikit-learn")
    assert digits.class_names == tuple("0123456789")
    assert digits.fingerprint == fingerprint(digits.images)


def numbered(folder, n):
    """Array source whose image i is filled with i and whose label is i."""
    images = np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(8, 2).repeat(8, 3)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "array.npz", images=images, labels=np.arange(n))


@pytest.mark.parametrize("fraction", [0.29, 0.5, 0.9])
def test_split_is_disjoint_complete_and_in_order(tmp_path, fraction):
    numbered(tmp_path, 40)
    data = Data(source="array", path=str(tmp_path), test_fraction=fraction)
    train, test = (load(data, split=split) for split in ("train", "test"))
    assert len(test) == round(40 * fraction)
    for part in (train, test):
        assert part.labels.tolist() == sorted(part.labels.tolist())
        assert part.images[:, 0, 0, 0].tolist() == part.labels.tolist()
    assert sorted(train.labels.tolist() + test.labels.tolist()) == list(range(40))
    assert test.labels.tolist() != list(range(len(test)))
    assert test.labels.tolist() != list(range(40 - len(test), 40))


def test_split_stays_the_same_between_versions(tmp_path):
    numbered(tmp_path, 10)
    data = Data(source="array", path=str(tmp_path), test_fraction=0.3)
    assert load(data, split="test").labels.tolist() == [6, 7, 9]


def test_limit_takes_the_first_of_the_split(tmp_path):
    numbered(tmp_path, 40)
    data = Data(source="array", path=str(tmp_path), test_fraction=0.5)
    limited = dataclasses.replace(data, limit=5)
    for split in ("train", "test"):
        whole, part = load(data, split=split), load(limited, split=split)
        assert part.labels.tolist() == whole.labels.tolist()[:5]
        assert part.fingerprint == fingerprint(whole.images[:5])
    assert len(load(dataclasses.replace(data, limit=1000), split="train")) == 20


def test_train_limit_leaves_test_and_validation_images_alone(tmp_path):
    numbered(tmp_path, 40)
    for held_out in ({"test_fraction": 0.25}, {"test_fraction": 0.25, "validation_fraction": 0.2}):
        data = Data(source="array", path=str(tmp_path), **held_out)
        few = dataclasses.replace(data, train_limit=3)
        assert load(few).labels.tolist() == load(data).labels.tolist()[:3]
        assert load(few, split="test").fingerprint == load(data, split="test").fingerprint


def test_validation_images_are_training_images_and_not_trained_on(tmp_path):
    numbered(tmp_path, 40)
    data = Data(source="array", path=str(tmp_path), test_fraction=0.25)
    validated = dataclasses.replace(data, validation_fraction=0.2)
    train, test = (set(load(data, split=split).labels.tolist()) for split in ("train", "test"))
    fitted, held_out = (set(load(validated, split=s).labels.tolist()) for s in ("train", "test"))
    assert len(held_out) == 6
    assert fitted | held_out == train
    assert not (fitted & held_out)
    assert not (held_out & test)


def test_validation_images_of_a_source_with_its_own_test_images(tmp_path):
    for names, n in ((IDX_TRAIN, 10), (IDX_TEST, 4)):
        write_idx(tmp_path, np.full((n, 28, 28), n, np.uint8), names=names)
    data = Data(source="mnist", path=str(tmp_path), validation_fraction=0.3)
    assert [len(load(data, split=split)) for split in ("train", "test")] == [7, 3]
    assert load(data, split="test").images.unique().tolist() == [10]


def test_no_test_images_says_what_to_set():
    with pytest.raises(GlannError, match=r"'digits' has no test images.*set data\.test_fraction"):
        load(Data(), split="test")


@pytest.mark.parametrize("split", ["train", "test"])
def test_test_fraction_that_holds_out_nothing(tmp_path, split):
    numbered(tmp_path, 4)
    data = Data(source="array", path=str(tmp_path), test_fraction=0.1)
    with pytest.raises(GlannError, match=r"test_fraction = 0\.1 holds out 0 of 4"):
        load(data, split=split)


@pytest.mark.parametrize("source", ["mnist", "fashion-mnist", "cifar10"])
def test_test_fraction_beside_official_test_images(source):
    with pytest.raises(GlannError, match=r"test_fraction = 0\.2.*own test images"):
        load(Data(source=source, test_fraction=0.2))


@pytest.mark.parametrize(("size", "sides"), [(16, (16, 16)), ([10, 20], (10, 20))])
def test_size_scales_to_cover_and_crops(size, sides):
    assert load(Data(size=size, limit=3)).images.shape == (3, 1, *sides)


def test_channels():
    assert load(Data(limit=5, channels=3)).images.shape == (5, 3, 8, 8)


# --- where files are looked for -----------------------------------------------------------------


def marked(folder, value):
    """An MNIST folder by whose first pixel it can be told from others."""
    write_idx(folder, np.full((1, 8, 8), value, dtype=np.uint8))


def test_order_of_places(tmp_path, monkeypatch, alone):
    monkeypatch.setenv("GLANN_DATA", str(tmp_path / "env"))
    marked(alone / "data" / "mnist", 4)
    marked(tmp_path / "env" / "mnist", 3)
    marked(tmp_path / "setting" / "mnist", 2)
    marked(tmp_path / "argument", 1)
    marked(tmp_path / "argument" / "mnist", 0)

    def found(data, path=None):
        images = load(data, path)
        return int(images.images[0, 0, 0, 0]), images.place

    with_setting = Data(source="mnist", path=str(tmp_path / "setting"))
    named = tmp_path / "argument" / "mnist"
    assert found(with_setting, tmp_path / "argument") == (0, str(named))
    assert found(with_setting, str(named)) == (0, str(named))
    (named / IDX_TRAIN[0]).unlink()
    assert found(with_setting, tmp_path / "argument") == (1, str(tmp_path / "argument"))
    assert found(with_setting)[0] == 2
    assert found(Data(source="mnist"))[0] == 3
    monkeypatch.setenv("GLANN_DATA", str(tmp_path / "elsewhere"))
    assert found(Data(source="mnist")) == (4, str(Path.cwd() / "data" / "mnist"))


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "digits"])
@pytest.mark.parametrize("by_argument", [True, False])
def test_a_given_place_without_the_files_is_never_replaced(tmp_path, alone, source, by_argument):
    marked(alone / "data" / source, 1)
    missing = tmp_path / "missing"
    data = Data(source=source, path=None if by_argument else str(missing))
    with pytest.raises(GlannError, match=rf"'{source}'.*not found in .*missing.*--data") as caught:
        load(data, missing if by_argument else None)
    wanted = {
        "mnist": IDX_TRAIN,
        "fashion-mnist": IDX_TRAIN,
        "cifar10": (*BATCHES, ".bin"),
        "faces": ("faces.npy", "faces.npz"),
        "folder": ("a folder of images",),
        "array": ("array.npy", "array.npz"),
    }[source]
    assert all(name in str(caught.value) for name in wanted)


def test_other_split_missing_is_not_fetched(alone):
    marked(alone / "data" / "mnist", 1)
    with pytest.raises(GlannError, match=r"t10k-images-idx3-ubyte.*not found"):
        load(Data(source="mnist"), split="test")


def test_places_are_found_again_from_another_folder(alone, tmp_path, monkeypatch):
    write_image(alone / "photos" / "x.png", 8, 8)
    np.save(alone / "x.npy", pixels(2, 1, 8, 8))
    marked(alone / "mine", 1)
    for source, path in (("folder", "photos"), ("array", "x.npy"), ("mnist", "mine")):
        monkeypatch.chdir(alone)
        images = load(Data(source=source), path)
        assert images.place == str(Path.cwd() / path)
        monkeypatch.chdir(tmp_path)
        assert load(Data(source=source), images.place).fingerprint == images.fingerprint


def test_an_array_that_is_not_there(tmp_path):
    for source in ("array", "folder", "faces", "mnist"):
        with pytest.raises(GlannError, match=rf"'{source}': \S+missing\.npy is not there\. Mend"):
            load(Data(source=source), tmp_path / "missing.npy")


@pytest.mark.parametrize("source", ["folder", "mnist", "cifar10"])
def test_an_array_for_another_source(tmp_path, source):
    np.save(tmp_path / "r1.npy", pixels(2, 1, 8, 8))
    message = rf'\'{source}\': \S+r1\.npy is an array.*set data\.source = "array"$'
    with pytest.raises(GlannError, match=message):
        load(Data(source=source), tmp_path / "r1.npy")


@pytest.mark.parametrize("source", ["array", "mnist", "cifar10"])
def test_images_for_another_source(tmp_path, source):
    write_image(tmp_path / "cats" / "x.png", 8, 8)
    message = r'not found in .*; to learn from the images in \S+ set data\.source = "folder"$'
    with pytest.raises(GlannError, match=message):
        load(Data(source=source), tmp_path)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    marked(tmp_path / "mine", 5)
    assert load(Data(source="mnist", path="~/mine")).images[0, 0, 0, 0] == 5
    with pytest.raises(GlannError, match="not found"):
        load(Data(source="mnist", path="~nobody-of-that-name/mine"))


def test_errors_of_the_operating_system_do_not_leak():
    with pytest.raises(GlannError, match="can't be read"):
        load(Data(source="mnist", path="x" * 300))
    with pytest.raises(GlannError, match="can't be read"):
        read_images("x" * 300)


# --- idx files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("joint", ["-", "."])
def test_idx(tmp_path, source, packed, joint):
    for seed, prefix in enumerate(("train", "t10k")):
        images, labels = pixels(5, 8, 9, seed=seed), np.arange(5, dtype=np.uint8) + seed
        for kind, array in (("images{}idx3", images), ("labels{}idx1", labels)):
            content = idx_bytes(array)
            name = f"{prefix}-{kind.format(joint)}-ubyte" + (".gz" if packed else "")
            (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    for seed, split in enumerate(("train", "test")):
        found = load(Data(source=source), tmp_path, split)
        assert torch.equal(found.images, torch.from_numpy(pixels(5, 8, 9, seed=seed))[:, None])
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == [seed + i for i in range(5)]
        assert found.class_names[1] == {"mnist": "1", "fashion-mnist": "Trouser"}[source]
        assert len(found.class_names) == 10


def test_idx_unpacked_under_its_packed_name(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(idx_bytes(pixels(2, 8, 8)))
    found = load(Data(source="mnist"), tmp_path)
    assert len(found) == 2
    assert found.labels is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [([1, 2], r"2 labels for 3 images"), ([1, 2, 10], r"labels up to 10; wanted 0 to 9")],
)
def test_labels_that_do_not_fit(tmp_path, labels, message):
    write_idx(tmp_path, pixels(3, 8, 8), labels)
    with pytest.raises(GlannError, match=message):
        load(Data(source="mnist"), tmp_path)


# --- CIFAR-10 -----------------------------------------------------------------------------------


def write_cifar10(folder, kind, n=2):
    """Five training batches and a test batch of n images each; returns images and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = pixels(6, n, 3, 32, 32), np.arange(6 * n).reshape(6, n) % 10
    for name, x, y in zip([*BATCHES, "test_batch"], images, labels.tolist(), strict=True):
        rows = x.reshape(n, 3072)
        if kind == "binary":
            records = np.concatenate([np.array(y, dtype=np.uint8)[:, None], rows], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": y}, protocol=4))
    return torch.from_numpy(images), torch.from_numpy(labels)


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, kind, inner):
    images, labels = write_cifar10(tmp_path / inner, kind)
    train = load(Data(source="cifar10"), tmp_path)
    assert torch.equal(train.images, images[:5].flatten(0, 1))
    assert train.labels.tolist() == labels[:5].flatten().tolist()
    assert train.class_names[::9] == ("airplane", "truck")
    assert train.place == str(tmp_path / inner)
    test = load(Data(source="cifar10"), tmp_path, "test")
    assert torch.equal(test.images, images[5])
    assert test.labels.tolist() == labels[5].tolist()


def test_cifar10_wants_every_batch(tmp_path):
    write_cifar10(tmp_path, "binary")
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(GlannError, match=r"data_batch_3.*all of them"):
        load(Data(source="cifar10"), tmp_path)


def test_labels_of_other_images_than_cifar10(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(b"\x0a" * 3073)
    with pytest.raises(GlannError, match="labels up to 10"):
        load(Data(source="cifar10"), tmp_path, "test")


# --- arrays and faces ---------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_array(tmp_path, ending):
    array, file = pixels(4, 9, 10, 3), tmp_path / f"mine{ending}"
    np.save(file, array) if ending == ".npy" else np.savez_compressed(file, images=array)
    found = load(Data(source="array", path=str(file)))
    assert torch.equal(found.images, torch.from_numpy(array).permute(0, 3, 1, 2))
    assert (found.labels, found.class_names, found.place) == (None, (), str(file))
    assert torch.equal(read_images(file), found.images)


def test_array_labels_follow_the_images(tmp_path):
    np.savez(tmp_path / "array.npz", images=pixels(3, 8, 8), labels=np.array([7, 100, -2], "int16"))
    found = load(Data(source="array"), tmp_path)
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == [7, 100, -2]
    np.savez(tmp_path / "array.npz", images=pixels(2, 8, 8), labels=np.zeros(3, int))
    with pytest.raises(GlannError, match="3 labels for 2 images"):
        load(Data(source="array"), tmp_path)


def test_floats_are_for_faces_alone(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros((2, 1, 8, 8)))
    with pytest.raises(GlannError, match="dtype float64; wanted uint8"):
        load(Data(source="array"), tmp_path)
    with pytest.raises(GlannError, match="dtype float64; wanted uint8"):
        read_images(tmp_path / "array.npy")


@pytest.mark.parametrize("size", [None, 8])
def test_files_without_images(tmp_path, size):
    write_idx(tmp_path, pixels(0, 8, 8))
    (tmp_path / "test_batch.bin").write_bytes(b"")
    np.save(tmp_path / "array.npy", pixels(2, 1, 0, 8))
    for source, split in (("mnist", "train"), ("cifar10", "test"), ("array", "train")):
        with pytest.raises(GlannError, match="wanted at least 1, with pixels"):
            load(Data(source=source, size=size), tmp_path, split)


def test_images_of_a_size_that_generators_cannot_make(tmp_path):
    np.save(tmp_path / "array.npy", pixels(2, 1, 300, 8))
    with pytest.raises(GlannError, match=r"300×8.*8 to 256.*data\.size"):
        load(Data(source="array"), tmp_path)


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_faces_from_a_file(tmp_path, ending):
    floats = np.linspace(0, 1, 2 * 64 * 64, dtype=np.float32).reshape(2, 64, 64)
    file = tmp_path / "faces" / f"faces{ending}"
    file.parent.mkdir()
    np.save(file, floats) if ending == ".npy" else np.savez(file, images=floats, labels=[3, 4])
    found = load(Data(source="faces"), tmp_path)
    assert torch.equal(found.images[:, 0], torch.from_numpy(floats * 255).round().to(torch.uint8))
    assert found.place == str(file)
    assert found.labels is None if ending == ".npy" else found.labels.tolist() == [3, 4]
    np.save(tmp_path / "faces" / "faces.npy", pixels(2, 64, 64))
    assert torch.equal(
        load(Data(source="faces"), tmp_path).images[:, 0], torch.from_numpy(pixels(2, 64, 64))
    )


# --- fetching -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "train", "shape"),
    [
        ("mnist", "mnist_784", 60000, (1, 28, 28)),
        ("fashion-mnist", "Fashion-MNIST", 60000, (1, 28, 28)),
        ("cifar10", "CIFAR_10", 50000, (3, 32, 32)),
    ],
)
def test_openml(monkeypatch, capsys, source, name, train, shape):
    # Zeros cost no memory until touched: 70000 real rows would take hundreds of megabytes.
    total = train + 10000
    rows = np.zeros((total, int(np.prod(shape))), dtype=np.uint8)
    rows[0], rows[train] = np.arange(rows.shape[1]) % 256, 9
    target = np.full(total, "0", dtype=object)
    target[0], target[train] = "5", "7"
    calls = []

    def fetch_openml(*arguments, **keywords):
        calls.append((arguments, keywords))
        warnings.warn("the fetcher's own", UserWarning, stacklevel=1)
        sys.stdout.write("the fetcher's own")
        return SimpleNamespace(data=rows, target=target)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    first = load(Data(source=source, limit=2))
    assert torch.equal(
        first.images[0].flatten(), torch.arange(rows.shape[1]).remainder(256).to(torch.uint8)
    )
    assert first.images.shape == (2, *shape)
    assert first.labels.tolist() == [5, 0]
    assert first.place == "scikit-learn"
    test = load(Data(source=source), split="test")
    assert len(test) == 10000
    assert (test.images[0] == 9).all()
    assert test.labels[:2].tolist() == [7, 0]
    assert calls[0] == ((name,), {"version": 1, "as_frame": False, "parser": "liac-arff"})
    assert "the fetcher's own" not in "".join(capsys.readouterr())


def test_openml_with_other_data_than_expected(monkeypatch):
    other = SimpleNamespace(data=pixels(100, 784), target=np.zeros(100))
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", lambda *_, **__: other)
    with pytest.raises(
        GlannError, match=r"reshape.*\(70000,1,28,28\).*Put train-images-idx3-ubyte"
    ):
        load(Data(source="mnist"))


def test_faces_are_fetched(monkeypatch):
    floats = np.linspace(0, 1, 400 * 64, dtype=np.float32).reshape(400, 8, 8)
    people = SimpleNamespace(images=floats, target=np.arange(400) // 10)
    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", lambda: people)
    found = load(Data(source="faces", test_fraction=0.2), split="train")
    assert len(found) == 320
    assert found.images.max() == 255
    assert found.labels.max() == 39
    assert found.place == "scikit-learn"


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("mnist", IDX_TRAIN),
        ("fashion-mnist", IDX_TRAIN),
        ("cifar10", BATCHES),
        ("faces", ("faces.npy",)),
    ],
)
@pytest.mark.parametrize(
    "error", [URLError("no route"), ValueError("md5"), EOFError("cut"), KeyError("data")]
)
def test_failed_fetch_says_what_to_do(monkeypatch, alone, source, wanted, error):
    def fail(*_, **__):
        warnings.warn("retrying", RuntimeWarning, stacklevel=1)
        raise error

    for name in ("fetch_openml", "fetch_olivetti_faces"):
        monkeypatch.setattr(sklearn.datasets, name, fail)
    (alone / "data" / source).mkdir(parents=True)
    (alone / "data" / source / ".gitkeep").touch()
    with pytest.raises(GlannError, match=r"could not be fetched.*--data or GLANN_DATA") as caught:
        load(Data(source=source))
    message = str(caught.value)
    assert type(error).__name__ in message
    assert str(Path("data") / source) in message
    assert all(name in message for name in wanted)


MEMORY = """
import sys
from pathlib import Path
from glann.data import Data, load, read_images

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

load(Data())  # what is imported on the way
before = held()
kept = [load(Data(source="array", path=sys.argv[1], limit=limit)).images for limit in (None, 99999)]
kept.append(read_images(sys.argv[1]))
assert [len(images) for images in kept] == [100_000, 99_999, 100_000]
assert held() - before < 40, held() - before  # MB; the images have 78
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory it gave")
def test_an_array_takes_no_memory(tmp_path):
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (100_000, 28, 28)).flush()
    code = [sys.executable, "-c", MEMORY, str(tmp_path / "x.npy")]
    subprocess.run(code, check=True)


def test_a_folder_larger_than_memory_is_as_any_other(tmp_path, monkeypatch):
    for i in range(10):
        write_image(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", 8, 8, seed=i)
    monkeypatch.setenv("GLANN_CACHE", str(tmp_path / "cache"))
    data = Data(source="folder", path=str(tmp_path / "photos"), test_fraction=0.3)
    wanted = load(data), load(data, split="test")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("glann.formats.IN_MEMORY", 0)
    found = load(data), load(data, split="test")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.fingerprint == other.fingerprint


# --- folders ------------------------------------------------------------------------------------


def test_flat_folder_in_natural_order(tmp_path):
    images = {n: write_image(tmp_path / f"{n}.png", 8, 8, 3, seed=n) for n in (10, 9, 100, 1)}
    found = load(Data(source="folder", path=str(tmp_path)))
    assert torch.equal(found.images, torch.stack([images[n] for n in (1, 9, 10, 100)]))
    assert (found.labels, found.class_names, found.place) == (None, (), str(tmp_path))


def test_folder_by_class(tmp_path):
    cat = write_image(tmp_path / "cats" / "x.png", 8, 8, seed=1)
    dogs = [write_image(tmp_path / "dogs" / f"{n}.png", 8, 8, seed=n) for n in (2, 11)]
    owl = write_image(tmp_path / "Owls" / "x.png", 8, 8, seed=4)
    found = load(Data(source="folder"), tmp_path)
    assert found.class_names == ("Owls", "cats", "dogs")
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == [0, 1, 2, 2]
    assert torch.equal(found.images, torch.stack([owl, cat, *dogs]))


def test_a_class_may_have_the_name_of_the_source(tmp_path):
    write_image(tmp_path / "folder" / "x.png", 8, 8)
    write_image(tmp_path / "file" / "x.png", 8, 8)
    assert load(Data(source="folder"), tmp_path).class_names == ("file", "folder")


def test_default_folder(alone):
    write_image(alone / "data" / "folder" / "x.png", 8, 8)
    assert len(load(Data(source="folder"))) == 1


def test_train_and_test_folders(tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "train/b/1.png", "test/b/0.png", "test/c/0.png"):
        write_image(tmp_path / name, 8, 8, seed=len(name))
    train, test = (load(Data(source="folder"), tmp_path, split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert train.labels.tolist() == [0, 1, 1]
    assert test.labels.tolist() == [1, 2]
    with pytest.raises(GlannError, match=r"test_fraction = 0\.5.*own test images"):
        load(Data(source="folder", test_fraction=0.5), tmp_path)


@pytest.mark.parametrize("beside", ["val/0.png", "val/a/0.png", "0.png"])
def test_images_beside_train_and_test_are_refused(tmp_path, beside):
    for name in ("train/0.png", "test/0.png", ".cache/0.png"):
        write_image(tmp_path / name, 8, 8)
    (tmp_path / "labels").mkdir()
    (tmp_path / "README.md").touch()
    assert len(load(Data(source="folder"), tmp_path)) == 1
    write_image(tmp_path / beside, 8, 8)
    name = Path(beside).parts[0]
    message = rf"train/ and test/.* the two splits, and images beside them: {name}\. No others may"
    for split in ("train", "test"):
        with pytest.raises(GlannError, match=message):
            load(Data(source="folder"), tmp_path, split)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_no_class_beside_train(tmp_path, name):
    for folder in ("train", name):
        write_image(tmp_path / folder / "0.png", 8, 8)
    with pytest.raises(GlannError, match=rf"train/ and {name}/; wanted .* rename {name}/, or give"):
        load(Data(source="folder"), tmp_path)
    (tmp_path / name).rename(tmp_path / "test")
    assert len(load(Data(source="folder"), tmp_path)) == 1


def test_train_folder_alone_is_a_class(tmp_path):
    write_image(tmp_path / "train" / "0.png", 8, 8)
    assert load(Data(source="folder"), tmp_path).class_names == ("train",)
    with pytest.raises(GlannError, match=r"set data\.test_fraction"):
        load(Data(source="folder"), tmp_path, "test")


def test_folder_split_by_fraction(tmp_path):
    for i in range(10):
        write_image(tmp_path / "ab"[i % 2] / f"{i}.png", 8, 8, seed=i)
    data = Data(source="folder", path=str(tmp_path), test_fraction=0.3)
    train, test, whole = load(data), load(data, split="test"), load(Data(source="folder"), tmp_path)
    assert (len(train), len(test)) == (7, 3)
    parts = torch.cat([train.images, test.images])
    order = [next(i for i in range(10) if torch.equal(parts[i], image)) for image in whole.images]
    assert sorted(order) == list(range(10))
    assert torch.equal(torch.cat([train.labels, test.labels])[order], whole.labels)


def test_channels_of_a_folder(tmp_path):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", 8, 8, seed=i)
    write_image(tmp_path / "3.png", 8, 8, mode="LA")
    write_image(tmp_path / "4.png", 8, 8, mode="1")
    grey = load(Data(source="folder"), tmp_path).images
    assert grey.shape == (5, 1, 8, 8)
    colour = write_image(tmp_path / "9.png", 8, 8, 3)
    mixed = load(Data(source="folder"), tmp_path).images
    assert torch.equal(mixed[:5], grey.expand(-1, 3, -1, -1))
    assert torch.equal(mixed[5], colour)
    assert load(Data(source="folder", channels=1), tmp_path).images.shape == (6, 1, 8, 8)
    # One recipe must give as many channels in each split, whichever images fall into it.
    assert load(Data(source="folder", limit=2), tmp_path).images.shape == (2, 3, 8, 8)


def test_channels_follow_from_both_splits(tmp_path):
    write_image(tmp_path / "train" / "0.png", 8, 8)
    write_image(tmp_path / "test" / "0.png", 8, 8, 3)
    for split in ("train", "test"):
        assert load(Data(source="folder"), tmp_path, split).images.shape == (1, 3, 8, 8)


def test_mixed_sizes(tmp_path):
    write_image(tmp_path / "a.png", 8, 9)
    write_image(tmp_path / "b.png", 8, 9)
    write_image(tmp_path / "c.png", 10, 12)
    with pytest.raises(GlannError, match=r"a\.png is 8×9 and .*c\.png is 10×12.*data\.size"):
        load(Data(source="folder"), tmp_path)
    assert load(Data(source="folder", size=[8, 9]), tmp_path).images.shape == (3, 1, 8, 9)
    assert load(Data(source="folder", limit=2), tmp_path).images.shape == (2, 1, 8, 9)


def test_a_file_is_no_folder(tmp_path):
    write_image(tmp_path / "x.png", 8, 8)
    with pytest.raises(GlannError, match=r"a folder of images not found in .*x\.png"):
        load(Data(source="folder"), tmp_path / "x.png")


# --- notes --------------------------------------------------------------------------------------


def test_nothing_to_note(tmp_path):
    write_image(tmp_path / "x.png", 8, 8)
    assert load(Data(source="folder"), tmp_path).note == ""
    assert load(Data()).note == ""


def test_files_left_out_are_noted_for_both_splits(tmp_path):
    for name in ("train/0", "test/0"):
        write_image(tmp_path / f"{name}.png", 8, 8)
        (tmp_path / f"{name}.heic").touch()
    for split in ("train", "test"):
        found = load(Data(source="folder"), tmp_path, split)
        assert found.note == "2 other files left out: .heic"


def test_grey_images_in_colour_are_noted(tmp_path):
    grey = pixels(3, 1, 8, 8)
    for name, images, noted in (
        ("grey", grey, False),
        ("colour", grey.repeat(3, axis=1), True),
        ("last", np.concatenate([grey.repeat(3, axis=1), pixels(1, 3, 8, 8)]), False),
    ):
        np.save(tmp_path / f"{name}.npy", images)
        found = load(Data(source="array"), tmp_path / f"{name}.npy")
        assert ("data.channels = 1" in found.note) == noted
    taken = load(Data(source="array", channels=1), tmp_path / "colour.npy")
    assert taken.note == ""
    assert np.array_equal(taken.images, grey)


@pytest.mark.parametrize(("top", "noted"), [(1, True), (63, True), (64, False)])
def test_dark_images_are_noted(tmp_path, top, noted):
    np.save(tmp_path / "x.npy", np.minimum(pixels(3, 1, 8, 8), top))
    wanted = f"the brightest pixel is {top} of 255: were they meant to be scaled?" if noted else ""
    assert load(Data(source="array"), tmp_path / "x.npy").note == wanted


def test_images_of_12_bits_in_16_are_noted_beside_files_left_out(tmp_path):
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "x.png")
    (tmp_path / "y.heic").touch()
    wanted = "1 other file left out: .heic; the brightest pixel is 15 of 255: were they meant to be"
    assert load(Data(source="folder"), tmp_path).note == f"{wanted} scaled?"


def test_a_thousand_images_are_looked_at_for_dark_ones(tmp_path):
    images = np.zeros((2001, 1, 8, 8), np.uint8)
    images[1999] = 255  # every third is looked at
    np.save(tmp_path / "x.npy", images)
    assert "brightest pixel is 0 of" in load(Data(source="array"), tmp_path / "x.npy").note
    images[1998] = 255
    np.save(tmp_path / "x.npy", images)
    assert load(Data(source="array"), tmp_path / "x.npy").note == ""


# --- read_images --------------------------------------------------------------------------------


def test_read_images_of_one_file(tmp_path):
    image = write_image(tmp_path / "x.png", 8, 9, 3)
    assert torch.equal(read_images(tmp_path / "x.png"), image[None])
    assert read_images(str(tmp_path / "x.png"), size=(16, 8), channels=1).shape == (1, 1, 16, 8)


def test_read_images_of_a_folder(tmp_path):
    first = write_image(tmp_path / "a" / "2.png", 8, 8, seed=1)
    second = write_image(tmp_path / "a" / "10.png", 8, 8, seed=2)
    assert torch.equal(read_images(tmp_path / "a"), torch.stack([first, second]))
    assert torch.equal(read_images(tmp_path), torch.stack([first, second]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", r"missing\.png is missing; wanted"),
        ("notes.txt", r"notes\.txt can't be read as an image"),
        ("empty", r"empty holds no images"),
    ],
)
def test_read_images_errors(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GlannError, match=message):
        read_images(tmp_path / name)
