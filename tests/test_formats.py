import errno
import gzip
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from glann import formats
from glann.errors import GlannError
from glann.formats import (
    common_channels,
    decode,
    files_by_class,
    fit,
    holds_images,
    left_out,
    os_errors,
    read_array,
    read_cifar10,
    read_idx,
    take,
)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array):
    magic = 0x800 + array.ndim
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def python2_pickle(images, labels, columns_first=False):
    """What Python 2's NumPy wrote at protocol 2, as the official CIFAR-10 batches are."""

    def text(content):
        return b"T" + struct.pack("<i", len(content)) + content

    raw = images.tobytes("F" if columns_first else "C")
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\1\x87R(K\3" + text(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xff" * 2 + b"K\0tb"
    shape = b"".join(b"J" + struct.pack("<i", side) for side in images.shape) + b"\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    )
    array += b"(K\1" + shape + dtype + (b"\x88" if columns_first else b"\x89") + text(raw) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\2}(" + text(b"data") + array + text(b"labels") + listed + b"u."


def write_image(path, *shape, seed=0, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = pixels(*shape, seed=seed)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)


def test_errors_of_the_operating_system_are_told(tmp_path):
    message = r"nowhere can't be read: No such file.*Check its name"
    with pytest.raises(GlannError, match=message), os_errors():
        read_idx(tmp_path / "nowhere", 3)
    with pytest.raises(GlannError, match="a file can't be read: odd"), os_errors():
        raise OSError("odd")


# --- more than memory is to hold ----------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the cache, with no room for images in memory."""
    monkeypatch.setattr(formats, "IN_MEMORY", 0)
    monkeypatch.setenv("GLANN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path):
    for i in range(9):
        write_image(tmp_path / f"{i}.png", 10, 12, 3, seed=i)
    return [tmp_path / f"{i}.png" for i in range(9)]


def made_in_three_ways(photos):
    """Images as `decode`, `fit` and `take` give them: (how, images)."""
    some = torch.from_numpy(pixels(9, 3, 10, 12))
    yield "decode", decode(photos, (8, 9), 1)
    yield "fit", fit(some, (8, 9), 1)
    yield "take", take(some, torch.tensor([0, 2, 3, 8]))


def test_images_from_the_cache_are_those_in_memory(photos, cache, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(formats, "IN_MEMORY", 2**31)
        wanted = dict(made_in_three_ways(photos))
    assert not cache.exists()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(formats, "_AT_ONCE", 2)
    for _ in range(2):
        for how, images in made_in_three_ways(photos):
            assert torch.equal(images, wanted[how]), how
        files = sorted(cache.iterdir())
        assert len(files) == 3
    # Told once: the second time they were there.
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert all(any(str(file) in line for line in told) for file in files)
    assert "GLANN_CACHE" in told[0]


def test_what_is_in_the_cache_is_not_decoded_again(photos, cache, monkeypatch):
    decode(photos, None, 3)
    read, first = formats.read_image, []
    monkeypatch.setattr(formats, "read_image", lambda *a: first.append(a[0]) or read(*a))
    decode(photos, None, 3)
    assert first == photos[:1]


def test_grey_and_colour_of_one_array_are_two_files_of_the_cache(cache):
    images = torch.randint(256, (40, 3, 12, 12), dtype=torch.uint8)
    colour, grey = (formats.fit(images, (9, 9), channels) for channels in (3, 1))
    assert colour.shape[1:] == (3, 9, 9)
    assert grey.shape[1:] == (1, 9, 9)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("what", ["content", "order", "size", "channels"])
def test_other_images_are_other_files_of_the_cache(photos, cache, what):
    before = decode(photos, None, 3)
    size, channels, files = None, 3, photos
    if what == "content":
        write_image(photos[4], 10, 12, 3, seed=99)
        os.utime(photos[4], ns=(1, 1))
    elif what == "order":
        files = photos[::-1]
    elif what == "size":
        size = (9, 9)
    else:
        channels = 1
    images = decode(files, size, channels)
    assert images.shape != before.shape or not torch.equal(images, before)
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_image_leaves_nothing_in_the_cache(photos, cache):
    for bad in (7, 3):
        photos[bad].write_bytes(b"no image")
    message = r"2 of 9 images in .* read: 3\.png, 7\.png\. The first: .*3\.png can't be read as"
    with pytest.raises(GlannError, match=message):
        decode(photos, None, 3)
    assert list(cache.iterdir()) == []


def test_a_disk_without_room_for_the_images(photos, cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(formats, "reserve", full)
    with pytest.raises(GlannError, match=r"images-\w+\.npy can't be written: No space left"):
        decode(photos, None, 3)
    assert "GLANN_CACHE" in capsys.readouterr().err  # where another place is set
    assert list(cache.iterdir()) == []


def test_what_a_killed_process_left_in_the_cache_goes_after_a_day(photos, cache):
    cache.mkdir()
    old, young, other = (cache / name for name in (".images-a.npy.x", ".images-b.npy.x", "other"))
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    decode(photos, None, 3)
    assert not old.exists()
    assert young.exists()
    assert other.exists()


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_mapped_and_its_file_is_never_changed(tmp_path, order):
    array = np.asarray(pixels(5, 1, 8, 9), order=order)
    np.save(tmp_path / "x.npy", array)
    before = (tmp_path / "x.npy").read_bytes()
    images, _ = read_array(tmp_path / "x.npy")
    assert torch.equal(images, torch.from_numpy(array))
    images.zero_()
    assert (tmp_path / "x.npy").read_bytes() == before


@pytest.mark.parametrize(
    ("rows", "is_view"),
    [([], True), ([0, 1], True), ([1, 2, 3], True), ([4], True), ([0, 2], False), ([1, 4], False)],
)
def test_rows_that_follow_each_other_are_not_copied(rows, is_view):
    images = torch.from_numpy(pixels(5, 1, 8, 8))
    taken = take(images, torch.tensor(rows, dtype=torch.int64))
    assert torch.equal(taken, images[rows])
    shared = taken.untyped_storage().data_ptr() == images.untyped_storage().data_ptr()
    assert shared == is_view


# --- size and channels --------------------------------------------------------------------------


def test_nothing_is_done_to_images_that_fit():
    images = torch.from_numpy(pixels(2, 3, 8, 9))
    assert fit(images, None, None) is images
    assert fit(images, (8, 9), 3) is images


@pytest.mark.parametrize("sides", [(16, 16), (10, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_fit(sides, channels):
    images = torch.from_numpy(pixels(3, 1, 8, 8))
    assert fit(images, sides, channels).shape == (3, channels, *sides)


def test_fit_crops_the_middle():
    images = torch.zeros((1, 1, 8, 24), dtype=torch.uint8)
    images[..., 8:16] = 255
    assert (fit(images, (8, 8), None) == 255).all()


def test_grey_to_rgb_repeats_the_channel():
    grey = torch.from_numpy(pixels(5, 1, 8, 8))
    assert torch.equal(fit(grey, None, 3), grey.expand(-1, 3, -1, -1))


def test_rgb_to_grey_is_as_for_files(tmp_path):
    names = [tmp_path / f"{i}.png" for i in range(3)]
    colour = torch.stack([write_image(name, 16, 16, 3, seed=i) for i, name in enumerate(names)])
    from_tensor = fit(colour, None, 1)
    assert from_tensor.shape == (3, 1, 16, 16)
    assert torch.equal(from_tensor, decode(names, None, 1))


@pytest.mark.parametrize("shape", [(2, 1, 7, 9), (2, 1, 9, 7), (2, 1, 257, 8), (2, 1, 8, 257)])
def test_images_of_a_size_that_generators_cannot_make(shape):
    images = torch.from_numpy(pixels(*shape))
    with pytest.raises(GlannError, match=rf"{shape[2]}×{shape[3]}.*8 to 256.*data\.size"):
        fit(images, None, None)
    assert fit(images, (8, 8), None).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("size", [None, (8, 8)])
@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 1, 0, 8)])
def test_no_pixels(shape, size):
    with pytest.raises(GlannError, match=rf"{shape[0]} images of {shape[2]}×8.*at least 1, with"):
        fit(torch.empty(shape, dtype=torch.uint8), size, None)


# --- idx files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "images.gz"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", [(5, 8, 9), (5,), (0, 8, 8)])
def test_idx(tmp_path, name, packed, shape):
    content = idx_bytes(pixels(*shape))
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    found = read_idx(tmp_path / name, len(shape))
    assert torch.equal(found, torch.from_numpy(pixels(*shape)))


IDX = idx_bytes(pixels(3, 8, 8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (IDX[:15], "15 bytes"),
        (IDX[:-1], r"191 bytes.*3×8×8 = 192"),
        (IDX + b"\0", r"193 bytes.*= 192"),
        (struct.pack(">4I", 2051, 2**32 - 1, 2**32 - 1, 2**32 - 1), "0 bytes after its header"),
        (idx_bytes(pixels(300)), r"magic number 2049; wanted 2051, an idx file of images"),
        (gzip.compress(IDX, mtime=0)[:-20], "damaged gzip"),
        (gzip.compress(IDX, mtime=0)[:40] + b"\0" * 40, "damaged gzip"),
    ],
)
def test_damaged_idx(tmp_path, content, message):
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(GlannError, match=message):
        read_idx(tmp_path / "images", 3)


@hypothesis_settings(max_examples=60, deadline=None, database=None)
@given(st.data())
def test_any_damage_to_idx_is_a_glann_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged-idx"
    content = bytearray(data.draw(st.sampled_from([IDX, gzip.compress(IDX, mtime=0)])))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        array = read_idx(path, 3)
    except GlannError:
        return
    assert array.shape.numel() == 192


# --- CIFAR-10 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "python 2", "python 2 columns", "python 3"])
def test_cifar10(tmp_path, kind):
    images, labels = pixels(4, 3, 32, 32), [3, 0, 9, 7]
    rows, file = images.reshape(4, 3072), tmp_path / "batch"
    if kind == "binary":
        file = tmp_path / "batch.bin"
        file.write_bytes(np.insert(rows, 0, labels, axis=1).tobytes())
    elif kind == "python 3":
        file.write_bytes(pickle.dumps({"data": rows, "labels": labels}, protocol=4))
    else:
        file.write_bytes(python2_pickle(rows, labels, columns_first="columns" in kind))
    found, found_labels = read_cifar10(file)
    assert torch.equal(found, torch.from_numpy(images))
    assert found_labels.dtype == torch.int64
    assert found_labels.tolist() == labels


class Malicious:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(6))
def test_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    trace = tmp_path / "trace"
    (tmp_path / "test_batch").write_bytes(
        pickle.dumps({"data": Malicious(open, str(trace), "w")}, protocol)
    )
    with pytest.raises(GlannError, match=r"asks for \S+open, which is refused"):
        read_cifar10(tmp_path / "test_batch")
    assert not trace.exists()


@pytest.mark.parametrize("function", [eval, getattr, np.load, np.frombuffer, bytearray])
def test_pickle_may_name_nothing_but_its_arrays(tmp_path, function):
    (tmp_path / "test_batch").write_bytes(pickle.dumps(Malicious(function, b"")))
    with pytest.raises(GlannError, match="refused"):
        read_cifar10(tmp_path / "test_batch")


def batch(**changed):
    return {"data": pixels(2, 3072), "labels": [1, 2], **changed}


@pytest.mark.parametrize(
    "content",
    [
        batch(data=pixels(2, 3071)),
        batch(data=pixels(3, 3072)),
        batch(data=pixels(2, 3072).astype(np.float32)),
        batch(data=pixels(2, 3072).view(np.int8)),
        batch(data=np.array([None, b""], dtype=object)),
        batch(data=b""),
        batch(data=None),
        batch(labels=[1, 300]),
        batch(labels=[1, -1]),
        batch(labels=[[1], [2]]),
        batch(labels=["a", "b"]),
        batch(labels=None),
        {"data": pixels(2, 3072)},
        {},
        [],
        None,
    ],
)
def test_pickle_that_is_no_batch(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(GlannError, match=r"test_batch is not a batch of CIFAR-10"):
        read_cifar10(tmp_path / "test_batch")


def test_a_pickle_that_would_fill_the_memory_is_refused(tmp_path):
    # {} as part number 2³¹ − 1 of a list that is made as long: tens of gigabytes.
    (tmp_path / "test_batch").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(GlannError, match=r"numbers a part 2147483647, in 9 bytes"):
        read_cifar10(tmp_path / "test_batch")


@hypothesis_settings(max_examples=80, deadline=None, database=None)
@given(st.data())
def test_any_damage_to_a_batch_is_a_glann_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged-batch"
    content = bytearray(python2_pickle(pixels(1, 3072), [7]))
    # The pixels fill the middle: damage what surrounds them.
    position = data.draw(st.one_of(st.integers(0, 150), st.integers(len(content) - 30, None)))
    position = min(position, len(content) - 1)
    content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), position + 1]))])
    try:
        images, labels = read_cifar10(path)
    except GlannError:
        return
    assert images.shape == (len(labels), 3, 32, 32)


