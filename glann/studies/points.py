"""Samplers of points instead of images, with VEEGAN's networks (arXiv 1705.07761, appendix).

GANs are the project's own, loop and losses; only the networks are others.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from glann.baselines import MODELS
from glann.baselines.gan import GAN
from glann.devices import pick_device
from glann.errors import NotFinite
from glann.imle import IMLE
from glann.networks import Generator, evaluation_mode
from glann.optimisers import adam, learning_rate, set_learning_rate
from glann.randomness import generator as random_generator
from glann.randomness import noise, seeded
from glann.settings import setting
from glann.training import Batches, Training

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


def _perceptron(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """`depth` layers of `width` with ReLU, then a linear one."""
    sizes = [inputs, *[width] * depth]
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


@dataclass(kw_only=True)
class PointIMLE:
    """IMLE on points, as in Li & Malik's algorithm 1: new data and new candidates in each step.

    Candidates that are never the nearest to a datum are never pulled: they may stay between the
    modes.  With `refuse`, those that are near a datum already are left out of the matching, so that
    the others are chosen: RS-IMLE (Vashist, Peng & Li 2024, arXiv 2409.17439).  Both draw few
    candidates, for the same reason.  The mapper has no BatchNorm, whose statistics of so few chosen
    candidates are not those of sampling.
    """

    noise_dim: int = setting(NOISE_DIM, "numbers in a noise vector", minimum=1)
    width: int = setting(128, "units of each hidden layer", minimum=8)
    depth: int = setting(6, "hidden layers", minimum=1)
    steps: int = setting(20_000, "of training", minimum=1)
    batch_size: int = setting(500, "points in a step", minimum=1)
    candidates: int = setting(100, "drawn in a step", minimum=1)
    refuse: float = setting(
        0.0,
        "candidates nearer to a point are refused, in neighbours' distances, a tenth at the end",
        minimum=0,
    )  # fmt: skip
    lr: float = setting(2e-3, "Adam's learning rate at the start; it falls as a cosine", minimum=0)

    def training(
        self, points: torch.Tensor, seed: int, device: str = "cpu"
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Learn from float32 points `(n, dim)`; yields (step, loss) after each step."""
        dim = points.shape[1]
        with seeded(seed, "mapper"):
            self.mapper_ = _perceptron(self.noise_dim, self.width, self.depth, dim).to(device)
        self.mean_ = points.mean(0).to(device)
        self.scale_ = float(points.std(0).square().mean().sqrt())
        data = (points.to(device) - self.mean_) / self.scale_
        some = data[: self.batch_size]
        apart = torch.cdist(some, some).fill_diagonal_(torch.inf).amin(1).median()
        optimiser = adam(self.mapper_, self.lr)
        for step in range(self.steps):
            random = random_generator(seed, "step", step)
            z = data[torch.randint(len(data), (self.batch_size,), generator=random)]
            e = torch.randn(self.candidates, self.noise_dim, generator=random).to(device)

            candidates = self.mapper_(e)
            distances = torch.cdist(z, candidates.detach())
            # Less and less: far ones are drawn in first, then all of a mode is matched.
            near = distances.amin(0) < self.refuse * apart * (1 - 0.9 * step / self.steps)
            if not near.all():  # else nothing were left to be chosen
                distances = distances.masked_fill(near, torch.inf)
            chosen = distances.argmin(1)
            loss = (candidates[chosen] - z).square().sum(1).mean()
            set_learning_rate(optimiser, learning_rate("cosine", self.lr, step, self.steps))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            yield step + 1, loss.detach()

    def fit(self, points: torch.Tensor, *, seed: int = 0, device: str = "cpu") -> "PointIMLE":
        """Learn from float32 points `(n, dim)`; returns self.

        Raises:
            NotFinite: if the loss is not.
        """
        loss = torch.zeros(())
        torch.set_flush_denormal(True)
        for _, loss in self.training(points, seed, device):  # noqa: B007
            pass
        torch.set_flush_denormal(False)
        if not loss.isfinite():
            raise NotFinite(f"the loss is not finite: {float(loss)}; try a lower lr")
        return self

    def sample(self, n: int, seed: int = 0) -> torch.Tensor:
        """New points: float32 `(n, dim)` on the CPU."""
        e = noise(seed, "sample", 0, n, self.noise_dim).to(self.mean_.device)
        with evaluation_mode(self.mapper_):
            made: torch.Tensor = self.mapper_(e) * self.scale_ + self.mean_
        return made.cpu()


@dataclass(kw_only=True)
class PointGLANN:
    """Both stages on points: a generator with a learned code for each point, IMLE on the codes.

    Stage two is the project's own, in cells; only the generator is another.
    """

    coded: int = setting(10_000, "points that get a code: the first ones", minimum=2)
    glo_steps: int = setting(5000, "of stage one", minimum=1)
    glo_batch: int = setting(500, "points in a step of stage one", minimum=1)
    imle_steps: int = setting(6000, "of stage two", minimum=1)
    lr: float = setting(2e-3, "Adam's learning rate of the generator", minimum=0)
    code_lr: float = setting(1e-2, "Adam's learning rate of the codes", minimum=0)
    width: int = setting(128, "units of each hidden layer", minimum=8)
    depth: int = setting(6, "hidden layers of the generator", minimum=1)

    def fit(self, points: torch.Tensor, *, seed: int = 0, device: str = "cpu") -> "PointGLANN":
        """Learn from float32 points `(n, dim)`; returns self."""
        points = points[: self.coded].to(device)
        self.mean_, self.scale_ = points.mean(0), float(points.std(0).square().mean().sqrt())
        data = (points - self.mean_) / self.scale_
        with seeded(seed, "point generator"):
            network = _perceptron(points.shape[1], self.width, self.depth, points.shape[1])
        self.generator_ = network.to(device)
        # The principal components of points in the plane, as stage one starts its codes.
        codes = (data @ torch.linalg.svd(data, full_matrices=False).Vh.T).requires_grad_()
        optimisers = [
            (adam(self.generator_, self.lr), self.lr),
            (torch.optim.Adam([codes], betas=(0.5, 0.999), fused=True), self.code_lr),
        ]
        for step in range(self.glo_steps):
            random = random_generator(seed, "stage one", step)
            rows = torch.randint(len(data), (self.glo_batch,), generator=random).to(device)
            loss = (self.generator_(codes[rows]) - data[rows]).square().sum(1).mean()
            for optimiser, lr in optimisers:
                set_learning_rate(optimiser, learning_rate("cosine", lr, step, self.glo_steps))
                optimiser.zero_grad()
            loss.backward()
            for optimiser, _ in optimisers:
                optimiser.step()
        self.loss_ = float(loss.detach())
        # In the plane a pool comes as near as one likes by itself.
        imle = IMLE(noise_dim=NOISE_DIM, width=self.width, detail=0.5, refine=0)
        imle.epochs = max(1, round(self.imle_steps * imle.batch_size / len(codes)))
        self.imle_ = imle.fit(codes.detach(), seed=seed, device=device)
        return self

    def sample(self, n: int, seed: int = 0) -> torch.Tensor:
        """New points: float32 `(n, dim)` on the CPU."""
        codes = self.imle_.sample(n, seed).to(self.mean_.device)
        with torch.no_grad():
            made: torch.Tensor = self.generator_(codes) * self.scale_ + self.mean_
        return made.cpu()
