"""The networks: generator (code → image), encoder (image → numbers), mapper (noise → code)."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import interpolate, pad
from torch.nn.utils.parametrizations import spectral_norm

from glann.images import crop

NORMS = ("batch", "spectral", "none")
"""Normalisations of an encoder."""

BLOCKS = ("transposed", "residual")
"""What a generator is made of."""


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Within it BatchNorm uses its running statistics; the mode that was comes back after."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)


def to_sphere(codes: torch.Tensor) -> torch.Tensor:
    """Scale each row of `(n, code_dim)` to norm 1."""
    on_sphere: torch.Tensor = _ToSphere.apply(codes)
    return on_sphere


class _ToSphere(torch.autograd.Function):
    """`to_sphere` with a gradient of five kernels: its part along the sphere, by the norm.

    Autograd by itself takes three times as many, which a GPU's steps feel.
    """

    @staticmethod
    def forward(ctx: Any, codes: torch.Tensor) -> torch.Tensor:
        norms = codes.norm(dim=1, keepdim=True).clamp_min(1e-12)
        made: torch.Tensor = codes / norms
        ctx.save_for_backward(made, norms)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        made, norms = ctx.saved_tensors
        outwards = (gradient * made).sum(1, keepdim=True)
        along: torch.Tensor = torch.addcmul(gradient, outwards, made, value=-1) / norms
        return along


def to_ball(codes: torch.Tensor, radius: float = 1.0) -> torch.Tensor:
    """Scale the rows of `(n, code_dim)` with a norm above `radius` down to it."""
    norms: torch.Tensor = codes.norm(dim=1, keepdim=True)
    return codes / (norms / radius).clamp_min(1)


def _pyramid(size: tuple[int, int], width: int) -> tuple[tuple[int, int], list[int]]:
    """How images are halved: (the smallest map's size, channels of each halving's result)."""
    halvings = max(2, math.ceil(math.log2(max(size) / 8)))
    height, width_of_image = (math.ceil(side / 2**halvings) for side in size)
    return (height, width_of_image), [min(512, width * 2**i) for i in range(halvings)]


class Maps(nn.Unflatten):
    """Numbers `(n, c · h · w)` → maps of features `(n, c, h, w)`, channels last in memory.

    What convolutions make of them is laid out alike. On a CPU with oneDNN that is faster: a step
    with "residual" blocks by a quarter to a third, with "transposed" ones by a twentieth.
    """

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Lay out numbers as maps."""
        maps: torch.Tensor = super().forward(numbers)
        return maps.contiguous(memory_format=torch.channels_last)


