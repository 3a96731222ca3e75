"""Data of known density: mixtures of equal Gaussians in the plane, as GANs are tested with."""

import math
from dataclasses import dataclass

import torch

from glann.randomness import generator, noise


@dataclass(frozen=True)
class GaussianMixture:
    """Equally likely Gaussians of one standard deviation, around `centres`, float `(modes, d)`."""

    centres: torch.Tensor
    sigma: float

    def sample(self, n: int, seed: int, purpose: str = "data") -> torch.Tensor:
        """Points number 0 to n of a seed: float32 `(n, d)`."""
        modes, dim = self.centres.shape
        which = torch.randint(modes, (n,), generator=generator(seed, f"{purpose} modes"))
        return self.centres[which] + self.sigma * noise(seed, purpose, 0, n, dim)

    def log_density(self, points: torch.Tensor) -> torch.Tensor:
        """The logarithm of p(x), float64 `(n,)`, of points `(n, d)`, in nats."""
        modes, dim = self.centres.shape
        squared = torch.cdist(points.double(), self.centres.double()).square()
        exponents = torch.logsumexp(-squared / (2 * self.sigma**2), 1)
        constant = math.log(modes) + dim * math.log(self.sigma * math.sqrt(2 * math.pi))
        return exponents - constant


def ring(modes: int = 8, radius: float = 1.0, sigma: float = 0.01) -> GaussianMixture:
    """VEEGAN's ring: Gaussians on a circle (arXiv 1705.07761, section 4.1)."""
    angles = 2 * math.pi * torch.arange(modes) / modes
    return GaussianMixture(radius * torch.stack([angles.cos(), angles.sin()], 1), sigma)


def grid(side: int = 5, spacing: float = 2.0, sigma: float = 0.05) -> GaussianMixture:
    """VEEGAN's grid: Gaussians at {−4, −2, 0, 2, 4}² (arXiv 1705.07761, section 4.1)."""
    places = spacing * (torch.arange(side, dtype=torch.float32) - (side - 1) / 2)
    return GaussianMixture(torch.cartesian_prod(places, places), sigma)


MIXTURES = {"ring": ring(), "grid": grid()}
"""The two that the studies use, by name."""
