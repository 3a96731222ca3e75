"""Features that images teach by themselves, without labels: what the loss "contrastive" compares.

SimCLR (Chen, Kornblith, Norouzi & Hinton, arXiv 2002.05709).  Each image of a batch is seen twice,
moved a little, brighter or darker, and with a square blotted out; a network learns to tell which
two views are of one image.  What it goes by, strokes and seams, folds and soles, is what an image
has to have to be this one, and what a mean over pixels gives up first.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.modules.batchnorm import _BatchNorm

from glann import processes, storage
from glann.devices import Replayed, Rows, autocast
from glann.errors import GlannError
from glann.images import moved, to_float
from glann.optimisers import (
    Muon,
    learning_rate,
    load_optimiser_state,
    optimiser_state,
    set_learning_rate,
)
from glann.randomness import generator as random_generator
from glann.randomness import permutation, seeded
from glann.storage import fingerprint
from glann.training import Batches, Training

BATCH = 256
"""Images in a step, each seen twice and told apart from all others: the more the better."""

PIXELS = 2**20
"""Pixels of a step's images, so that of large ones there are fewer; but 32 there may be."""

TEMPERATURE = 0.2
"""Of the softmax over cosines."""

LR = 1.5e-2
"""Muon's learning rate at its highest."""

NETWORK = "convolutions of 3×3, by Muon"
"""What learns, and how, of images up to 64×64; `_network` of all."""

HIDDEN, NUMBERS = 256, 128
"""Units of the last layer but one, and numbers that come out."""

CALIBRATION = 10_000
"""Images that BatchNorm's statistics are of in the end, at the most: views are darker."""


