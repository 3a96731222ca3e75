"""Norms of generators' gradients: against a discriminator that is trained, and by themselves."""

import copy
import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from glann.baselines.adversarial import LOSSES, PENALTIES
from glann.baselines.gan import GAN
from glann.devices import upload
from glann.glo import GLO
from glann.images import to_float
from glann.imle import IMLE
from glann.losses import make_loss
from glann.nearest import nearest
from glann.networks import Encoder, Generator
from glann.optimisers import adam
from glann.randomness import generator as random_generator
from glann.randomness import seeded
from glann.training import Batches, Training

Point = dict[str, float]

SMALLEST = 1e-45
"""float32's: a gradient that has vanished altogether still has a logarithm."""

MEASURED = 16
"""Batches on whose mean loss a gradient is taken: the same at every measurement of a run."""


MATCHING = 2**31
"""Number of the measured matching: that of no training, which has other candidates."""


def norm_and_loss(losses: Iterable[torch.Tensor], network: nn.Module) -> tuple[float, float]:
    """(‖∇_θ L‖₂, L) of the mean L of some batches' losses, θ all weights of `network`."""
    weights = list(network.parameters())
    total = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    values = []
    for loss in losses:
        for mean, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
            mean += gradient
        values.append(float(loss.detach()))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in total))
    return norm / len(values), math.fsum(values) / len(values)


def against_discriminator(
    gan: GAN,
    frozen: Generator,
    images: torch.Tensor,
    at: Sequence[int],
    seed: int,
    device: torch.device,
) -> list[Point]:
    """The norm of a frozen generator's gradient after steps `at` of a fresh discriminator.

    Both networks are in training mode and the losses, penalties and optimiser are `gan`'s, as in a
    step of its own training; only the generator stands still.

    Args:
        gan: which loss, penalty, normalisation, clip and optimiser.
        frozen: the generator.
        images: uint8 `(n, c, h, w)`.
        at: discriminator's steps after which to measure, rising, each 1 or more.
        seed: of the discriminator's start, the batches and all noise.
        device: where it is computed.

    Returns:
        For each of `at` its "step", the generator's gradient's "norm", both players' losses
        "generator_loss" and "discriminator_loss" on the measured and on the last batch.
    """
    generator = copy.deepcopy(frozen).to(device).train()
    with seeded(seed, "fresh discriminator"):
        discriminator = Encoder(generator.image_shape, 1, gan.width, gan.hidden, gan.norm)
    discriminator.to(device)
    optimiser = adam(discriminator, gan.lr, betas=(gan.beta1, gan.beta2))
    loss = LOSSES[gan.loss]
    n = len(images)
    batches = Batches(n, gan.batch_size, at[-1] / Batches(n, gan.batch_size, 1).per_epoch)
    points = []

    with Training("discriminator", batches, None, {}, False) as training:
        for step, rows in training.steps(seed):
            real = to_float(images[rows].to(device))
            with torch.no_grad():
                fake = generator(_noise(seed, "fresh", step, len(rows), generator))
            discriminator_loss = loss.discriminator(discriminator(real), discriminator(fake))
            if gan.penalty != "none":
                random = random_generator(seed, "penalty", step)
                penalty = PENALTIES[gan.penalty]
                drawn = upload(penalty.draw(real.shape, random), device)
                weighed = gan.penalty_weight * penalty.of(discriminator, real, fake, drawn)
                discriminator_loss = discriminator_loss + weighed
            optimiser.zero_grad()
            discriminator_loss.backward()
            optimiser.step()
            if gan.clip:
                with torch.no_grad():
                    for weights in discriminator.parameters():
                        weights.clamp_(-gan.clip, gan.clip)
            training.record(discriminator_loss, lr=gan.lr)

            if training.step in at:
                losses = _generator_losses(gan, generator, discriminator, images, seed)
                norm, generator_loss = norm_and_loss(losses, generator)
                points.append(
                    {
                        "step": training.step,
                        "norm": norm,
                        "generator_loss": generator_loss,
                        "discriminator_loss": float(discriminator_loss.detach()),
                    }
                )
    return points


