"""Samplers of points instead of images, with VEEGAN's networks (arXiv 1705.07761, appendix).

GANs are the project's own, loop and losses; only the networks are others.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from glann.baselines import MODELS
from glann.baselines.gan import GAN
from glann.networks import Generator, evaluation_mode
from glann.randomness import noise, seeded
from glann.training import Batches, Training, pick_device

NOISE_DIM = 2

POINT_GANS: dict[str, dict[str, Any]] = {
    "mm-gan": {},
    "ns-gan": {},
    "ls-gan": {},
    "wgan": {},
    # Gulrajani et al.'s weight for toy data, in their code (gan_toy.py).
    "wgan-gp": {"penalty_weight": 0.1, "beta1": 0.5, "beta2": 0.9},
    "dragan": {},
    "sn-gan": {},
    # As published: β1 = 0, and their weight of 1 for data in [−1, 1].
    "r3gan": {"penalty_weight": 1.0, "beta1": 0.0, "beta2": 0.99},
}
"""GANs for points, and where they differ from VEEGAN's optimiser, Adam 1e-4 with β1 = .8.

Not BEGAN: its discriminator is an autoencoder, and of two numbers it learns the identity, under
which no point has an error.
"""


class PointGenerator(nn.Module):
    """Noise `(n, noise_dim)` → points `(n, dim)`: 4 layers of 400 with BatchNorm and ReLU."""

    def __init__(self, noise_dim: int, dim: int) -> None:
        super().__init__()
        self.config = {"code_dim": noise_dim}
        layers: list[nn.Module] = []
        for inputs in (noise_dim, 400, 400, 400):
            layers += [nn.Linear(inputs, 400), nn.BatchNorm1d(400), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(400, dim))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Noise → points."""
        points: torch.Tensor = self.layers(codes)
        return points


class Maxout(nn.Module):
    """The largest of `pieces` linear maps, for each of `outputs` (Goodfellow et al. 2013)."""

    def __init__(self, inputs: int, outputs: int, pieces: int, spectral: bool) -> None:
        super().__init__()
        self.pieces = pieces
        linear = nn.Linear(inputs, outputs * pieces)
        self.linear = spectral_norm(linear) if spectral else linear

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`(n, inputs)` → `(n, outputs)`."""
        largest: torch.Tensor = self.linear(rows).unflatten(1, (-1, self.pieces)).amax(2)
        return largest


def point_discriminator(dim: int, spectral: bool) -> nn.Module:
    """Points `(n, dim)` → scores `(n, 1)`: 3 layers of 200 maxout units of 5 pieces."""
    last = nn.Linear(200, 1)
    return nn.Sequential(
        *(Maxout(inputs, 200, 5, spectral) for inputs in (dim, 200, 200)),
        spectral_norm(last) if spectral else last,
    )


@dataclass(kw_only=True)
class PointGAN(GAN):
    """A GAN of the project, on points: float `(n, dim)`."""

    def fit(self, images: object, *, seed: int = 0, device: str = "auto", **_: Any) -> "PointGAN":
        """Learn from points, float32 `(n, dim)`; returns self."""
        points = cast(torch.Tensor, images)
        with seeded(seed, "generator"):
            network = PointGenerator(self.noise_dim, points.shape[1])
        on_device = pick_device(device)
        # The loop asks for nothing that an image generator alone has.
        generator = cast(Generator, network.to(on_device).train())
        self.dim_ = points.shape[1]
        n = len(points)
        batches = Batches(n, self.batch_size, self.images_seen / n)
        with Training(self.name, batches, None, {}, False) as training:
            self.generator_ = self._train(training, generator, points, None, seed, on_device)
            training.save({}, done=True)  # refused if the loss is not finite
            self.seconds_ = training.elapsed
        self.generator_.cpu().eval()
        return self

    def sample(self, n: int, seed: int = 0, start: int = 0) -> torch.Tensor:
        """New points, number `start` to `start + n` of `seed`: float32 `(n, dim)`."""
        with evaluation_mode(self.generator_):
            made: torch.Tensor = self.generator_(
                noise(seed, "sample", start, start + n, self.noise_dim)
            )
        return made

    def _real(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def _discriminator(self, generator: Generator) -> nn.Module:
        return point_discriminator(self.dim_, self.norm == "spectral")


def point_gan(model: str, steps: int) -> PointGAN:
    """An unfitted one of POINT_GANS, to be trained for `steps` of the discriminator."""
    published = MODELS[model][1]
    settings = {key: published[key] for key in published if key not in ("lr", "beta1", "beta2")}
    protocol = {"lr": 1e-4, "beta1": 0.8, "batch_size": 100, "images_seen": 100 * steps}
    changes = POINT_GANS[model]
    return PointGAN(noise_dim=NOISE_DIM, **{**settings, **protocol, **changes})