def test_damaged_binary_batch(tmp_path):
    (tmp_path / "batch.bin").write_bytes(b"\1" * 3072)
    with pytest.raises(GlannError, match=r"3072 bytes; wanted a multiple of 3073"):
        read_cifar10(tmp_path / "batch.bin")
    (tmp_path / "batch.bin").write_bytes(b"")
    assert read_cifar10(tmp_path / "batch.bin")[0].shape == (0, 3, 32, 32)


# --- arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axes", "channels"),
    [
        ((4, 9, 10), None, 1),
        ((4, 1, 9, 10), None, 1),
        ((4, 3, 9, 10), None, 3),
        ((4, 9, 10, 3), (0, 3, 1, 2), 3),
        ((4, 9, 10, 1), (0, 3, 1, 2), 1),
    ],
)
@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_array_layouts(tmp_path, shape, axes, channels, ending):
    array, file = pixels(*shape), tmp_path / f"mine{ending}"
    np.save(file, array) if ending == ".npy" else np.savez_compressed(file, images=array)
    expected = torch.from_numpy(array.transpose(axes) if axes else array)
    images, labels = read_array(file)
    assert torch.equal(images, expected.reshape(4, channels, 9, 10))
    assert images.is_contiguous()
    assert labels is None


def test_array_with_labels(tmp_path):
    np.savez(tmp_path / "x.npz", images=pixels(3, 8, 8), labels=np.array([7, 100, -2], "int16"))
    _, labels = read_array(tmp_path / "x.npz")
    assert labels.dtype == torch.int64
    assert labels.tolist() == [7, 100, -2]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 1, 8, 8), np.float32), r"dtype float32; wanted uint8.*\* 255"),
        (np.zeros((2, 1, 8, 8), np.int64), r"dtype int64; wanted uint8"),
        (np.zeros((2, 1, 8, 8), bool), r"dtype bool; wanted uint8"),
        (np.zeros((2, 1, 8, 8), "U1"), r"dtype <U1; wanted uint8"),
        (np.zeros((2, 8, 8, 2), np.uint8), r"\(2, 8, 8, 2\); wanted \(n, channels"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\); wanted \(n, channels"),
        (np.zeros((), np.uint8), r"\(\); wanted \(n, channels"),
        (np.zeros((2, 3, 8, 3), np.uint8), r"\(2, 3, 8, 3\).*two places"),
        (np.zeros((32, 32, 3), np.uint8), r"\(32, 32, 3\).*two places"),
        (np.array([None, {}]), "without objects"),
    ],
)
def test_arrays_that_are_not_images(tmp_path, array, message):
    np.save(tmp_path / "array.npy", array, allow_pickle=True)
    with pytest.raises(GlannError, match=message):
        read_array(tmp_path / "array.npy")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": pixels(2, 8, 8), "y": pixels(2)}, r"keys: x, y; wanted 'images'"),
        ({}, r"keys: none; wanted 'images'"),
        ({"images": pixels(2, 8, 8), "labels": np.zeros(2)}, r"float64.*wanted integers"),
        ({"images": pixels(2, 8, 8), "labels": np.zeros((2, 1), int)}, r"\(2, 1\).*wanted integer"),
    ],
)
def test_wrong_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "array.npz", **arrays)
    with pytest.raises(GlannError, match=message):
        read_array(tmp_path / "array.npz")


