import os
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from glann.contrastive import Features
from glann.errors import GlannError
from glann.losses import (
    LOSSES,
    ByMatrices,
    Contrastive,
    LaplacianPyramid,
    Perceptual,
    Scattering,
    l1,
    l2,
    load_vgg16,
    make_loss,
    vgg16_features,
)
from glann.randomness import seeded

CPU = torch.device("cpu")

# ---------------------------------------------------------------------- the slow way
# Burt & Adelson 1983 as it is written there: 5×5 windows, one pixel at a time.

KERNEL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


def blurred(image: NDArray[np.float64]) -> NDArray[np.float64]:
    padded = np.pad(image, 2, mode="reflect")
    height, width = image.shape
    rows = [
        [(padded[y : y + 5, x : x + 5] * KERNEL).sum() for x in range(width)] for y in range(height)
    ]
    return np.array(rows)


def reduced(image: NDArray[np.float64]) -> NDArray[np.float64]:
    return blurred(image)[::2, ::2]


def expanded(image: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    spread = np.zeros(shape)
    spread[::2, ::2] = image
    return 4 * blurred(spread)


def slow_pyramid(image: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    levels = []
    while min(image.shape) >= 8:
        smaller = reduced(image)
        levels.append(image - expanded(smaller, image.shape))
        image = smaller
    return [*levels, image]


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHAPES = [(8, 8), (9, 13), (15, 8), (16, 16), (28, 28), (21, 34)]


@pytest.mark.parametrize("shape", SHAPES)
def test_levels_are_those_of_burt_and_adelson(shape):
    image = random_images(1, 1, *shape)
    levels = LaplacianPyramid(shape).double().pyramid(image)
    wanted = slow_pyramid(image[0, 0].numpy())
    assert [tuple(level.shape[2:]) for level in levels] == [level.shape for level in wanted]
    for level, other in zip(levels, wanted, strict=True):
        np.testing.assert_allclose(level[0, 0].numpy(), other, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (32, 16)])
def test_loss_is_the_weighted_sum_of_the_definition(shape):
    """Σ_j 2^{2j} |L^j x − L^j x′|₁ over the number of pixels, where every side halves evenly."""
    output, target = random_images(1, 3, *shape), random_images(1, 3, *shape, seed=1)
    wanted = 0.0
    for channel in range(3):
        ours = slow_pyramid(output[0, channel].numpy())
        theirs = slow_pyramid(target[0, channel].numpy())
        for j, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            wanted += 2 ** (2 * j) * np.abs(a - b).sum() / output.numel()
    loss = LaplacianPyramid(shape).double()(output, target)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_levels_rebuild_the_image(shape):
    image = random_images(2, 3, *shape)
    *levels, last = LaplacianPyramid(shape).double().pyramid(image)
    for i in range(2):
        for channel in range(3):
            built = last[i, channel].numpy()
            for level in reversed(levels):
                fine = level[i, channel].numpy()
                built = fine + expanded(built, fine.shape)
            np.testing.assert_allclose(built, image[i, channel].numpy(), atol=1e-12)


def test_a_shift_of_brightness_is_seen_by_the_last_level_alone():
    image = random_images(1, 1, 28, 28)
    pyramid = LaplacianPyramid((28, 28)).double()
    assert pyramid(image, image + 0.25).item() == pytest.approx(0.25, rel=1e-12)


sides = st.integers(8, 40)


@given(height=sides, width=sides, data=st.data())
@settings(deadline=None, max_examples=40)
def test_one_changed_pixel_is_a_loss_and_none_is_not(height, width, data):
    channel = data.draw(st.integers(0, 2))
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    change = data.draw(st.floats(1e-4, 1) | st.floats(-1, -1e-4))
    images = random_images(2, 3, height, width).float()
    other = images.clone()
    other[1, channel, y, x] += change
    pyramid = LaplacianPyramid((height, width))
    loss = pyramid(other, images)
    assert loss[0] == 0
    assert loss[1] > 1e-3 * abs(change) / images[0].numel()
    torch.testing.assert_close(pyramid(images, other), loss)  # and it has no direction


# ---------------------------------------------------------------------- scattering


def striped(angle: float, phase: float = 0.0, size: int = 32) -> torch.Tensor:
    """Waves of 2 radians a pixel that run along `angle`: double `(1, 1, size, size)` in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    wave = torch.cos(2 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return (wave.double()[None, None] + 1) / 2


@pytest.mark.parametrize("direction", range(4))
def test_each_direction_of_waves_has_its_coefficient(direction):
    finest = Scattering((32, 32)).double().coefficients(striped(np.pi * direction / 4))[0]
    inside = finest[0, :, 4:-4, 4:-4].mean((1, 2))
    others = inside[torch.arange(4) != direction]
    assert inside[direction] > 2 * others.max()


def test_coefficients_are_those_of_the_definition():
    """A|x ∗ ψ| with windows of 5×5 one by one, every second of them, averaged over 2×2."""
    loss = Scattering((16, 20)).double()
    image = random_images(1, 1, 16, 20)
    padded = np.pad(image[0, 0].numpy(), 2, mode="reflect")
    waves = loss.wavelets[:, 0].numpy()
    modulus = np.zeros((4, 8, 10))
    for k in range(4):
        for row in range(8):
            for column in range(10):
                window = padded[2 * row : 2 * row + 5, 2 * column : 2 * column + 5]
                even, odd = (waves[k] * window).sum(), (waves[k + 4] * window).sum()
                modulus[k, row, column] = np.sqrt(even**2 + odd**2 + 1e-6)
    wanted = (
        modulus[:, :-1, :-1] + modulus[:, 1:, :-1] + modulus[:, :-1, 1:] + modulus[:, 1:, 1:]
    ) / 4
    np.testing.assert_allclose(loss.coefficients(image)[0][0].numpy(), wanted, atol=1e-12)


def test_coefficients_see_no_brightness_and_hardly_the_place_of_a_wave():
    loss = Scattering((32, 32)).double()
    image = random_images(1, 1, 32, 32)
    for mine, theirs in zip(loss.coefficients(image), loss.coefficients(image + 0.3), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=0)
    here, there, grey = striped(0.0), striped(0.0, np.pi), torch.full((1, 1, 32, 32), 0.5).double()

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        mine, theirs = (loss.coefficients(image)[0][:, :, 2:-2, 2:-2] for image in (a, b))
        return float((mine - theirs).abs().mean())

    # To the pixels' loss a wave that lies wrong is worse than none; to these it is better.
    assert l1(here, there) > 1.9 * l1(here, grey)
    assert apart(here, there) < 0.1 * apart(here, grey)


@pytest.mark.parametrize("kind", [Scattering, LaplacianPyramid])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 17, 22), (1, 8, 8)])
def test_matrices_give_the_same_loss_and_gradient(kind, shape):
    loss = kind(shape[1:])
    by_matrices = ByMatrices(loss, shape[1:]).double()
    loss = loss.double()
    random = torch.Generator().manual_seed(0)
    output, target = torch.rand(2, 4, *shape, generator=random, dtype=torch.float64)
    found = []
    for of in (loss, by_matrices):
        given = output.clone().requires_grad_()
        losses = of(given, target)
        (losses * torch.arange(1.0, 5.0)).sum().backward()
        found.append((losses.detach(), given.grad))
    for one, other in zip(*found, strict=True):
        assert one.abs().mean() > 1e-4
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)


def test_scattering_adds_the_distance_of_its_coefficients_to_the_pyramid():
    output, target = random_images(2, 3, 17, 22), random_images(2, 3, 17, 22, seed=1)
    loss = Scattering((17, 22)).double()
    wanted = LaplacianPyramid((17, 22)).double()(output, target)
    for i in range(2):
        ours, theirs = (loss.coefficients(images[i : i + 1]) for images in (output, target))
        assert len(ours) == 2
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape[:2] == (3, 4)
            wanted[i] += 4 * (a - b).abs().mean()
    torch.testing.assert_close(loss(output, target), wanted)


def test_features_weigh_levels_and_coefficients_as_the_loss_does():
    output, target = random_images(2, 3, 17, 22), random_images(2, 3, 17, 22, seed=1)
    loss = Scattering((17, 22)).double()
    tables = loss.pyramid.pyramid(output - target)
    for a, b in zip(*map(loss.coefficients, (output, target)), strict=True):
        tables.append(4 * (a - b).unflatten(0, (2, 3)))
    wanted = torch.stack([table.square().flatten(1).mean(1) for table in tables]).sum(0)
    found = (loss.features(output) - loss.features(target)).square().sum(1)
    torch.testing.assert_close(found, wanted)


def test_contrastive_adds_the_distance_of_its_maps_to_scattering():
    output, target = random_images(2, 3, 17, 22), random_images(2, 3, 17, 22, seed=1)
    loss = contrastive((17, 22), channels=3)
    wanted = Scattering((17, 22)).double()(output, target)
    for i in range(2):
        ours, theirs = (loss.features.maps(images[i : i + 1]) for images in (output, target))
        for a, b in zip(ours, theirs, strict=True):
            wanted[i] += (a - b).abs().mean() / 3
    torch.testing.assert_close(loss(output, target), wanted)


def test_contrastive_multiplies_in_its_precision_and_gives_float32():
    features = Features((1, 28, 28)).eval()
    output, target = (random_images(4, 1, 28, 28, seed=i).float() for i in range(2))
    exact, rounded = (
        make_loss("contrastive", (28, 28), CPU, features=features, precision=precision)
        for precision in (torch.float32, torch.bfloat16)
    )
    assert rounded(output, target).dtype == torch.float32
    assert not torch.equal(exact(output, target), rounded(output, target))
    torch.testing.assert_close(exact(output, target), rounded(output, target), rtol=0.02, atol=0)


def test_l2_is_the_mean_squared_error_of_each_image():
    output, target = random_images(3, 2, 5, 7), random_images(3, 2, 5, 7, seed=1)
    wanted = [F.mse_loss(a, b).item() for a, b in zip(output, target, strict=True)]
    assert make_loss("l2", (5, 7), torch.device("cpu"))(output, target).tolist() == wanted


def losses_for(shape: tuple[int, int], channels: int = 1) -> dict[str, torch.nn.Module]:
    return {
        "l1": l1,
        "l2": l2,
        "laplacian": LaplacianPyramid(shape).double(),
        "scattering": Scattering(shape).double(),
        "contrastive": contrastive(shape, channels),
    }


def contrastive(shape: tuple[int, int], channels: int = 1) -> Contrastive:
    """Of features that have learned nothing."""
    with seeded(0, "features of these tests"):
        features = Features((channels, *shape)).double().eval()
    features.spreads.copy_(torch.arange(1, len(features.spreads) + 1))
    return Contrastive(Scattering(shape).double(), features, torch.float32)


@pytest.mark.parametrize("name", ["l1", "l2", "laplacian", "scattering", "contrastive"])
@pytest.mark.parametrize("shape", [(8, 8), (17, 22)])
def test_the_gradient_is_right(name, shape):
    loss = losses_for(shape)[name]
    output = random_images(2, 1, *shape).requires_grad_()
    target = random_images(2, 1, *shape, seed=1)
    assert torch.autograd.gradcheck(lambda images: loss(images, target), (output,))


@pytest.mark.parametrize("name", ["l1", "l2", "laplacian", "scattering", "contrastive"])
def test_no_images_have_no_losses(name):
    """As a process may have none of a batch."""
    nothing = random_images(0, 1, 12, 20)
    assert losses_for((12, 20))[name](nothing, nothing).shape == (0,)


@pytest.mark.parametrize("name", ["l1", "l2", "laplacian", "scattering", "contrastive"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_images_loss_does_not_depend_on_its_batch(name, channels):
    loss = losses_for((12, 20), channels)[name]
    output, target = (random_images(5, channels, 12, 20, seed=seed) for seed in range(2))
    together = loss(output, target)
    assert together.shape == (5,)
    alone = torch.cat([loss(output[i : i + 1], target[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
    assert len(set(together.tolist())) == 5


def test_l1_is_the_mean_absolute_difference():
    output = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    target = torch.tensor([[[[1.0, 1.0], [0.5, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    assert l1(output, target).tolist() == [0.375, 0.0]


def test_make_loss_knows_its_names(weights):
    image = torch.full((1, 1, 28, 28), 0.5)
    for name in LOSSES:
        loss = make_loss(name, (28, 28), CPU, str(weights["pth"]), Features((1, 28, 28)).eval())
        assert loss(image, image).tolist() == [0.0]
    assert isinstance(make_loss("scattering", (28, 28), CPU), Scattering)
    assert isinstance(make_loss("laplacian", (28, 28), CPU), LaplacianPyramid)
    with pytest.raises(
        GlannError, match="'ssim' is unknown; wanted one of contrastive, scattering"
    ):
        make_loss("ssim", (28, 28), CPU)


# ---------------------------------------------------------------------- VGG16
# torchvision's names, as `torchvision.models.vgg16().features` prints them.

CONVOLUTIONS = {
    0: (64, 3),
    2: (64, 64),
    5: (128, 64),
    7: (128, 128),
    10: (256, 128),
    12: (256, 256),
    14: (256, 256),
    17: (512, 256),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}
POOLS = (4, 9, 16, 23, 30)


def functional(state: dict[str, torch.Tensor], images: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of all 31 layers."""
    outputs = []
    for number in range(31):
        if number in CONVOLUTIONS:
            weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
            images = F.conv2d(images, weight, bias, stride=1, padding=1)
        elif number in POOLS:
            images = F.max_pool2d(images, kernel_size=2, stride=2)
        else:
            images = F.relu(images)
        outputs.append(images)
    return outputs


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Weights under torchvision's names, such that activations neither fade nor grow."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (outputs, inputs) in CONVOLUTIONS.items():
        weight = torch.randn(outputs, inputs, 3, 3, generator=random) * (2 / (9 * inputs)) ** 0.5
        tensors[f"features.{number}.weight"] = weight
        tensors[f"features.{number}.bias"] = torch.randn(outputs, generator=random) * 0.1
    for number in (0, 3, 6):  # of other shapes than torchvision's: they are not looked at
        tensors[f"classifier.{number}.weight"] = torch.ones(5, 4)
        tensors[f"classifier.{number}.bias"] = torch.ones(5)
    return tensors


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    paths = {"pth": folder / "vgg16.pth", "safetensors": folder / "vgg16.safetensors"}
    torch.save(state, paths["pth"])
    save_file(state, paths["safetensors"])
    return paths


@pytest.fixture(scope="module")
def perceptual(weights) -> Perceptual:
    return Perceptual(load_vgg16(str(weights["safetensors"])))


def test_names_and_shapes_are_torchvisions():
    network = vgg16_features()
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    wanted = {}
    for number, (outputs, inputs) in CONVOLUTIONS.items():
        wanted |= {f"{number}.weight": (outputs, inputs, 3, 3), f"{number}.bias": (outputs,)}
    assert found == wanted
    assert len(network) == 31
    assert sum(p.numel() for p in network.parameters()) == 14_714_688
    kinds = [type(layer).__name__ for layer in network]
    assert [i for i, kind in enumerate(kinds) if kind == "MaxPool2d"] == list(POOLS)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_loaded_features_are_those_of_plain_convolutions(kind, state, weights):
    network = load_vgg16(str(weights[kind]))
    images = random_images(2, 3, 32, 36).float()
    torch.testing.assert_close(network(images), functional(state, images)[30])
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_without_a_file_torch_hub_is_asked(state, monkeypatch):
    def fetch(url: str, **options: object) -> dict[str, torch.Tensor]:
        assert url == "https://download.pytorch.org/models/vgg16-397923af.pth"
        assert options["weights_only"] is True
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    network = load_vgg16()
    assert torch.equal(network[28].bias, state["features.28.bias"])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "padding"),
    [((28, 28), (2, 2, 2, 2)), ((8, 8), (12, 12, 12, 12)), ((33, 50), (1, 1, 1, 2))],
)
def test_perceptual_is_l1_of_pixels_and_of_three_layers(channels, size, padding, state, perceptual):
    output, target = (random_images(2, channels, *size, seed=s).float() for s in (0, 1))
    left, right, top, bottom = padding

    def prepared(images: torch.Tensor) -> torch.Tensor:
        padded = F.pad(2 * images - 1, (left, right, top, bottom), value=-1.0)
        return torch.cat([padded] * 3, dim=1) if channels == 1 else padded

    a, b = prepared(output), prepared(target)
    assert all(side >= 32 and side % 4 == 0 for side in a.shape[2:])
    wanted = (a - b).abs().mean((1, 2, 3))
    ours, theirs = functional(state, a), functional(state, b)
    for layer in (2, 7, 12):
        wanted += (ours[layer] - theirs[layer]).abs().mean((1, 2, 3))
    torch.testing.assert_close(perceptual(output, target), wanted)