class Doubling(nn.Module):
    """A residual block that doubles the size: `(n, inputs, h, w)` → `(n, outputs, 2h, 2w)`.

    A transposed convolution, 4×4 with stride 2, and a 3×3 convolution, each after BatchNorm and
    LeakyReLU; beside them a 1×1 convolution whose pixels are doubled (as in SN-GAN's blocks, Miyato
    et al., arXiv 1802.05957, but that the first convolution does the doubling itself).
    """

    def __init__(self, inputs: int, outputs: int, batch_norm: bool) -> None:
        super().__init__()

        def before(features: int) -> list[nn.Module]:
            return [*([nn.BatchNorm2d(features)] if batch_norm else []), nn.LeakyReLU(0.2)]

        doubling = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=not batch_norm)
        nn.init.xavier_normal_(doubling.weight, gain=math.sqrt(2))
        self.layers = nn.Sequential(
            *before(inputs),
            doubling,
            *before(outputs),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.beside = nn.Conv2d(inputs, outputs, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps of features → maps of twice the size."""
        doubled: torch.Tensor = self.layers(maps)
        return doubled + interpolate(self.beside(maps), scale_factor=2)


class Generator(nn.Module):
    """Code → image, by blocks that double the size.

    "transposed": two full layers, then transposed convolutions.  For 28×28 and 32×32 images with
    `width` 64 and `hidden` 1024 it is the network of GLANN (Hoshen, Li & Malik 2019) and of InfoGAN
    before it: FC 1024 – FC 128·(s/4)² – deconv 64 – deconv, 4×4 kernels with stride 2, LeakyReLU
    .2, sigmoid.  Larger images get more doublings, so that the first map of features is never much
    above 8×8.

    "residual": one full layer, then a `Doubling` in the place of each transposed convolution, and a
    3×3 convolution.  Deeper, with a fraction of the numbers: for larger images, and small files.

    Args:
        code_dim: numbers in a code.
        image_shape: (channels, height, width), each side from 8 to 256.  Sides that can't be
            halved often enough are made larger and cropped.
        width: channels before the last layer; each doubling before has twice as many, up to 512.
        hidden: units of the first of the full layers; of "residual" there is one.
        batch_norm: BatchNorm before each activation but the first.  The authors leave it out for
            CIFAR-10.
        on_sphere: codes are scaled to norm 1 first.
        blocks: one of BLOCKS.
    """

    def __init__(
        self,
        code_dim: int,
        image_shape: tuple[int, int, int],
        width: int = 64,
        hidden: int = 1024,
        batch_norm: bool = True,
        on_sphere: bool = True,
        blocks: str = "transposed",
    ) -> None:
        super().__init__()
        channels, height, width_of_image = image_shape
        self.config: dict[str, Any] = {
            "code_dim": code_dim,
            "image_shape": list(image_shape),
            "width": width,
            "hidden": hidden,
            "batch_norm": batch_norm,
            "on_sphere": on_sphere,
            "blocks": blocks,
        }
        self.image_shape = (channels, height, width_of_image)
        self.on_sphere = on_sphere
        smallest, widths = _pyramid((height, width_of_image), width)
        if blocks == "residual":
            widths.append(min(512, 2 * widths[-1]))
        widths.reverse()
        build = _residual if blocks == "residual" else _transposed
        layers = build(code_dim, channels, smallest, widths, hidden, batch_norm)
        self.layers = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `(n, code_dim)` → images, float `(n, channels, height, width)` in [0, 1]."""
        images: torch.Tensor = self.layers(to_sphere(codes) if self.on_sphere else codes)
        return crop(images, self.image_shape[1:]).contiguous()


def _transposed(
    code_dim: int,
    channels: int,
    smallest: tuple[int, int],
    widths: list[int],
    hidden: int,
    batch_norm: bool,
) -> list[nn.Module]:
    """Layers from code to image, but for the sigmoid; `widths` are the channels of each size."""

    def norm(features: int, kind: type[nn.Module]) -> list[nn.Module]:
        return [kind(features)] if batch_norm else []

    features = widths[0] * smallest[0] * smallest[1]
    layers: list[nn.Module] = [
        nn.Linear(code_dim, hidden, bias=False),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, features, bias=not batch_norm),
        *norm(features, nn.BatchNorm1d),
        nn.LeakyReLU(0.2),
        Maps(1, (widths[0], *smallest)),
    ]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [
            nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=not batch_norm),
            *norm(outputs, nn.BatchNorm2d),
            nn.LeakyReLU(0.2),
        ]
    layers.append(nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1))
    for layer in layers:  # as the authors start it
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):
            nn.init.xavier_normal_(layer.weight, gain=math.sqrt(2))
    return layers


def _residual(
    code_dim: int,
    channels: int,
    smallest: tuple[int, int],
    widths: list[int],
    hidden: int,
    batch_norm: bool,
) -> list[nn.Module]:
    """The same of residual blocks, with one more of `widths`; `hidden` is not used."""
    norm = [nn.BatchNorm2d(widths[-1])] if batch_norm else []
    return [
        nn.Linear(code_dim, widths[0] * smallest[0] * smallest[1]),
        Maps(1, (widths[0], *smallest)),
        *(Doubling(inputs, outputs, batch_norm) for inputs, outputs in itertools.pairwise(widths)),
        *norm,
        nn.LeakyReLU(0.2),
        nn.Conv2d(widths[-1], channels, 3, padding=1),
    ]


class Encoder(nn.Module):
    """Image → numbers: the generator turned round.  With one number, a GAN's discriminator.

    For 28×28 and 32×32 images it is InfoGAN's discriminator, as in Lucic et al. (arXiv 1711.10337):
    conv 64 – conv 128 – FC 1024 – FC, 4×4 kernels with stride 2, LeakyReLU .2.

    Args:
        image_shape: (channels, height, width), each side from 8 to 256.
        outputs: numbers that come out.
        width: channels after the first layer; each halving has twice as many, up to 512.
        hidden: units of the layer before the last.
        norm: "batch": BatchNorm before each activation but the first; "spectral": every layer's
            weights divided by their spectral norm (Miyato et al., arXiv 1802.05957); "none".
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        outputs: int = 1,
        width: int = 64,
        hidden: int = 1024,
        norm: str = "none",
    ) -> None:
        super().__init__()
        channels, height, width_of_image = image_shape
        smallest, widths = _pyramid((height, width_of_image), width)
        factor = 2 ** len(widths)
        self.padding = (0, smallest[1] * factor - width_of_image, 0, smallest[0] * factor - height)

        def layer(made: nn.Module) -> nn.Module:
            return spectral_norm(made) if norm == "spectral" else made

        def after(features: int, kind: type[nn.Module]) -> list[nn.Module]:
            return [*([kind(features)] if norm == "batch" else []), nn.LeakyReLU(0.2)]

        bias = norm != "batch"
        layers = [layer(nn.Conv2d(channels, widths[0], 4, 2, 1)), nn.LeakyReLU(0.2)]
        for inputs, features in itertools.pairwise(widths):
            layers.append(layer(nn.Conv2d(inputs, features, 4, 2, 1, bias=bias)))
            layers += after(features, nn.BatchNorm2d)
        flat = widths[-1] * smallest[0] * smallest[1]
        layers += [nn.Flatten(), layer(nn.Linear(flat, hidden, bias=bias))]
        layers += [*after(hidden, nn.BatchNorm1d), layer(nn.Linear(hidden, outputs))]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float images `(n, c, h, w)` in [0, 1] → `(n, outputs)`."""
        numbers: torch.Tensor = self.layers(pad(images, self.padding))
        return numbers


