import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glann import GlannError
from glann.evaluation.sharpness import laplacian_energy, relative_sharpness


def with_pixels(pixels, size=8, channels=1):
    """One black image but for some white pixels."""
    image = torch.zeros(1, channels, size, size, dtype=torch.uint8)
    for row, column in pixels:
        image[:, :, row, column] = 255
    return image


@pytest.mark.parametrize("value", [0, 7, 255])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_colour_has_none(value, channels):
    assert laplacian_energy(torch.full((3, channels, 8, 9), value, dtype=torch.uint8)) == 0


@pytest.mark.parametrize(
    ("pixels", "energy"),
    [
        # −4 at the pixel and 1 at each neighbour; each neighbour beyond the edge counts as itself.
        ([(3, 3)], 16 + 4),
        ([(0, 3)], 9 + 3),
        ([(0, 0)], 4 + 2),
        ([(7, 7)], 4 + 2),
        # Two neighbours: −3 each, and six pixels beside them.
        ([(3, 3), (3, 4)], 2 * 9 + 6),
        # Two on a diagonal: two pixels are beside both.
        ([(3, 3), (4, 4)], 2 * 16 + 2 * 4 + 4),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_single_pixels(pixels, energy, channels):
    found = laplacian_energy(with_pixels(pixels, channels=channels))
    assert found == pytest.approx(energy / 64, rel=1e-12)


def test_the_worst_is_a_chequerboard():
    board = (torch.arange(64).view(1, 1, 8, 8) // 8 + torch.arange(8)) % 2
    inner = 64 * 16 - 6 * 4 * 7 - 4 * 12  # edges have 3 neighbours, corners 2
    assert laplacian_energy((board * 255).to(torch.uint8)) == pytest.approx(inner / 64)


def test_it_grows_with_the_square_of_the_contrast(digits):
    dark = digits // 3 * 3
    assert laplacian_energy(dark) == pytest.approx(9 * laplacian_energy(dark // 3), rel=1e-6)
    assert laplacian_energy(255 - dark) == pytest.approx(laplacian_energy(dark), rel=1e-6)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_written_out_sum(seed):
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 1, 5, 6), generator=random, dtype=torch.uint8)
    total = 0.0
    for image in images[:, 0].double() / 255:
        for i in range(5):
            for j in range(6):
                around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
                inside = [(p, q) for p, q in around if 0 <= p < 5 and 0 <= q < 6]
                total += float(sum(image[p, q] - image[i, j] for p, q in inside)) ** 2
    assert laplacian_energy(images) == pytest.approx(total / images.numel(), rel=1e-5)


def test_blurring_lowers_it(digits):
    blurred = torch.nn.functional.avg_pool2d(digits.float(), 3, 1, 1).round().to(torch.uint8)
    assert 0 < relative_sharpness(real=digits, fake=blurred) < 0.5


def test_noise_is_sharper_than_real_images(digits):
    noise = torch.randint_like(digits, 0, 256)
    assert relative_sharpness(real=digits, fake=noise) > 2
    assert relative_sharpness(real=noise, fake=digits) < 0.5


def test_real_images_are_as_sharp_as_real_images(digits):
    assert relative_sharpness(real=digits, fake=digits) == 1
    assert relative_sharpness(real=digits, fake=digits.flip(0)) == pytest.approx(1, rel=1e-9)


def test_it_does_not_depend_on_the_number_of_images(digits):
    many = digits.repeat(9, 1, 1, 1)  # more than are taken at a time
    assert laplacian_energy(many) == pytest.approx(laplacian_energy(digits), rel=1e-9)


def test_what_it_refuses(digits):
    with pytest.raises(GlannError, match="0 images were given"):
        laplacian_energy(digits[:0])
    with pytest.raises(GlannError, match="wanted uint8"):
        laplacian_energy(digits.float())
    with pytest.raises(GlannError, match="every real image is one colour"):
        relative_sharpness(real=digits * 0, fake=digits)