class Features(nn.Module):
    """Image → what the hidden layers of a network make of it.

    Convolutions of 3×3 with stride 2 halve an image three times, one of up to 16×16 twice and one
    larger than 128×128 four times.  Two full layers follow.  BatchNorm after all layers but the
    first and the last, then LeakyReLU .2.

    Args:
        image_shape: (channels, height, width), each side from 8 to 256.
        width: channels of the first layer; each further one has twice as many, up to 512.
    """

    spreads: torch.Tensor

    def __init__(self, image_shape: tuple[int, int, int], width: int = 32) -> None:
        super().__init__()
        inputs, height, across = image_shape
        layers: list[nn.Module] = []
        side = max(height, across)
        halvings = 2 if side <= 16 else 3 if side <= 128 else 4
        for channels in [min(512, width << i) for i in range(halvings)]:
            norm = [nn.BatchNorm2d(channels)] if layers else []
            layers.append(nn.Conv2d(inputs, channels, 3, 2, 1, bias=not norm))
            layers += [*norm, nn.LeakyReLU(0.2)]
            inputs, height, across = channels, (height + 1) // 2, (across + 1) // 2
        layers += [nn.Flatten(), nn.Linear(inputs * height * across, HIDDEN, bias=False)]
        layers += [nn.BatchNorm1d(HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, NUMBERS)]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("spreads", torch.ones(halvings + 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What each hidden layer makes of float images: `(n, c, h, w)`, the last `(n, HIDDEN)`."""
        found = []
        for layer in self.layers.children():
            images = layer(images)
            if isinstance(layer, nn.LeakyReLU):
                found.append(images)
        return found

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Float images `(n, c, h, w)` in [0, 1] → a tensor `(n, …)` of each layer.

        Each has standard deviation 1 on training images: all layers count alike.
        """
        found = self.activations(images)
        return [each / spread for each, spread in zip(found, self.spreads, strict=True)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """What views are told apart by: float images `(n, c, h, w)` → `(n, NUMBERS)`."""
        numbers: torch.Tensor = self.layers(images)
        return numbers


def view(images: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """One view of each image: moved, brighter or darker, and with a square blotted out.

    Moved by up to a ninth of a side, where what comes in repeats the edge; each channel by .6 to
    1.4 times as bright; the square is black and has two sevenths of the shorter side.

    Args:
        images: float `(n, c, h, w)`.
        chance: uniform in [0, 1), float `(n, 4 + c)`.

    Returns:
        float `(n, c, h, w)`.
    """
    channels, height, width = images.shape[1:]
    ways, top, left, gains = chance.split([2, 1, 1, channels], dim=1)
    at_row = torch.arange(height, device=images.device)
    at_column = torch.arange(width, device=images.device)
    side = max(1, round(min(height, width) * 2 / 7))

    def within(at: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        start = (start * (len(at) - side + 1)).long()
        return (at >= start) & (at < start + side)

    blotted = within(at_row, top)[:, :, None] & within(at_column, left)[:, None, :]
    lit: torch.Tensor = moved(images, ways) * (0.6 + 0.8 * gains)[:, :, None, None]
    return lit.masked_fill(blotted[:, None], 0)


def contrast(numbers: torch.Tensor) -> torch.Tensor:
    """The loss NT-Xent of SimCLR (equation 1) of `(2n, d)`: rows i and n + i are of one image."""
    n = len(numbers) // 2
    numbers = normalize(numbers)
    alike = numbers @ numbers.T / TEMPERATURE
    itself = torch.eye(2 * n, dtype=torch.bool, device=numbers.device)
    other = torch.arange(2 * n, device=numbers.device).roll(n)
    loss: torch.Tensor = cross_entropy(alike.masked_fill(itself, -torch.inf), other)
    return loss


def images_at_once(height: int, width: int) -> int:
    """How many images of this size a step may have, for memory's sake."""
    return max(32, PIXELS // (height * width))


def images_in_a_step(n: int, height: int, width: int) -> int:
    """How many of n images of this size a step sees, at the most."""
    return min(n, BATCH, images_at_once(height, width))


def learn_features(
    images: torch.Tensor,
    *,
    epochs: float,
    width: int = 32,
    seed: int = 0,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    folder: Path | None = None,
    progress: bool = False,
) -> tuple[Features, float, float]:
    """Learn features of images, or load what the same call has learned before.

    Args:
        images: uint8 `(n, channels, height, width)`.
        epochs: passes over the images.
        width: of the network, as of `Features`.
        seed: of starting weights, order and views.
        device: where to compute.
        precision: of matrix products.
        folder: where checkpoint and log go; the same call resumes there.
        progress: show progress on standard error.

    Returns:
        the features, in evaluation mode on the CPU, and the seconds and CPU seconds that they took.

    Raises:
        GlannError: a folder of another training, a loss that is not finite; Interrupted after
            Ctrl-C, when there is a folder.
    """
    n, channels, height, across = images.shape
    batch_size = images_in_a_step(n, height, across)
    batches = Batches(n, batch_size, epochs)
    network = _network((channels, height, across))
    settings = {"epochs": batches.epochs, "network": network, "width": width}
    identity = {"settings": settings, "seed": seed, "data": fingerprint(images)}
    with seeded(seed, "features"):
        features = Features((channels, height, across), width)
    with Training("features", batches, folder, identity, progress) as training:
        saved = training.resume()
        if saved:
            features.load_state_dict(saved["features"])
        if not training.done:
            features.to(device).train()
            optimiser = Muon(features, LR, betas=(0.9, 0.999))
            if saved:
                load_optimiser_state(optimiser, saved["optimiser"])
            table = Rows(images, device)

            def learn(sent: torch.Tensor, chance: torch.Tensor, lr: float) -> torch.Tensor:
                set_learning_rate(optimiser, lr)
                batch = to_float(table.found(sent))
                views = torch.cat([view(batch, part) for part in chance])
                with autocast(precision, device):
                    numbers = features(views)
                loss = contrast(numbers.float())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                return loss.detach()

            learned = Replayed(learn, device, exact=precision == torch.float32)
            for step, rows in training.steps(seed):
                # Every process learns it all: a view is told apart from those of the whole batch.
                lr = learning_rate("one-cycle", LR, step, batches.steps)
                random = random_generator(seed, "views", step)
                chance = torch.rand(2, len(rows), 4 + channels, generator=random)
                loss = learned(table.sent(rows), chance, lr)

                training.record(loss / processes.count(), lr=lr)
                if training.checkpoint_due:
                    state = {"optimiser": optimiser_state(optimiser)}
                    training.save({"features": features.state_dict(), **state})
            optimiser.zero_grad()
            _calibrate(features, images, batch_size, device, seed)
            processes.agree(features)
            training.save({"features": features.state_dict()}, done=True)
    return features.cpu().eval().requires_grad_(False), training.seconds, training.cpu_seconds


def load_features(folder: Path, image_shape: tuple[int, int, int]) -> Features | None:
    """What `learn_features` left in a folder, for images of (channels, height, width), or None.

    Raises:
        GlannError: features of another version's network.
    """
    if not storage.is_saved(folder):
        return None
    manifest, parts = storage.load(folder, "features")
    if not manifest["done"]:
        return None
    settings = manifest["identity"]["settings"]
    found, wanted = settings.get("network"), _network(image_shape)
    if found != wanted:
        raise GlannError(
            f"{folder} has features of another network than this version's: {found!r}, wanted "
            f"{wanted!r}. Train stage one again: glann train-glo … --restart"
        )
    features = Features(image_shape, settings.get("width", 32))
    features.load_state_dict(parts["features"])
    return features.eval().requires_grad_(False)


def _network(image_shape: tuple[int, int, int]) -> str:
    """What learns, and how: features of another are not gone on with."""
    # What larger images were learned by before had a convolution more.
    return NETWORK + (", larger maps" if max(image_shape[1:]) > 64 else "")


def _calibrate(
    features: Features, images: torch.Tensor, batch_size: int, device: torch.device, seed: int
) -> None:
    """Give BatchNorm the statistics of images, whose views have others, and layers their spread."""
    for module in features.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
    chosen = images[permutation(seed, "calibration", 0, len(images))[:CALIBRATION]]
    parts = chosen.tensor_split(max(1, len(chosen) // (2 * batch_size)))  # as many as views
    with torch.no_grad():
        for part in parts:
            features.activations(to_float(part.to(device)))
        features.eval()
        made = features.activations(to_float(parts[0].to(device)))
        features.spreads.copy_(torch.stack([each.std() for each in made]).clamp_min(1e-2))