@pytest.mark.parametrize("ending", [".npy", ".npz"])
@pytest.mark.parametrize("damage", ["empty", "text", "half", "header"])
def test_damaged_array_files(tmp_path, ending, damage):
    file = tmp_path / f"array{ending}"
    array = pixels(50, 8, 8)
    np.save(file, array) if ending == ".npy" else np.savez_compressed(file, images=array)
    whole = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "text": b"images",
            "half": whole[: len(whole) // 2],
            "header": whole[:9] + b"\xff" * 20 + whole[29:],
        }[damage]
    )
    with pytest.raises(GlannError, match="can't be read as an array"):
        read_array(file)


def test_array_header_that_asks_for_all_memory(tmp_path):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,), }"
    header = header.ljust(117) + b"\n"
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    (tmp_path / "array.npy").write_bytes(content)
    with pytest.raises(GlannError, match="can't be read as an array"):
        read_array(tmp_path / "array.npy")


def test_floats_on_demand(tmp_path):
    floats = np.linspace(0, 1, 2 * 64 * 64, dtype=np.float32).reshape(2, 64, 64)
    np.save(tmp_path / "x.npy", floats)
    images, _ = read_array(tmp_path / "x.npy", floats=True)
    assert torch.equal(images[:, 0], torch.from_numpy(floats * 255).round().to(torch.uint8))


