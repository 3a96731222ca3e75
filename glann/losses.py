"""Reconstruction losses: how far an image is from the one that its code should give.

Each takes two float batches in [0, 1], `(n, channels, height, width)`, and gives one loss for each
image, float `(n,)`, so that the mean over a batch doesn't depend on how images are batched.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from glann.devices import at_once, autocast
from glann.errors import GlannError
from glann.images import pad

LOSSES = ("contrastive", "scattering", "laplacian", "l1", "l2", "vgg")

_SLOPE = 1e-6
"""What is added to a squared modulus, whose root has no slope at 0."""

SMALL = 1024
"""Pixels of an image up to which a GPU computes losses by matrices."""

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_loss(
    name: str,
    image_size: tuple[int, int],
    device: torch.device,
    vgg_weights: str | None = None,
    features: nn.Module | None = None,
    precision: torch.dtype = torch.float32,
) -> Loss:
    """The loss called `name`, one of LOSSES, for images of (height, width), on `device`.

    "contrastive" needs `features`, as `glann.contrastive.learn_features` gives, which multiply in
    `precision`.
    """
    if name == "contrastive":
        if features is None:
            raise ValueError("loss = 'contrastive' needs features that were learned")
        scattering = make_loss("scattering", image_size, device)
        return Contrastive(scattering, copy.deepcopy(features).to(device), precision)
    if name == "l1":
        return l1
    if name == "l2":
        return l2
    if name in ("scattering", "laplacian"):
        loss = Scattering(image_size) if name == "scattering" else LaplacianPyramid(image_size)
        small = image_size[0] * image_size[1] <= SMALL
        by_matrices = device.type == "cuda" and small
        return (ByMatrices(loss, image_size) if by_matrices else loss).to(device)
    if name == "vgg":
        return Perceptual(load_vgg16(vgg_weights)).to(device)
    raise GlannError(f"loss = {name!r} is unknown; wanted one of {', '.join(LOSSES)}")


def l1(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the pixels of each image."""
    return (output - target).abs().flatten(1).mean(1)


