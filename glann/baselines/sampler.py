"""What all baselines share: GLANN's generator, fed with Gaussian noise, learned in one stage."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from glann import images as pixels
from glann.density import Gaussian
from glann.devices import pick_device, upload
from glann.errors import GlannError, check_fitted
from glann.networks import BLOCKS, Generator, evaluation_mode
from glann.pipeline import GLANN
from glann.randomness import generator as random_generator
from glann.randomness import noise, seeded
from glann.settings import as_dict, check, setting
from glann.storage import fingerprint
from glann.training import SNAPSHOT, Batches, Parts, Training, learning


@dataclass(kw_only=True)
class NoiseSampler:
    """An image sampler x = G(e), e ~ N(0, I).

    Each baseline says how G is learned, in its `_train`.  After `fit`: `generator_`, in evaluation
    mode, and `seconds_`, the time that training took.
    """

    images_seen: int = setting(
        1_200_000, "training images shown, each as often as it is", minimum=1
    )
    batch_size: int = setting(64, "images in a step, at the most", minimum=2)
    noise_dim: int = setting(64, "numbers in a noise vector", minimum=1, maximum=4096)
    width: int = setting(64, "channels before the generator's last layer", minimum=4, maximum=512)
    hidden: int = setting(1024, "units of the generator's first layer", minimum=8, maximum=8192)
    batch_norm: bool = setting(True, "BatchNorm in the generator")
    blocks: str = setting("transposed", "what the generator is made of", choices=BLOCKS)

    name: ClassVar[str]

    @learning
    def fit(
        self,
        images: object,
        *,
        seed: int = 0,
        device: str = "auto",
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> "NoiseSampler":
        """Learn from images, uint8 `(n, channels, height, width)`; returns self.

        Arguments, resuming and errors as in `glann.GLO.fit`.
        """
        check(self, self.name)
        images = pixels.as_images(images)
        channels, height, width = images.shape[1:]
        if not (8 <= height <= 256 and 8 <= width <= 256):
            raise GlannError(f"images are {height}×{width}; wanted sides from 8 to 256")
        on_device = pick_device(device)
        identity = {"settings": as_dict(self), "seed": seed, "data": fingerprint(images)}
        with seeded(seed, "generator"):
            generator = Generator(
                code_dim=self.noise_dim,
                image_shape=(channels, height, width),
                width=self.width,
                hidden=self.hidden,
                batch_norm=self.batch_norm,
                blocks=self.blocks,
                on_sphere=False,
            )
        with Training(self.name, self._batches(images), folder, identity, progress) as training:
            saved = training.resume()
            if saved:
                generator.load_state_dict(saved["generator"])
            if not training.done:
                generator.to(on_device).train()
                generator = self._train(training, generator, images, saved, seed, on_device)
                parts = {"generator": generator.state_dict()}
                training.save(parts, done=True, generator=generator.config)
            self.seconds_ = training.elapsed
        self.generator_ = generator.cpu().eval()
        return self

    def _batches(self, images: torch.Tensor) -> Batches:
        n = len(images)
        return Batches(n, self.batch_size, self.images_seen / n)

    def _train(
        self,
        training: Training,
        generator: Generator,
        images: torch.Tensor,
        saved: Parts | None,
        seed: int,
        device: torch.device,
    ) -> Generator:
        """Train `generator`, from `saved` on if it is given; returns what is to be sampled."""
        raise NotImplementedError

    @property
    def pipeline_(self) -> GLANN:
        """What was learned, as a pipeline: to sample, interpolate, save."""
        return GLANN(self.generator_, Gaussian.standard(self.noise_dim))

    def sample(self, n: int, seed: int = 0, start: int = 0) -> torch.Tensor:
        """New images, number `start` to `start + n` of `seed`: uint8 `(n, c, h, w)`."""
        check_fitted(self, "pipeline_")
        return self.pipeline_.sample(n, seed, start)


def show(training: Training, generator: Generator, seed: int) -> None:
    """Keep samples of this moment of a training, and a picture of the first 64."""
    device = next(generator.parameters()).device
    dim = generator.config["code_dim"]
    made = []
    with evaluation_mode(generator):
        for part in noise(seed, "snapshot", 0, SNAPSHOT, dim).split(256):
            made.append(pixels.to_uint8(generator(part.to(device))).cpu())
    samples = torch.cat(made)
    training.snapshot(samples)
    training.picture("samples", pixels.grid(samples[:64], columns=8))


def step_noise(seed: int, step: int, n: int, dim: int, device: torch.device) -> torch.Tensor:
    """The noise of a training step: float32 `(n, dim)`."""
    return upload(torch.randn(n, dim, generator=random_generator(seed, "noise", step)), device)


def tensors_of(network: nn.Module) -> Iterator[torch.Tensor]:
    """A network's numbers: its weights and its running statistics."""
    return (tensor for tensor in network.state_dict().values() if tensor.is_floating_point())