@pytest.mark.parametrize("value", [1.01, -0.01, np.nan])
def test_floats_outside_the_range(tmp_path, value):
    np.save(tmp_path / "x.npy", np.full((1, 8, 8), value))
    with pytest.raises(GlannError, match=r"floats outside \[0, 1\]"):
        read_array(tmp_path / "x.npy", floats=True)


# --- image files --------------------------------------------------------------------------------


def test_files_in_natural_order(tmp_path):
    for name in ("10.png", "9.png", "100.png", "1.png", ".hidden.png", "a2.PNG", "a10.Tiff"):
        write_image(tmp_path / name, 8, 8)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    (classes,) = files_by_class(tmp_path).items()
    assert classes[0] == ""
    wanted = ["1.png", "9.png", "10.png", "100.png", "a2.PNG", "a10.Tiff"]
    assert [file.name for file in classes[1]] == wanted


def test_files_by_class(tmp_path):
    for name in ("c10/x.png", "c2/2.png", "c2/11.png", ".c1/x.png", "c2/.thumbs/x.png"):
        write_image(tmp_path / name, 8, 8)
    (tmp_path / "c1").mkdir()
    assert files_by_class(tmp_path) == {
        "c2": [tmp_path / "c2" / "2.png", tmp_path / "c2" / "11.png"],
        "c10": [tmp_path / "c10" / "x.png"],
    }


