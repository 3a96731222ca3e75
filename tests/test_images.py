import errno
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from glann import images as module
from glann.errors import GlannError
from glann.images import (
    as_images,
    check_output,
    crop,
    grid,
    interleave,
    moved,
    pad,
    read_image,
    resize_and_crop,
    save_array,
    save_grid,
    save_images,
    side_by_side,
    to_float,
    to_uint8,
    write_png,
)


def random_images(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def rgb(seed: int, height: int = 7, width: int = 5) -> np.ndarray:
    return random_images(seed, height, width, 3).numpy()


# ---------------------------------------------------------------------- ranges


def test_every_grey_level_survives_the_floats():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = to_float(levels)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (0, 1)
    assert floats.shape == levels.shape
    assert torch.equal(to_uint8(floats), levels)
    assert torch.equal(levels, torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16))


def test_floats_are_rounded_and_clipped():
    floats = torch.tensor([-1e9, -0.1, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.2, torch.inf])
    before = floats.clone()
    assert to_uint8(floats).tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert torch.equal(to_uint8(floats.numpy()), to_uint8(floats))
    assert torch.equal(floats, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_precision_become_uint8(dtype):
    floats = torch.tensor([0, 0.5, 1], dtype=dtype, requires_grad=True)
    assert to_uint8(floats).tolist() == [0, 128, 255]


# ---------------------------------------------------------------------- as_images


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_and_tensors_are_taken(channels):
    wanted = random_images(0, 4, channels, 6, 5)
    array = wanted.numpy().copy()
    read_only = array.copy()
    read_only.flags.writeable = False
    reversed_twice = np.ascontiguousarray(array[::-1])[::-1]
    transposed = wanted.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for given_images in (wanted, array, read_only, reversed_twice, transposed):
        found = as_images(given_images)
        assert torch.equal(found, wanted)
        assert found.is_contiguous()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([[1]], "batch is a list; wanted a NumPy array or a tensor"),
        (None, "batch is a NoneType"),
        (np.zeros((2, 1, 3, 3)), "batch has dtype float64; wanted uint8"),
        (torch.zeros(2, 1, 3, 3), r"batch has dtype float32; wanted uint8.*to_uint8"),
        (np.zeros((2, 1, 3, 3), np.int64), "dtype int64"),
        (np.zeros((2, 1, 3, 3), ">f4"), "dtype >f4"),
        (np.full((2, 1, 3, 3), "x"), "dtype <U1"),
        (np.full((2, 1, 3, 3), None), "dtype object"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.bool), "dtype bool"),
        (np.zeros((2, 3, 3), np.uint8), r"batch has shape \(2, 3, 3\); wanted .*array\[:, None\]"),
        (np.zeros((2, 3, 3, 1), np.uint8)[:, :2], r"shape \(2, 2, 3, 1\).*transpose\(0, 3, 1, 2\)"),
        (np.zeros((2, 4, 3, 3), np.uint8), r"shape \(2, 4, 3, 3\)"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, message):
    with pytest.raises(GlannError, match=message):
        as_images(images, "batch")


# ---------------------------------------------------------------------- reading


@given(
    seed=st.integers(0, 1000),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
)
@settings(deadline=None, max_examples=30)
def test_png_round_trip(tmp_path_factory, seed, channels, height, width):
    path = tmp_path_factory.getbasetemp() / "round.png"
    image = random_images(seed, channels, height, width)
    write_png(image, path)
    assert torch.equal(read_image(path), image)
    with Image.open(path) as opened:
        assert opened.format == "PNG"
        assert opened.size == (width, height)


def luma(pixels: np.ndarray) -> np.ndarray:
    """ITU-R 601-2, which Pillow uses."""
    return pixels @ np.array([0.299, 0.587, 0.114])