def l2(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the pixels of each image.

    Of images that a code can't tell apart it makes the mean, which is what kernel estimates of the
    likelihood want, and what looks blurred.
    """
    return (output - target).square().flatten(1).mean(1)


def _blur(size: int) -> torch.Tensor:
    """The matrix that blurs `size` pixels by (1, 4, 6, 4, 1)/16; beyond the edge they are mirrored.

    Of Burt & Adelson 1983, "The Laplacian pyramid as a compact image code", with a = 3/8.  REDUCE
    keeps every second of its rows.  EXPAND blurs pixels with a 0 between any two and doubles the
    result, which leaves every second of its columns.
    """
    rows = torch.arange(size)
    matrix = torch.zeros(size, size)
    for offset, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
        columns = (rows + offset).abs()
        columns = torch.where(columns >= size, 2 * (size - 1) - columns, columns)
        matrix[rows, columns] += weight / 16
    return matrix


class LaplacianPyramid(nn.Module):
    """Lap1 of GLO (Bojanowski et al., arXiv 1707.05776): Σ_j 2^{2j} |L^j x − L^j x′|₁.

    Level j has 1/2^{2j} of the pixels, so that the weights make every level count alike: here each
    level's mean is taken.  The last level is the small blurred image itself.

    The pyramid is linear: it is built once, of the difference.  And it is separable: blurring is a
    product with a small matrix from each side, which fits every size and is faster than
    convolutions of one channel.
    """

    def __init__(self, image_size: tuple[int, int], smallest: int = 4) -> None:
        super().__init__()
        height, width = image_size
        self.levels = 0
        while min(height, width) >= 2 * smallest:
            for axis, size in (("rows", height), ("columns", width)):
                blur = _blur(size)
                self.register_buffer(f"halve_{axis}_{self.levels}", blur[::2].contiguous())
                self.register_buffer(f"double_{axis}_{self.levels}", 2 * blur[:, ::2])
            height, width = (height + 1) // 2, (width + 1) // 2
            self.levels += 1

    def pyramid(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The levels of `(n, c, h, w)`, finest first; the last is what is left after blurring."""
        levels = []
        for j in range(self.levels):
            halve_rows, halve_columns, double_rows, double_columns = (
                self.get_buffer(f"{name}_{j}")
                for name in ("halve_rows", "halve_columns", "double_rows", "double_columns")
            )
            smaller = halve_rows @ images @ halve_columns.T
            levels.append(images - double_rows @ smaller @ double_columns.T)
            images = smaller
        return [*levels, images]

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Float `(n, c, h, w)` twice → float `(n,)`."""
        levels = self.pyramid(output - target)
        return torch.stack([level.abs().flatten(1).mean(1) for level in levels]).sum(0)


def _wavelets(directions: int = 4, size: int = 5, frequency: float = 2.0) -> torch.Tensor:
    """Morlet wavelets, of one octave: `(2·directions, 1, size, size)`, cosines before sines.

    A wave of `frequency` radians a pixel under a Gaussian of one pixel, made to have mean 0.
    """
    at = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = at[:, None], at[None, :]
    window = torch.exp(-(x**2 + y**2) / 2)
    angles = torch.arange(directions) * math.pi / directions
    along = angles.cos()[:, None, None] * x + angles.sin()[:, None, None] * y
    waves = torch.cat([(frequency * along).cos(), (frequency * along).sin()]) * window
    waves -= window * (waves.sum((1, 2), keepdim=True) / window.sum())
    return (waves / waves.abs().sum((1, 2), keepdim=True))[:, None].float()


class Scattering(nn.Module):
    """Lap1 + 4 Σ_j |S_j x − S_j x′|₁: besides the pixels, how much detail is where and which way.

    S_j x = A|x_j ∗ ψ_θ|, the scattering coefficients of first order (Bruna & Mallat, arXiv
    1203.1513) of the image halved j times: for each of four directions θ the modulus of a wavelet
    transform, averaged over 4×4 of its pixels.  Unlike pixels they don't change where texture moves
    by a little, so that a generator which can't know where each thread of a cloth lies still has to
    weave one, where the best answer of a pixel's loss is grey.  Scattering coefficients as the
    target of a generator that is learned without an adversary: Angles & Mallat, arXiv 1805.06621.
    """

    WEIGHT = 4.0

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.pyramid = LaplacianPyramid(image_size)
        self.register_buffer("wavelets", _wavelets())

    def coefficients(self, images: torch.Tensor) -> list[torch.Tensor]:
        """S_j of `(n, c, h, w)`, finest first: each `(n·c, directions, about h/2^(j+1), …)`."""
        return [average(modulus(*waves.chunk(2, dim=1))) for waves in self.waves(images)]

    def waves(self, images: torch.Tensor) -> list[torch.Tensor]:
        """x_j ∗ ψ_θ, finest first: each `(n·c, 2·directions, about h/2^(j+1), …)`."""
        found = []
        # A modulus varies slowly: every second one will do, at a quarter of the cost.  To
        # convolve at every second pixel is to convolve blocks of 2×2, of which CPUs make the
        # gradient in half the time.
        wavelets = self.get_buffer("wavelets")
        reach = wavelets.shape[-1] // 2
        of_blocks = _blocks(F.pad(wavelets, (0, 1, 0, 1)))
        images = images.flatten(0, 1)[:, None]
        for _ in range(self.pyramid.levels):
            height, width = images.shape[2:]
            sides = reach, reach + width % 2, reach, reach + height % 2
            padded = F.pad(images, sides, mode="reflect")
            found.append(F.conv2d(_blocks(padded), of_blocks))
            images = F.avg_pool2d(images, 2)
        return found

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """All numbers that are compared: `(n, c, h, w)` → `(n, numbers)`.

        Squared distances between them weigh levels and coefficients as the loss does: each table by
        its mean, coefficients by WEIGHT.
        """
        tables = self.pyramid.pyramid(images)
        tables += [self.WEIGHT * table for table in self.coefficients(images)]
        flat = [table.reshape(len(images), -1) for table in tables]
        return torch.cat([table / table.shape[1] ** 0.5 for table in flat], 1)

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Float `(n, c, h, w)` twice → float `(n,)`."""
        loss: torch.Tensor = self.pyramid(output, target)
        pairs = zip(self.coefficients(output), self.coefficients(target), strict=True)
        for mine, theirs in pairs:
            apart = (mine - theirs).abs().unflatten(0, output.shape[:2])
            loss = loss + self.WEIGHT * apart.flatten(1).mean(1)
        return loss


def _blocks(images: torch.Tensor) -> torch.Tensor:
    """Blocks of 2×2 pixels as channels: `(n, 1, 2h, 2w)` → `(n, 4, h, w)`."""
    n, _, height, width = images.shape  # F.pixel_unshuffle knows no batch without images
    pixels = images.reshape(n, height // 2, 2, width // 2, 2)
    return pixels.permute(0, 2, 4, 1, 3).reshape(n, 4, height // 2, width // 2)


def modulus(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """√(even² + odd²), with a slope where both are 0."""
    return (even.square() + odd.square() + _SLOPE).sqrt()


class _Modulus(torch.autograd.Function):
    """`modulus` of `(n, 2k)`, even waves before odd ones, in half as many kernels: `(n, k)`."""

    @staticmethod
    def forward(ctx: Any, waves: torch.Tensor) -> torch.Tensor:
        even, odd = waves.square().chunk(2, dim=1)
        lengths = (even + odd).add_(_SLOPE).sqrt_()
        ctx.save_for_backward(waves, lengths)
        return lengths

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        waves, lengths = ctx.saved_tensors
        by_length: torch.Tensor = waves.unflatten(1, (2, -1)) * (gradient / lengths)[:, None]
        return by_length.flatten(1)


def average(maps: torch.Tensor) -> torch.Tensor:
    """A of `Scattering`: over 2×2 of every second pixel."""
    return F.avg_pool2d(maps, 2, 1)


class ByMatrices(nn.Module):
    """`Scattering` or `LaplacianPyramid` of small images, for a GPU: the same in fewer products.

    All is linear but moduli and absolute values, so levels, wavelets and averages become a matrix
    each, which has the weights in it.  It has more to multiply and a quarter of the kernels, which
    is what a GPU's time goes into while images are small.
    """

    def __init__(self, loss: "LaplacianPyramid | Scattering", image_size: tuple[int, int]) -> None:
        super().__init__()
        pyramid = loss if isinstance(loss, LaplacianPyramid) else loss.pyramid
        pixels = image_size[0] * image_size[1]
        each = torch.eye(pixels).view(pixels, 1, *image_size)
        self._keep("levels", pyramid.pyramid(each), 1.0)
        self.scatters = isinstance(loss, Scattering)
        if isinstance(loss, Scattering):
            waves = [wave.chunk(2, dim=1) for wave in loss.waves(each)]
            evens_odds = [wave.flatten(1) for half in zip(*waves, strict=True) for wave in half]
            self.register_buffer("waves", torch.cat(evens_odds, 1))
            parts = [even.shape[1:] for even, _ in waves]
            every = torch.eye(sum(part.numel() for part in parts))
            maps = every.split([part.numel() for part in parts], dim=1)
            averages = [average(m.unflatten(1, part)) for m, part in zip(maps, parts, strict=True)]
            self._keep("averages", averages, loss.WEIGHT)

    def _keep(self, name: str, tables: list[torch.Tensor], weight: float) -> None:
        """A matrix of all tables' columns, so that a sum over them is that of weighted means."""
        flat = [table.flatten(1) for table in tables]
        weighted = [table * (weight / table.shape[1]) for table in flat]
        self.register_buffer(name, torch.cat(weighted, 1))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Float `(n, c, h, w)` twice → float `(n,)`."""
        n, channels = output.shape[:2]
        output, target = output.reshape(n * channels, -1), target.reshape(n * channels, -1)
        loss = _total((output - target) @ self.get_buffer("levels"), n)
        if self.scatters:
            mine, theirs = at_once(
                output.device, *(partial(self._lengths, images) for images in (output, target))
            )
            loss = loss + _total((mine - theirs) @ self.get_buffer("averages"), n)
        return loss if channels == 1 else loss / channels

    def _lengths(self, images: torch.Tensor) -> torch.Tensor:
        """The moduli of all waves, `(n, pixels)` → `(n, moduli)`."""
        lengths: torch.Tensor = _Modulus.apply(images @ self.get_buffer("waves"))
        return lengths


class Contrastive:
    """Scattering + Σ_l |φ_l x − φ_l x′|₁ / 3: besides, what images are told apart by.

    φ_l are the maps of `features` (`glann.contrastive.Features`), each layer's mean taken.  To
    compare the maps of a network that was trained to see is GLANN's perceptual loss (arXiv
    1812.08985, section 3.1), which takes VGG16's; here the network has learned from the same
    images, without labels, and is a hundred times as small.

    Args:
        scattering: the loss of that name.
        features: has `maps`, float images `(n, c, h, w)` → a list of tensors `(n, …)`.
        precision: of its matrix products.
    """

    WEIGHT = 1 / 3

    def __init__(self, scattering: Loss, features: Any, precision: torch.dtype) -> None:
        self.scattering = scattering
        self.features = features
        self.precision = precision

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Float `(n, c, h, w)` twice → float `(n,)`."""

        def mine() -> list[torch.Tensor]:
            return self._maps(output)

        def theirs() -> list[torch.Tensor]:
            with torch.no_grad():
                return self._maps(target)

        scattering = partial(self.scattering, output, target)
        loss, *maps = at_once(output.device, scattering, mine, theirs)
        apart = [l1(one, other) for one, other in zip(*maps, strict=True)]
        total: torch.Tensor = loss + self.WEIGHT * torch.stack(apart).sum(0)
        return total

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.precision, images.device):
            maps: list[torch.Tensor] = self.features.maps(images)
        return [each.to(images.dtype) for each in maps]


def _total(numbers: torch.Tensor, n: int) -> torch.Tensor:
    """Σ |numbers| of each of n images."""
    total: torch.Tensor = torch.linalg.vector_norm(numbers.view(n, -1), ord=1, dim=1)
    return total


VGG16_CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Configuration D of Simonyan & Zisserman (arXiv 1409.1556): 13 convolutions, 0 is max-pooling."""

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


def vgg16_features() -> nn.Sequential:
    """VGG16's convolutions; layer numbers and names of weights as in torchvision's `features`."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in VGG16_CHANNELS:
        if outputs:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def load_vgg16(weights: str | None = None) -> nn.Sequential:
    """VGG16's convolutions with trained weights: from the file `weights`, or through torch.hub.

    A file holds the state of torchvision's `vgg16` (`features.0.weight`, …), as `.pth` or
    `.safetensors`.
    """
    network = vgg16_features()
    state = (
        _fetch_vgg16() if weights is None else read_weights(Path(weights), "vgg_weights", _VGG16)
    )
    state = {str(key).removeprefix("features."): value for key, value in state.items()}
    wanted = network.state_dict()
    missing = [key for key, value in wanted.items() if _shape(state.get(key)) != value.shape]
    if missing:
        raise GlannError(
            f"{weights or 'the file from torch.hub'} lacks weights of VGG16 of the right shape: "
            f"features.{missing[0]} and {len(missing) - 1} more; wanted the state of torchvision's "
            "vgg16"
        )
    network.load_state_dict({key: state[key] for key in wanted})
    return network.requires_grad_(False).eval()


def _shape(value: object) -> object:
    return getattr(value, "shape", None)


def _fetch_vgg16() -> dict[str, torch.Tensor]:
    try:
        return dict(torch.hub.load_state_dict_from_url(VGG16_URL, progress=True, weights_only=True))
    except Exception as error:  # whatever torch.hub, urllib or the unpickler raise
        raise GlannError(
            f"loss = 'vgg' needs VGG16's weights, and they could not be fetched ({error}); give a "
            "file with the state of torchvision's vgg16 (--vgg-weights FILE, or glo.vgg_weights), "
            "or take loss = 'laplacian', which needs none"
        ) from error


_VGG16 = "the state of torchvision's vgg16 (vgg16-397923af.pth, or as .safetensors)"


def read_weights(path: Path, option: str, wanted: str) -> dict[str, torch.Tensor]:
    """Tensors by name from a file, `.safetensors` or a pickle that holds nothing else.

    `option` and `wanted` say in errors where the path was given and what the file should be.
    """
    if not path.is_file():
        raise GlannError(f"{option}: {path} is not a file; wanted {wanted}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file raises almost anything
        raise GlannError(f"{option}: {path} can't be read as weights: {error}") from error


class Perceptual(nn.Module):
    """GLANN's loss (arXiv 1812.08985, section 3.1; the authors' code): L1 of pixels + L1 of VGG16.

    Features are the outputs of layers 2, 7 and 12 of the stack.  As there, grey images are repeated
    to RGB, small ones padded to 32×32, and pixels go in as 2x − 1.
    """

    def __init__(self, features: nn.Sequential, layers: Sequence[int] = (2, 7, 12)) -> None:
        super().__init__()
        self.features = features[: max(layers) + 1]
        self.taps = frozenset(layers)

    def activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of the tapped layers for float RGB images `(n, 3, h, w)`."""
        outputs = []
        for number, layer in enumerate(self.features.children()):
            images = layer(images)
            if number in self.taps:
                outputs.append(images)
        return outputs

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Float `(n, 1 or 3, h, w)` twice → float `(n,)`."""
        height, width = output.shape[-2:]
        # A multiple of 4 is halved twice without losing an edge.
        size = max(32, height + -height % 4), max(32, width + -width % 4)
        output, target = (
            2 * pad(images, size).expand(-1, 3, -1, -1) - 1 for images in (output, target)
        )
        loss = l1(output, target)
        for mine, theirs in zip(self.activations(output), self.activations(target), strict=True):
            loss = loss + l1(mine, theirs)
        return loss