def test_folders_that_cannot_be_read_in_one_way(tmp_path):
    with pytest.raises(GlannError, match=r"holds no images; wanted files that end in \.png"):
        files_by_class(tmp_path)
    write_image(tmp_path / "cats" / "small" / "x.png", 8, 8)
    with pytest.raises(GlannError, match=r"small holds images two folders below"):
        files_by_class(tmp_path)
    write_image(tmp_path / "dogs" / "x.png", 8, 8)
    (tmp_path / "cats" / "small" / "x.png").unlink()
    write_image(tmp_path / "y.png", 8, 8)
    with pytest.raises(GlannError, match=r"both images \(y\.png\) and folders of images"):
        files_by_class(tmp_path)


def test_files_that_are_left_out_are_counted(tmp_path):
    for name in ("a/0.png", "a/1.HEIC", "b/2.heic", "b/raw/3.cr2", "b/IMG 4", "LICENSE", "x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "a/.5.heic", "README.md", "labels.csv"):
        (tmp_path / name).touch()
    assert left_out(tmp_path) == "4 other files left out: .heic, .cr2, IMG 4"
    assert left_out(tmp_path / "a") == "1 other file left out: .heic"
    for i in range(6):
        (tmp_path / f"{i}.e{i}").touch()
    wanted = "10 other files left out: .heic, .cr2, .e0, .e1, .e2 and 4 more"
    assert left_out(tmp_path) == wanted
    (tmp_path / "a" / "1.HEIC").unlink()
    assert left_out(tmp_path / "a") == ""


def test_a_folder_without_images_tells_what_it_has(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.heic").touch()
    with pytest.raises(GlannError, match=r"no images \(5 other files left out: \.heic\); wanted"):
        files_by_class(tmp_path)


def test_holds_images(tmp_path):
    for name in ("a/notes.txt", "a/.b/x.png", "b/cats/x.PNG", "x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    held = [holds_images(tmp_path / name) for name in ("a", "a/notes.txt", "b", "x.jpg", "y.jpg")]
    assert held == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("L", 1), ("LA", 1), ("1", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)],
)
def test_channels_that_all_files_need(tmp_path, mode, channels):
    write_image(tmp_path / "0.png", 8, 8)
    (tmp_path / "1.png").write_bytes(b"damaged")
    write_image(tmp_path / "2.png", 8, 8, mode=mode)
    assert common_channels([tmp_path / f"{i}.png" for i in range(3)]) == channels


def test_decode(tmp_path):
    grey = write_image(tmp_path / "0.png", 8, 9)
    colour = write_image(tmp_path / "1.png", 8, 9, 3)
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    decoded = decode(files, None, 3)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, torch.stack([grey.expand(3, -1, -1), colour]))
    assert decode(files, (16, 12), 1).shape == (2, 1, 16, 12)