def test_grey_and_rgb_on_demand(tmp_path):
    pixels = rgb(1)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "grey.png")
    grey = read_image(tmp_path / "rgb.png", 1)
    assert grey.shape == (1, 7, 5)
    np.testing.assert_allclose(grey[0].numpy(), luma(pixels), atol=1)
    assert torch.equal(read_image(tmp_path / "rgb.png", 3), torch.tensor(pixels).permute(2, 0, 1))
    three = read_image(tmp_path / "grey.png", 3)
    assert torch.equal(three, torch.tensor(pixels[:, :, 0]).expand(3, 7, 5))
    assert torch.equal(read_image(tmp_path / "grey.png", 1), three[:1])


def test_black_and_white_becomes_0_and_255(tmp_path):
    Image.fromarray(rgb(2)[:, :, 0] > 127).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png")
    assert torch.equal(found[0], torch.tensor(rgb(2)[:, :, 0] > 127).byte() * 255)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """α x + (1 − α) white, in the pixels' own unit."""
    return (pixels * (alpha / 255.0) + 255 * (1 - alpha / 255.0)).round()


def test_what_is_transparent_is_laid_on_white(tmp_path):
    pixels, alpha = rgb(3), rgb(4)[:, :, 0]
    colour, grey = Image.fromarray(pixels), Image.fromarray(pixels[:, :, 0])
    for image, name in ((colour, "rgba"), (grey, "la")):
        image.putalpha(Image.fromarray(alpha))
        image.save(tmp_path / f"{name}.png")
    found = read_image(tmp_path / "rgba.png").permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, on_white(pixels, alpha[:, :, None]), atol=1)
    np.testing.assert_allclose(
        read_image(tmp_path / "la.png")[0].numpy(), on_white(pixels[:, :, 0], alpha), atol=1
    )


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 200, 10))])
@pytest.mark.parametrize("ending", ["png", "gif"])
def test_palette_images_have_their_colours(tmp_path, transparency, ending):
    palette = rgb(5, 1, 20)[0]
    indices = np.random.default_rng(0).integers(0, 20, (7, 5), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    more = {} if transparency is None or ending == "gif" else {"transparency": transparency}
    image.save(tmp_path / f"x.{ending}", **more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_image(tmp_path / f"x.{ending}")
    alpha = np.full(20, 255)
    if isinstance(more.get("transparency"), bytes):
        alpha[:] = list(more["transparency"]) + [255] * (20 - len(more["transparency"]))
    elif more:
        alpha[more["transparency"]] = 0
    wanted = on_white(palette, alpha[:, None])[indices]
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), wanted, atol=1)


