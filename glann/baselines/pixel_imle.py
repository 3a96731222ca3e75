"""IMLE straight to pixels, without codes: the method's first form."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from glann.baselines.sampler import NoiseSampler, show
from glann.devices import Replayed, Rows
from glann.images import to_float
from glann.nearest import nearest
from glann.networks import Generator, evaluation_mode
from glann.optimisers import (
    adam,
    learning_rate,
    load_optimiser_state,
    optimiser_state,
    set_learning_rate,
)
from glann.randomness import noise, permutation
from glann.settings import setting
from glann.training import Batches, Parts, Training

NUMBERS_AT_ONCE = 2**25
"""Numbers of the images that are matched at a time, at the most: of large ones there are fewer."""


@dataclass(kw_only=True)
class PixelIMLE(NoiseSampler):
    """Implicit maximum likelihood estimation of a generator: min Σ_i min_j ‖x_i − G(e_j)‖².

    Li & Malik 2018 (arXiv 1809.09087), algorithm 1: for a random subset of the images, draw
    candidates, match, take steps; then the next subset.  Squared pixel error averages over what it
    can't tell apart: expect blur.
    """

    subset: int = setting(
        6000,
        "images that are matched at a time, at the most: of large ones there are fewer",
        minimum=2,
    )
    pool: float = setting(2.0, "candidates drawn for a matching, per image of it", minimum=0.01)
    keep: int = setting(1, "passes over a subset with one matching", minimum=1)
    lr: float = setting(1e-3, "Adam's learning rate at the start; it falls as a cosine", minimum=0)

    name: ClassVar[str] = "pixel-imle"

    def _batches(self, images: torch.Tensor) -> Batches:
        size = self.matched_at_once(images)
        return Batches(size, self.batch_size, self.images_seen / size)

    def matched_at_once(self, images: torch.Tensor) -> int:
        """How many of the images, uint8 `(n, c, h, w)`, are matched at a time."""
        held = max(self.batch_size, NUMBERS_AT_ONCE // images[0].numel())
        return min(len(images), self.subset, held)

    def _train(
        self,
        training: Training,
        generator: Generator,
        images: torch.Tensor,
        saved: Parts | None,
        seed: int,
        device: torch.device,
    ) -> Generator:
        optimiser = adam(generator, self.lr)
        batches = training.batches
        steps_of_matching = self.keep * batches.per_epoch
        chosen = subset = pool = torch.empty(0)
        if saved:
            load_optimiser_state(optimiser, saved["optimiser"])
            chosen = saved["matching"]["chosen"]
            subset, pool = self._draw(seed, (training.step - 1) // steps_of_matching, images)

        pictures = Rows(images, device)

        def learn(batch: torch.Tensor, e: torch.Tensor, lr: float) -> torch.Tensor:
            set_learning_rate(optimiser, lr)
            apart = generator(e) - to_float(batch)
            loss: torch.Tensor = apart.square().flatten(1).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            return loss.detach()

        learned = Replayed(learn, device)
        for step, rows in training.steps(seed):
            if step % steps_of_matching == 0:
                subset, pool = self._draw(seed, step // steps_of_matching, images)
                real = to_float(pictures[subset]).flatten(1)
                found, _ = nearest(real, _candidates(generator, pool.to(device)))
                chosen = found.cpu()
            lr = learning_rate("cosine", self.lr, step, batches.steps)
            loss = learned(pictures[subset[rows]], pool[chosen[rows]], lr)

            training.record(loss, lr=lr)
            if training.picture_due:
                show(training, generator, seed)
            if training.checkpoint_due:
                training.save(
                    {
                        "generator": generator.state_dict(),
                        "optimiser": optimiser_state(optimiser),
                        "matching": {"chosen": chosen},
                    }
                )
        return generator

    def _draw(
        self, seed: int, matching: int, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A matching's images, int64 `(subset,)`, and its noise, float32 `(pool · subset, dim)`.

        The subsets go through all images before one comes again.
        """
        n, size = len(images), self.matched_at_once(images)
        start = matching * size
        orders = [permutation(seed, "subset", start // n + i, n) for i in range(2)]
        subset = torch.cat(orders)[start % n :][:size]
        candidates = max(1, round(self.pool * size))
        return subset, noise(seed, f"candidates {matching}", 0, candidates, self.noise_dim)


def _candidates(generator: Generator, pool: torch.Tensor) -> torch.Tensor:
    """The flat images of every row of `pool`, as they come out when sampling."""
    with evaluation_mode(generator):
        return torch.cat([generator(part).flatten(1) for part in pool.split(512)])
