"""What GANs minimise: losses on a discriminator's scores, and penalties on its gradients.

A score is the discriminator's output before any sigmoid, `(n, 1)`: high for images that it takes
for real.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import relu, softplus

Scores = torch.Tensor


class Loss(NamedTuple):
    """Both players' losses, (real scores, fake scores) → scalar."""

    discriminator: Callable[[Scores, Scores], torch.Tensor]
    generator: Callable[[Scores, Scores], torch.Tensor]


def _cross_entropy(real: Scores, fake: Scores) -> torch.Tensor:
    return softplus(-real).mean() + softplus(fake).mean()


def _critic(real: Scores, fake: Scores) -> torch.Tensor:
    return fake.mean() - real.mean()


LOSSES = {
    # Goodfellow et al. 2014 (arXiv 1406.2661), equation 1: the generator minimises log(1 − D).
    "minimax": Loss(_cross_entropy, lambda real, fake: -softplus(fake).mean()),
    # The same, section 3: it maximises log D, whose gradient doesn't vanish so early.
    "non-saturating": Loss(_cross_entropy, lambda real, fake: softplus(-fake).mean()),
    # Mao et al. 2017 (arXiv 1611.04076), equation 9: targets 0 and 1.
    "least-squares": Loss(
        lambda real, fake: ((real - 1).square().mean() + fake.square().mean()) / 2,
        lambda real, fake: (fake - 1).square().mean() / 2,
    ),
    # Arjovsky, Chintala & Bottou 2017 (arXiv 1701.07875), equations 2 and 3.
    "wasserstein": Loss(_critic, lambda real, fake: -fake.mean()),
    # Lim & Ye 2017 (arXiv 1705.02894); Miyato et al. 2018 (arXiv 1802.05957), equations 16 and 17.
    "hinge": Loss(
        lambda real, fake: relu(1 - real).mean() + relu(1 + fake).mean(),
        lambda real, fake: -fake.mean(),
    ),
    # Jolicoeur-Martineau 2018 (arXiv 1807.00734); Huang et al. 2024 (arXiv 2501.05441), equation 2:
    # each fake image against one real image.
    "relativistic": Loss(
        lambda real, fake: softplus(fake - real).mean(),
        lambda real, fake: softplus(real - fake).mean(),
    ),
    # Berthelot, Schumm & Metz 2017 (arXiv 1703.10717), equation 5, with errors of an autoencoder as
    # scores; the weight k of the fake ones is `GAN`'s to balance.
    "boundary-equilibrium": Loss(
        lambda real, fake: real.mean() - fake.mean(),
        lambda real, fake: fake.mean(),
    ),
}


def _squared_gradient(discriminator: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """‖∇D(x)‖² for each of `images`, `(n,)`, differentiable."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradient.flatten(1).square().sum(1)


def _slope_of_one(discriminator: nn.Module, images: torch.Tensor) -> torch.Tensor:
    # The root's own gradient is infinite at 0.
    return ((_squared_gradient(discriminator, images) + 1e-12).sqrt() - 1).square().mean()


def gradient_penalty(
    discriminator: nn.Module, real: torch.Tensor, fake: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """E (‖∇D(x̂)‖ − 1)² on lines between real and fake images; `shares`: where on them.

    Gulrajani et al. 2017 (arXiv 1704.00028), equation 3.
    """
    return _slope_of_one(discriminator, real.lerp(fake, shares))


def dragan_penalty(
    discriminator: nn.Module, real: torch.Tensor, fake: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """The same around real images: x + .5 · std(x) · noise.

    Kodali et al. 2017 (arXiv 1705.07215), as in their code.
    """
    return _slope_of_one(discriminator, real + 0.5 * real.std() * noise)


def zero_centred_penalty(
    discriminator: nn.Module, real: torch.Tensor, fake: torch.Tensor, nothing: torch.Tensor
) -> torch.Tensor:
    """R1 + R2: E ‖∇D(x)‖² / 2 on real images, and the same on fake ones.

    Mescheder et al. 2018 (arXiv 1801.04406), equation 9; both in R3GAN (arXiv 2501.05441).
    """
    both = _squared_gradient(discriminator, torch.cat([real, fake]))
    return both.sum() / (2 * len(real))


def _shares(shape: torch.Size, random: torch.Generator) -> torch.Tensor:
    """U[0, 1] for each item of `shape`, in as many dimensions."""
    return torch.rand(shape[0], *[1] * (len(shape) - 1), generator=random)


class Penalty(NamedTuple):
    """A penalty on gradients, and what it draws at random.

    Attributes:
        draw: (shape of a batch, generator of random numbers) → what `of` takes last, on the CPU.
        of: (discriminator, real images, fake ones, what was drawn) → scalar, differentiable.
    """

    draw: Callable[[torch.Size, torch.Generator], torch.Tensor]
    of: Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


PENALTIES = {
    "interpolated": Penalty(_shares, gradient_penalty),
    "around-real": Penalty(
        # One share for each image, times a number for each pixel.
        lambda shape, random: _shares(shape, random) * torch.rand(shape, generator=random),
        dragan_penalty,
    ),
    "zero-centred": Penalty(lambda shape, random: torch.empty(0), zero_centred_penalty),
}
