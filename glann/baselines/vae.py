"""The variational autoencoder: the likelihood-based sampler of the same shape."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import binary_cross_entropy, softplus

from glann.baselines.sampler import NoiseSampler, show, step_noise
from glann.devices import Replayed, Rows
from glann.images import to_float
from glann.networks import Encoder, Generator
from glann.optimisers import adam, load_optimiser_state, optimiser_state
from glann.randomness import seeded
from glann.settings import setting
from glann.training import Parts, Training


@dataclass(kw_only=True)
class VAE(NoiseSampler):
    """A decoder learned with an encoder, both maximising a bound on the likelihood.

    Kingma & Welling 2014 (arXiv 1312.6114), equation 10, with a Bernoulli likelihood of the pixels
    as in Lucic et al. (arXiv 1711.10337).
    """

    lr: float = setting(1e-3, "Adam's learning rate", minimum=0)
    beta1: float = setting(0.9, "Adam's first moment", minimum=0, maximum=0.9999)

    name: ClassVar[str] = "vae"

    def _train(
        self,
        training: Training,
        generator: Generator,
        images: torch.Tensor,
        saved: Parts | None,
        seed: int,
        device: torch.device,
    ) -> Generator:
        with seeded(seed, "encoder"):
            outputs = 2 * self.noise_dim
            encoder = Encoder(generator.image_shape, outputs, self.width, self.hidden).to(device)
        both = torch.nn.ModuleList([generator, encoder])
        optimiser = adam(both, self.lr, betas=(self.beta1, 0.999))
        if saved:
            encoder.load_state_dict(saved["encoder"])
            load_optimiser_state(optimiser, saved["optimiser"])

        pictures = Rows(images, device)

        def learn(batch: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            real = to_float(batch)
            mean, spread = encoder(real).chunk(2, dim=1)
            std = softplus(spread) + 1e-6
            decoded = generator(mean + std * e)

            error = binary_cross_entropy(decoded, real, reduction="sum") / len(real)
            divergence = (mean.square() + std.square() - 1).sum(1).mean() / 2
            divergence = divergence - std.log().sum(1).mean()
            loss = error + divergence
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            return loss.detach(), divergence.detach()

        learned = Replayed(learn, device)
        for step, rows in training.steps(seed):
            e = step_noise(seed, step, len(rows), self.noise_dim, device)
            loss, divergence = learned(pictures[rows], e)

            training.record(loss, lr=self.lr, divergence=divergence)
            if training.picture_due:
                show(training, generator, seed)
            if training.checkpoint_due:
                training.save(
                    {
                        "generator": generator.state_dict(),
                        "encoder": encoder.state_dict(),
                        "optimiser": optimiser_state(optimiser),
                    }
                )
        return generator