@pytest.mark.parametrize("kind", ["png", "little-endian tiff", "big-endian tiff", "pgm"])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_16_bit_grey_keeps_its_upper_byte(tmp_path, kind, channels):
    pixels = np.random.default_rng(1).integers(0, 2**16, (7, 5), dtype=np.uint16)
    path = tmp_path / f"x.{kind[-4:].strip()}"
    if kind == "pgm":  # Pillow reads it as 32-bit numbers
        path.write_bytes(b"P5 5 7 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels.astype(">u2") if kind.startswith("big") else pixels).save(path)
    found = read_image(path, channels)
    assert found.shape == (channels or 1, 7, 5)
    assert all(np.array_equal(plane.numpy(), pixels >> 8) for plane in found)


def test_grey_floats_are_taken_from_0_to_1(tmp_path):
    grey = np.random.default_rng(1).random((7, 5), dtype=np.float32)
    Image.fromarray(grey).save(tmp_path / "x.tiff")
    found = read_image(tmp_path / "x.tiff")
    np.testing.assert_allclose(found[0].numpy() / 255, grey, atol=1 / 255)


@pytest.mark.parametrize("value", [-0.5, 1.5, 200.0, np.nan])
def test_grey_floats_out_of_range_are_refused(tmp_path, value):
    grey = np.full((3, 3), 0.5, dtype=np.float32)
    grey[1, 1] = value
    Image.fromarray(grey).save(tmp_path / "x.tiff")
    with pytest.raises(GlannError, match=r"x\.tiff can't be read .* wanted 0 to 1$"):
        read_image(tmp_path / "x.tiff")


UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""What EXIF's orientation asks for: 6, say, is a camera held so that up is at the right."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("depth", [8, 16])
def test_images_are_turned_upright(tmp_path, orientation, depth):
    pixels = rgb(6) if depth == 8 else rgb(6)[:, :, 0].astype(np.uint16) * 256
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    found = read_image(tmp_path / "x.png").permute(1, 2, 0).numpy()
    wanted = UPRIGHT[orientation](rgb(6))
    assert np.array_equal(found, wanted if depth == 8 else wanted[:, :, :1])


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (5, 7), (255, 0, 0, 0)).save(tmp_path / "x.jpg")
    found = read_image(tmp_path / "x.jpg")
    assert found.shape == (3, 7, 5)
    assert found[0].max() < 20
    assert found[1:].min() > 230


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "webp", "tif"])
def test_a_file_that_was_cut_short_is_refused(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    Image.fromarray(rgb(7, 24, 24)).save(path)
    whole = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in range(0, len(whole) * 2 // 3, max(1, len(whole) // 40)):
            path.write_bytes(whole[:length])
            with pytest.raises(GlannError, match=f"x.{ending} can't be read as an image"):
                read_image(path)


@pytest.mark.parametrize("change", [0x01, 0x20, 0xFF])
def test_wherever_a_png_is_damaged_there_is_no_other_error(tmp_path, change):
    path = tmp_path / "damaged.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb(8, 3, 4)).save(path, exif=exif)
    whole = path.read_bytes()
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= change
            path.write_bytes(damaged)
            try:
                assert read_image(path).dtype == torch.uint8
            except GlannError:
                refused += 1
    assert refused > len(whole) / 2  # PNG has checksums


def test_a_file_that_would_swell_is_refused(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    Image.fromarray(rgb(8)).save(tmp_path / "text.png", pnginfo=text)

    Image.fromarray(rgb(8)).save(tmp_path / "size.png")
    content = bytearray((tmp_path / "size.png").read_bytes())
    content[16:24] = struct.pack(">II", 50_000, 50_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "size.png").write_bytes(content)

    for name in ("text.png", "size.png"):
        with pytest.raises(GlannError, match=f"{name} can't be read as an image"):
            read_image(tmp_path / name)


def test_what_is_no_image_is_refused_by_name(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    for name in ("text.png", "folder.png", "missing.png"):
        with pytest.raises(GlannError, match=f"{name} can't be read as an image"):
            read_image(tmp_path / name)


# ---------------------------------------------------------------------- sizes


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    extra=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    channels=st.sampled_from([1, 3]),
)
@settings(deadline=None, max_examples=60)
def test_crop_undoes_pad(shape, extra, channels):
    images = torch.rand(2, channels, *shape) + 0.1
    size = (shape[0] + extra[0], shape[1] + extra[1])
    padded = pad(images, size)
    assert padded.shape == (2, channels, *size)
    assert torch.equal(crop(padded, shape), images)
    assert padded.count_nonzero() == images.count_nonzero()  # zeros around, nothing else
    rows, columns = padded[0, 0].nonzero().unbind(1)
    for found, side in ((rows, 0), (columns, 1)):
        before, after = found.min(), size[side] - 1 - found.max()
        assert abs(before - after) <= 1  # evenly


@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    channels=st.sampled_from([1, 3]),
    ways=st.lists(st.tuples(*[st.floats(0, 0.999)] * 2), min_size=1, max_size=3),
)
def test_moved_images_are_seen_through_a_window_that_repeats_the_edge(shape, channels, ways):
    images = torch.rand(len(ways), channels, *shape)
    most = [side // 9 for side in shape]
    padded = F.pad(images, (most[1], most[1], most[0], most[0]), mode="replicate")
    seen = moved(images, torch.tensor(ways, dtype=torch.float64))
    for image, whole, way in zip(seen, padded, ways, strict=True):
        top, left = (int(w * (2 * m + 1)) for w, m in zip(way, most, strict=True))
        assert torch.equal(image, whole[:, top : top + shape[0], left : left + shape[1]])


def test_gradients_go_to_the_pixels_that_are_seen():
    images = torch.rand(1, 1, 9, 9, requires_grad=True)
    moved(images, torch.tensor([[0.0, 0.5]])).sum().backward()
    wanted = torch.ones(9, 9)
    wanted[0], wanted[8] = 2, 0  # the first row is repeated, the last one is out of sight
    assert images.grad is not None
    assert torch.equal(images.grad[0, 0], wanted)


def test_no_images_are_moved_to_none():
    assert moved(torch.rand(0, 3, 18, 20), torch.rand(0, 2)).shape == (0, 3, 18, 20)


def test_resizing_covers_and_crops_the_middle():
    image = random_images(9, 3, 6, 18)
    assert torch.equal(resize_and_crop(image, (6, 6)), image[:, :, 6:12])
    tall = image.permute(0, 2, 1).contiguous()
    assert torch.equal(resize_and_crop(tall, (6, 6)), tall[:, 6:12])
    assert torch.equal(resize_and_crop(image, (6, 18)), image)
    assert torch.equal(resize_and_crop(image[:1], (6, 6)), image[:1, :, 6:12])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(4, 8), (8, 4), (5, 5), (40, 30), (1, 1)])
def test_resized_images_keep_colours_and_sides(channels, size):
    image = torch.zeros(channels, 32, 32, dtype=torch.uint8)
    image[:, :, 16:] = 200
    resized = resize_and_crop(image, size)
    assert resized.shape == (channels, *size)
    assert resized.dtype == torch.uint8
    if min(size) >= 4:  # Lanczos overshoots a little at an edge
        assert resized[:, :, 0].max() < 20
        assert torch.all((resized[:, :, -1].int() - 200).abs() < 20)
    flat = torch.full((channels, 7, 9), 33, dtype=torch.uint8)
    assert torch.all(resize_and_crop(flat, size) == 33)


# ---------------------------------------------------------------------- grids


@given(
    n=st.integers(1, 12),
    columns=st.integers(1, 14) | st.none(),
    gap=st.integers(0, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    channels=st.sampled_from([1, 3]),
)
@settings(deadline=None, max_examples=60)
def test_every_image_is_in_its_place(n, columns, gap, size, channels):
    images = random_images(10, n, channels, *size)
    sheet = grid(images, columns, gap)
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    rows = -(-n // columns)
    factor, rest = divmod(sheet.shape[2] - gap * (columns + 1), columns * size[1])
    assert factor >= 1
    assert rest == 0
    height, width = size[0] * factor, size[1] * factor
    assert sheet.shape == (channels, rows * height + gap * (rows + 1), sheet.shape[2])
    elsewhere = torch.ones(sheet.shape[1:], dtype=torch.bool)
    for i in range(n):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        place = sheet[:, top : top + height, left : left + width]
        for dy in range(factor):
            for dx in range(factor):
                assert torch.equal(place[:, dy::factor, dx::factor], images[i])
        elsewhere[top : top + height, left : left + width] = False
    assert torch.all(sheet[:, elsewhere] == 128)


def test_small_images_are_magnified_and_large_ones_are_not():
    assert grid(random_images(0, 64, 1, 8, 8)).shape[2] > 300
    assert grid(random_images(0, 1, 3, 600, 600), gap=0).shape == (3, 600, 600)


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(GlannError, match="grid of 0 images"):
        grid(torch.empty(0, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(GlannError, match="dtype float32"):
        grid(torch.rand(4, 1, 8, 8))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 10])
def test_interleaved_rows_stand_above_one_another(n):
    above, below = random_images(16, n, 1, 2, 2), random_images(17, n, 1, 2, 2)
    columns = 4
    mixed = interleave(above, below, columns)
    width = min(n, columns)
    for i in range(n):
        row, column = divmod(i, columns)
        assert torch.equal(mixed[2 * row * width + column], above[i])
        assert torch.equal(mixed[(2 * row + 1) * width + column], below[i])
    assert len(mixed) == 2 * -(-n // columns) * width


def test_side_by_side_shows_every_batch_under_its_title():
    batches = {"grey": random_images(18, 4, 1, 8, 8), "colour": random_images(19, 9, 3, 20, 30)}
    sheet = side_by_side(batches)
    grids = [grid(images).expand(3, -1, -1) for images in batches.values()]
    assert sheet.shape[0] == 3
    height = max(one.shape[1] for one in grids)
    title = sheet.shape[1] - height
    left = 0
    for one in grids:
        assert torch.equal(sheet[:, title : title + one.shape[1], left : left + one.shape[2]], one)
        above = sheet[:, :title, left : left + one.shape[2]]
        assert above.min() < 100  # the title's letters
        assert above.max() == 255
        left += one.shape[2] + 12
    assert sheet.shape[2] == left - 12


# ---------------------------------------------------------------------- saving


def test_save_grid_writes_the_grid(tmp_path):
    images = random_images(11, 5, 3, 6, 4)
    save_grid(images, str(tmp_path / "deep" / "grid.png"), columns=2)
    assert torch.equal(read_image(tmp_path / "deep" / "grid.png"), grid(images, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_save_images_as_the_ending_says(tmp_path, channels):
    images = random_images(12, 12, channels, 6, 4)
    assert "12 images" in save_images(images, tmp_path / "x.png", columns=5)
    assert torch.equal(read_image(tmp_path / "x.png"), grid(images, 5))

    assert f"(12, {channels}, 6, 4)" in save_images(images, str(tmp_path / "x.npy"))
    array = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert array.dtype == np.uint8
    assert np.array_equal(array, images.numpy())

    assert "images" in save_images(images, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert list(arrays) == ["images"]
        assert np.array_equal(arrays["images"], images.numpy())

    assert "12 PNGs" in save_images(images, tmp_path / "folder")
    paths = sorted((tmp_path / "folder").iterdir())
    assert [path.name for path in paths] == [f"{i:02d}.png" for i in range(12)]
    assert torch.equal(torch.stack([read_image(path) for path in paths]), images)
    assert {path.name for path in tmp_path.iterdir()} == {"x.png", "x.npy", "x.npz", "folder"}

    assert save_images(images[:1], tmp_path / "one").endswith("/ (1 PNG)")
    assert save_images(images[:1], tmp_path / "x.png").endswith("(a grid of 1 image)")


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.png", "folder"])
def test_save_images_takes_arrays(tmp_path, name):
    images = random_images(13, 1, 1, 3, 3)
    assert save_images(images.numpy(), tmp_path / name).startswith(str(tmp_path / name))
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_save_array_keeps_numbers_and_type(tmp_path, dtype):
    codes = torch.arange(6).reshape(2, 3).to(dtype)
    told = save_array(codes, tmp_path / "codes.npy")
    assert told.endswith(f"codes.npy ({str(dtype)[6:]} (2, 3))")
    found = torch.from_numpy(np.load(tmp_path / "codes.npy", allow_pickle=False))
    assert found.dtype == dtype
    assert torch.equal(found, codes)


@pytest.mark.parametrize("name", ["x.jpg", "x.gif", "x.pt", "run.2"])
def test_other_endings_are_refused(tmp_path, name):
    for refuse in (
        lambda: save_images(random_images(14, 2, 1, 3, 3), tmp_path / name),
        lambda: check_output(tmp_path / name),
    ):
        with pytest.raises(GlannError, match=rf"{name} ends in '\.\w+'; wanted \.png"):
            refuse()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.png", "x.npy", "x.npz", "folder"])
def test_only_images_are_saved(tmp_path, name):
    with pytest.raises(GlannError, match="dtype float32"):
        save_images(torch.rand(2, 1, 3, 3), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.png", "x.npy", "x.npz"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, name):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GlannError, match="No space left"):
        save_images(random_images(15, 2, 1, 3, 3), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_every_suffix_is_one_that_pillow_reads():
    assert set(module.SUFFIXES) <= set(Image.registered_extensions())