def test_perceptual_loss_is_of_each_image_alone(perceptual):
    output, target = (random_images(3, 1, 28, 28, seed=s).float() for s in (0, 1))
    together = perceptual(output, target)
    alone = torch.cat([perceptual(output[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert perceptual(target, target).tolist() == [0, 0, 0]


def test_perceptual_gradient_reaches_the_output_and_not_the_weights(perceptual):
    output = random_images(1, 1, 28, 28).float().requires_grad_()
    perceptual(output, random_images(1, 1, 28, 28, seed=1).float()).sum().backward()
    assert output.grad.isfinite().all()
    assert (output.grad != 0).float().mean() > 0.99
    assert all(p.grad is None for p in perceptual.parameters())


def test_perceptual_gradient_is_right(state):
    features = vgg16_features()[:13]
    features.load_state_dict({name: state[f"features.{name}"] for name in features.state_dict()})
    loss = Perceptual(features.requires_grad_(False).double())
    output = random_images(1, 1, 28, 28).requires_grad_()
    target = random_images(1, 1, 28, 28, seed=1)
    check = torch.autograd.gradcheck
    assert check(lambda x: loss(x, target), (output,), eps=1e-8, atol=1e-4, fast_mode=True)


# ---------------------------------------------------------------------- files that don't do


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GlannError, match=r"vgg_weights: .*none\.pth is not a file"):
        load_vgg16(str(tmp_path / "none.pth"))
    with pytest.raises(GlannError, match="is not a file"):
        load_vgg16(str(tmp_path))


def test_a_network_of_another_shape_is_refused(state, tmp_path):
    path = str(tmp_path / "other.safetensors")
    wrong = {**state, "features.7.weight": state["features.7.weight"][:, :64].contiguous()}
    save_file(wrong, path)
    with pytest.raises(GlannError, match=r"other.* lacks .* features\.7\.weight and 0 more"):
        load_vgg16(path)
    save_file({k: v for k, v in state.items() if ".28." not in k}, path)
    with pytest.raises(GlannError, match=r"features\.28\.weight and 1 more"):
        load_vgg16(path)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_file_is_refused(kind, keep, tmp_path):
    path = tmp_path / f"half.{kind}"
    tensors = {"features.0.weight": torch.ones(64, 3, 3, 3)}
    torch.save(tensors, path) if kind == "pth" else save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(GlannError, match=rf"half\.{kind} can't be read as weights"):
        load_vgg16(str(path))


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    with pytest.raises(GlannError, match="can't be read as weights"):
        load_vgg16(str(tmp_path / "tensor.pth"))
    torch.save({0: torch.ones(3), "features.0.weight": "text"}, tmp_path / "keys.pth")
    with pytest.raises(GlannError, match="lacks weights"):
        load_vgg16(str(tmp_path / "keys.pth"))


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


def test_a_file_of_weights_carries_out_no_code(tmp_path):
    torch.save({"features.0.weight": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(GlannError, match="can't be read as weights"):
        load_vgg16(str(tmp_path / "trap.pth"))
    assert not (tmp_path / "sprung").exists()


def test_without_a_network_it_says_what_to_do(monkeypatch):
    def fetch(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    with pytest.raises(GlannError, match="no route to host") as caught:
        make_loss("vgg", (28, 28), CPU)
    assert "--vgg-weights FILE" in str(caught.value)
    assert "'laplacian'" in str(caught.value)