def test_mixed_sizes(tmp_path):
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for file, height in zip(files, (8, 8, 10), strict=True):
        write_image(file, height, 9)
    with pytest.raises(GlannError, match=r"a\.png is 8×9 and .*c\.png is 10×9.*data\.size"):
        decode(files, None, 1)
    assert decode(files, (8, 9), 1).shape == (3, 1, 8, 9)


def test_photos_need_a_size(tmp_path):
    write_image(tmp_path / "a.png", 300, 40)
    with pytest.raises(GlannError, match=r"300×40.*data\.size"):
        decode([tmp_path / "a.png"], None, 1)


@pytest.fixture
def damaged(tmp_path):
    """30 image files of two classes, and a function that damages some: (files, damage)."""
    files = [tmp_path / "ab"[i // 15] / f"{i}.png" for i in range(30)]
    for file in files:
        write_image(file, 8, 8)

    def damage(*numbers):
        for i in numbers:
            files[i].write_bytes(files[i].read_bytes()[:50])

    return files, damage


def test_all_unreadable_images_are_told_of_at_once(tmp_path, damaged):
    files, damage = damaged
    damage(20, 7)
    with pytest.raises(GlannError) as caught:
        decode(files, None, 1)
    names = " ".join(str(Path(name)) for name in ("a/7.png,", "b/20.png."))
    message = str(caught.value)
    assert message.startswith(f"2 of 30 images in {tmp_path} can't be read: {names} The first: ")
    assert f"{files[7]} can't be read as an image: " in message
    assert message.endswith(". Delete or mend them")
    damage(*range(8))
    with pytest.raises(GlannError, match=r"9 of 30 .*[/\\]4\.png and 4 more\. The first: .*0\.png"):
        decode(files, None, 1)
    damage(*range(30))
    with pytest.raises(GlannError, match=r"30 of 30 .*[/\\]4\.png and 25 more\."):
        decode(files, None, 1)


def test_one_unreadable_image_is_named(damaged):
    files, damage = damaged
    damage(0)
    message = r"^\S*[/\\]0\.png can't be read as an image: .*\. Delete or mend it$"
    with pytest.raises(GlannError, match=message):
        decode(files, None, 1)
    # Given by itself it may be anything.
    with pytest.raises(GlannError, match=r"0\.png can't be read as an image") as caught:
        decode(files[:1], None, 1)
    assert "Delete" not in str(caught.value)


def test_sizes_are_compared_with_the_first_that_can_be_read(damaged):
    files, damage = damaged
    damage(0)
    write_image(files[9], 10, 8)
    with pytest.raises(GlannError, match=r"[/\\]1\.png is 8×8 and \S+[/\\]9\.png is 10×8"):
        decode(files, None, 1)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("n", [5, 6])
def test_progress_only_on_a_terminal_and_for_many(tmp_path, monkeypatch, capsys, terminal, n):
    monkeypatch.setattr(formats, "PROGRESS_FROM", 5)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    files = [tmp_path / f"{i}.png" for i in range(n)]
    for file in files:
        write_image(file, 8, 8)
    decode(files, None, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("decoding" in err) == (terminal and n == 6)
    monkeypatch.setattr(formats.processes, "is_first", lambda: False)
    decode(files, None, 1)
    assert capsys.readouterr().err == ""