class Mapper(nn.Module):
    """Noise → code: `depth` full layers of `width` with BatchNorm and ReLU, then a linear one.

    The form is GLANN's (two layers of 128 there).  What comes out is added to the centre of a cell,
    one of the parts that the codes were split into, in units of `scale`, the codes' spread around
    their centres: so the learning rate doesn't depend on the unit in which somebody's codes are
    written.  Where there are several cells, the centre goes in beside the noise: cells that are
    near each other learn from each other.  Codes on the unit sphere get outputs on it.

    Of several `levels` each further one has layers and noise of its own: it sees what the levels
    before made and adds to it (the levels of CHIMLE, Peng, Moazeni & Li, arXiv 2211.14286, with
    codes in the place of images).

    Args:
        noise_dim: numbers in a noise vector, of all levels together.
        code_dim: numbers in a code.
        width: units of each hidden layer.
        depth: number of hidden layers, of each level.
        on_sphere: outputs are scaled to norm 1.
        cells: number of cells.
        levels: how many there are.
    """

    centres: torch.Tensor
    shares: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        noise_dim: int,
        code_dim: int,
        width: int,
        depth: int,
        on_sphere: bool,
        cells: int = 1,
        levels: int = 1,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "noise_dim": noise_dim,
            "code_dim": code_dim,
            "width": width,
            "depth": depth,
            "on_sphere": on_sphere,
            "cells": cells,
            "levels": levels,
        }
        self.on_sphere = on_sphere
        self.noise_dims = [len(part) for part in torch.arange(noise_dim).tensor_split(levels)]
        """How many numbers of a noise vector are each level's."""
        known = code_dim if cells > 1 else 0
        self.layers = _perceptron(self.noise_dims[0] + known, width, depth, code_dim)
        further = [
            _perceptron(count + known + code_dim, width, depth, code_dim)
            for count in self.noise_dims[1:]
        ]
        for layers in further:  # which begin by adding nothing
            for numbers in layers[-1].parameters():
                nn.init.zeros_(numbers)
        self.further = nn.ModuleList(further)
        self.register_buffer("centres", torch.zeros(cells, code_dim))
        self.register_buffer("shares", torch.full((cells,), 1 / cells))
        self.register_buffer("scale", torch.ones(()))

    def forward(
        self, noise: torch.Tensor, cells: torch.Tensor | None = None, every: bool = False
    ) -> torch.Tensor:
        """Noise `(n, noise_dim)`, and each one's cell, int64 `(n,)` → codes `(n, code_dim)`.

        Where there is one cell, it need not be said.  With `every` those that each level makes,
        `(levels, n, code_dim)`: no gradient goes from a level to those before it.
        """
        codes: list[torch.Tensor] = []
        for number, own in enumerate(noise.split(self.noise_dims, 1)):
            codes.append(self.level(number, own, cells, codes[-1].detach() if codes else None))
        return torch.stack(codes) if every else codes[-1]

    def level(
        self,
        number: int,
        noise: torch.Tensor,
        cells: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One level: its own noise, and what the level before made, if any → `(n, code_dim)`."""
        one = cells is None or len(self.centres) == 1
        around = self.centres[:1] if one else self.centres[cells]
        inputs = [noise]
        if not one:
            inputs.append((around - self.centres.mean(0)) / self.centres.std().clamp_min(1e-12))
        if before is None:
            codes = around + self.scale * self.layers(torch.cat(inputs, 1))
        else:
            inputs.append((before - around) / self.scale)
            codes = before + self.scale * self.further[number - 1](torch.cat(inputs, 1))
        return to_sphere(codes) if self.on_sphere else codes

    def cells_of(self, noise: torch.Tensor) -> torch.Tensor:
        """Which cell a number of noise, float `(n,)`, stands for: int64 `(n,)`.

        Φ(e) is uniform, so that of N(0, 1) each cell gets its share.
        """
        bounds = self.shares.cumsum(0)
        found = torch.searchsorted(bounds, torch.special.ndtr(noise) * bounds[-1], right=True)
        return found.clamp_max(len(self.shares) - 1)


def _perceptron(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """`depth` full layers of `width` with BatchNorm and ReLU, then a linear one."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Linear(width if i else inputs, width, bias=False))
        layers += [nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))
