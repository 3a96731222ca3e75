"""Generative adversarial networks: one class, whose loss, penalty and normalisation have names."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from glann.baselines.adversarial import LOSSES, PENALTIES
from glann.baselines.sampler import NoiseSampler, show, step_noise, tensors_of
from glann.devices import Replayed, Rows, upload
from glann.images import to_float
from glann.networks import NORMS, Encoder, Generator
from glann.optimisers import adam, load_optimiser_state, optimiser_state
from glann.randomness import generator as random_generator
from glann.randomness import seeded
from glann.settings import setting
from glann.training import Parts, Training


@dataclass(kw_only=True)
class GAN(NoiseSampler):
    """A generator learned against a discriminator that tells its images from real ones.

    The published combinations of these settings have names: `glann.baselines.MODELS`.
    """

    loss: str = setting("non-saturating", "what both minimise", choices=tuple(LOSSES))
    penalty: str = setting("none", "on the discriminator's gradients", choices=("none", *PENALTIES))
    penalty_weight: float = setting(10.0, "of the penalty", minimum=0)
    norm: str = setting("batch", "the discriminator's normalisation", choices=NORMS)
    clip: float = setting(0.0, "its weights are clipped to ± this; 0: not", minimum=0)
    discriminator_steps: int = setting(1, "for each of the generator", minimum=1, maximum=100)
    lr: float = setting(2e-4, "Adam's learning rate, of both", minimum=0)
    beta1: float = setting(0.5, "Adam's first moment", minimum=0, maximum=0.9999)
    beta2: float = setting(0.999, "Adam's second moment", minimum=0, maximum=0.99999)
    ema: float = setting(0.0, "decay of the averaged generator; 0: none", minimum=0, maximum=1)
    gamma: float = setting(0.75, "BEGAN: errors of fake over real images", minimum=0, maximum=1)
    balance_rate: float = setting(1e-3, "BEGAN: how fast their balance is kept", minimum=0)

    name: ClassVar[str] = "gan"

    def _train(
        self,
        training: Training,
        generator: Generator,
        images: torch.Tensor,
        saved: Parts | None,
        seed: int,
        device: torch.device,
    ) -> Generator:
        with seeded(seed, "discriminator"):
            discriminator = self._discriminator(generator).to(device)
        averaged = copy.deepcopy(generator).requires_grad_(False)
        balance = torch.zeros((), device=device)  # BEGAN's k
        betas = (self.beta1, self.beta2)
        generator_adam = adam(generator, self.lr, betas=betas)
        discriminator_adam = adam(discriminator, self.lr, betas=betas)
        if saved:
            discriminator.load_state_dict(saved["discriminator"])
            averaged.load_state_dict(saved["averaged"])
            balance.copy_(saved["balance"]["k"])
            load_optimiser_state(generator_adam, saved["generator_adam"])
            load_optimiser_state(discriminator_adam, saved["discriminator_adam"])
        loss, penalty = LOSSES[self.loss], PENALTIES.get(self.penalty)
        pictures = Rows(images, device)
        generator_loss = torch.zeros(())

        def learn_discriminator(
            real: torch.Tensor, fake: torch.Tensor, drawn: torch.Tensor
        ) -> torch.Tensor:
            real_scores, fake_scores = discriminator(real), discriminator(fake)
            weight = balance if self.loss == "boundary-equilibrium" else 1
            discriminator_loss = loss.discriminator(real_scores, weight * fake_scores)
            if penalty:
                weighed = self.penalty_weight * penalty.of(discriminator, real, fake, drawn)
                discriminator_loss = discriminator_loss + weighed
            discriminator_adam.zero_grad()
            discriminator_loss.backward()
            discriminator_adam.step()
            with torch.no_grad():
                if self.loss == "boundary-equilibrium":
                    gap = self.gamma * real_scores.mean() - fake_scores.mean()
                    balance.add_(self.balance_rate * gap).clamp_(0, 1)
                if self.clip:
                    for weights in discriminator.parameters():
                        weights.clamp_(-self.clip, self.clip)
            return discriminator_loss.detach()

        def learn_generator(real: torch.Tensor, fake: torch.Tensor, decay: float) -> torch.Tensor:
            discriminator.requires_grad_(False)
            real_scores = torch.empty(0)
            if self.loss == "relativistic":  # no other generator looks at them
                real_scores = discriminator(real).detach()
            generator_loss = loss.generator(real_scores, discriminator(fake))
            generator_adam.zero_grad()
            generator_loss.backward()
            generator_adam.step()
            discriminator.requires_grad_(True)
            if self.ema:
                average(averaged, generator, decay)
            return generator_loss.detach()

        def learn(batch: torch.Tensor, e: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
            """A step in which the discriminator alone learns."""
            with torch.no_grad():
                fake = generator(e)
            return learn_discriminator(self._real(batch), fake, drawn)

        def learn_both(
            batch: torch.Tensor, e: torch.Tensor, drawn: torch.Tensor, decay: float
        ) -> tuple[torch.Tensor, torch.Tensor]:
            real, fake = self._real(batch), generator(e)
            discriminator_loss = learn_discriminator(real, fake.detach(), drawn)
            return discriminator_loss, learn_generator(real, fake, decay)

        learned, both_learned = Replayed(learn, device), Replayed(learn_both, device)
        for step, rows in training.steps(seed):
            batch = pictures[rows]
            e = step_noise(seed, step, len(rows), self.noise_dim, device)
            drawn = torch.empty(0, device=device)
            if penalty:
                random = random_generator(seed, "penalty", step)
                drawn = upload(penalty.draw(batch.shape, random), device)
            if (step + 1) % self.discriminator_steps:
                discriminator_loss = learned(batch, e, drawn)
            else:
                decay = self._decay(step // self.discriminator_steps)
                discriminator_loss, generator_loss = both_learned(batch, e, drawn, decay)

            training.record(discriminator_loss, lr=self.lr, generator_loss=generator_loss)
            if training.picture_due:
                show(training, averaged if self.ema else generator, seed)
            if training.checkpoint_due:
                training.save(
                    {
                        "generator": generator.state_dict(),
                        "discriminator": discriminator.state_dict(),
                        "averaged": averaged.state_dict(),
                        "balance": {"k": balance},
                        "generator_adam": optimiser_state(generator_adam),
                        "discriminator_adam": optimiser_state(discriminator_adam),
                    }
                )
        return averaged if self.ema else generator

    def _real(self, images: torch.Tensor) -> torch.Tensor:
        """A batch as the discriminator sees it."""
        return to_float(images)

    def _discriminator(self, generator: Generator) -> nn.Module:
        if self.loss == "boundary-equilibrium":
            return Autoencoder(generator, self.norm)
        return Encoder(generator.image_shape, 1, self.width, self.hidden, self.norm)

    def _decay(self, step: int) -> float:
        """Of the averaged generator, at the generator's step number `step`."""
        # The first steps count less than they would: they are far from where it goes.
        return min(self.ema, (1 + step) / (10 + step))


def average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the numbers of `averaged` towards those of `network`, keeping a share `decay`."""
    for mean, now in zip(tensors_of(averaged), tensors_of(network), strict=True):
        mean.lerp_(now, 1 - decay)


class Autoencoder(nn.Module):
    """BEGAN's discriminator: an image's score is its error |x − A(x)| under an autoencoder.

    Encoder and decoder are the other GANs' discriminator and generator, as in Lucic et al.
    """

    def __init__(self, generator: Generator, norm: str) -> None:
        super().__init__()
        size = generator.config
        self.encoder = Encoder(
            generator.image_shape, size["code_dim"], size["width"], size["hidden"], norm
        )
        self.decoder = Generator(**{**size, "batch_norm": norm == "batch"})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float images `(n, c, h, w)` in [0, 1] → their mean absolute errors `(n, 1)`."""
        errors: torch.Tensor = (self.decoder(self.encoder(images)) - images).abs()
        return errors.flatten(1).mean(1, keepdim=True)