def _generator_losses(
    gan: GAN, generator: Generator, discriminator: nn.Module, images: torch.Tensor, seed: int
) -> Iterator[torch.Tensor]:
    """L_G on the same batches of noise, and of real images, at every measurement."""
    # A copy: even a look through spectral normalisation moves it.
    discriminator = copy.deepcopy(discriminator)
    device = next(generator.parameters()).device
    for i, rows in enumerate(measured_rows(len(images), gan.batch_size, seed)):
        fake = generator(_noise(seed, "measured", i, len(rows), generator))
        with torch.no_grad():
            real_scores = discriminator(to_float(images[rows].to(device)))
        yield LOSSES[gan.loss].generator(real_scores, discriminator(fake))


def of_imle(imle: IMLE, codes: torch.Tensor, pool: float, seed: int, device: torch.device) -> Point:
    """The norm of the gradient of a fitted IMLE's mapper, and its loss, the error that is left.

    Each code is matched among `pool` candidates for each of them, as in a step of its training, and
    the loss is the training's: 1 is what the cells' centres alone would give, for each level.

    Returns:
        "norm", "loss".
    """
    mapper = copy.deepcopy(imle.mapper_).to(device)
    codes = imle.metric_.coordinates(codes).to(device)
    cells, _ = nearest(codes, mapper.centres)
    counts = cells.bincount(minlength=len(mapper.centres)).cpu()
    matching = dataclasses.replace(imle, pool=pool)
    chosen, _ = matching.match(mapper, codes, cells, counts, seed, MATCHING)
    mapper.train()
    losses = (
        ((mapper(chosen[rows], cells[rows], every=True) - codes[rows]) / mapper.scale)
        .square()
        .mean((1, 2))
        .sum()
        for rows in measured_rows(len(codes), imle.batch_size, seed)
    )
    norm, loss = norm_and_loss(losses, mapper)
    return {"norm": norm, "loss": loss}


def of_glo(glo: GLO, images: torch.Tensor, seed: int, device: torch.device) -> Point:
    """The norm of the gradient of a fitted GLO's generator, and its loss, the error that is left.

    Returns:
        "norm", "loss".
    """
    generator = copy.deepcopy(glo.generator_).to(device).train()
    size = images.shape[2], images.shape[3]
    loss_of = make_loss(glo.loss, size, device, glo.vgg_weights, glo.features_)
    losses = (
        loss_of(generator(glo.codes_[rows].to(device)), to_float(images[rows].to(device))).mean()
        for rows in measured_rows(len(images), glo.batch_size, seed)
    )
    norm, loss = norm_and_loss(losses, generator)
    return {"norm": norm, "loss": loss}


def measured_rows(n: int, batch_size: int, seed: int) -> list[torch.Tensor]:
    """The rows of MEASURED batches of n items, or of as many as there are."""
    # An epoch that no training comes to: an order of its own.
    return Batches(n, batch_size, 1).epoch_of(seed, 2**31)[:MEASURED]


def _noise(seed: int, purpose: str, index: int, n: int, generator: Generator) -> torch.Tensor:
    """Float32 `(n, dim)` where the generator is."""
    random = random_generator(seed, f"{purpose} noise", index)
    device = next(generator.parameters()).device
    return torch.randn(n, int(generator.config["code_dim"]), generator=random).to(device)


def falls(curves: Sequence[Sequence[Point]], key: str = "norm") -> dict[str, float]:
    """By what factors a number fell along curves, as geometric means.

    Returns:
        "fell", from the first point to the last (below 1: it rose), and "fell_from_peak", from the
        highest point to the last; with "_spread", the factor that is one standard deviation.
    """
    lines = [[max(point[key], SMALLEST) for point in curve] for curve in curves]
    first = [line[0] / line[-1] for line in lines]
    peak = [max(line) / line[-1] for line in lines]
    found: dict[str, float] = {}
    for name, values in (("fell", first), ("fell_from_peak", peak)):
        logarithms = [math.log(value) for value in values]
        spread = statistics.stdev(logarithms) if len(values) > 1 else 0.0
        found |= {name: math.exp(statistics.fmean(logarithms)), f"{name}_spread": math.exp(spread)}
    return found
