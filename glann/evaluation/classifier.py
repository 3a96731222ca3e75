"""The network whose features are compared: a small classifier of the labels, kept in a cache.

Untrained, the same network gives random features for images without labels.
"""

import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from glann import processes, storage
from glann.data import Images
from glann.errors import GlannError
from glann.images import to_float
from glann.networks import evaluation_mode
from glann.optimisers import adam, learning_rate, set_learning_rate
from glann.randomness import generator, permutation, seeded
from glann.training import Batches, Training, learning

DIM = 128
"""Features of an image: few enough for the covariance of some hundred test images, which FID needs.

One number for all sizes of images, so that scores of several data sets have one scale.
"""

VERSION = 1
"""Of the network and its training: raised with any change of theirs, so that none is mixed up."""

# Chosen on 10,000 of Fashion-MNIST's training images that were held out: 93.0 % right.  With half
# the learning rate 92.5 %, and then with shifts twice as far 91.9 %.
BATCH = 128
LR = 8e-3
IMAGES_SEEN = 400_000
MOST_EPOCHS = 20

CALIBRATION = 10_000
"""Training images that BatchNorm's statistics are of in the end, at the most."""


class Convolutions(nn.Module):
    """Image → features: convolutions that halve the size, then a full layer with BatchNorm.

    The features are taken before the last ReLU and each has mean 0 and variance 1 on the training
    images: none drowns the others in a distance, they are nearer to a Gaussian, as FID assumes,
    and KID's kernel (xᵀy/d + 1)³ has the scale that it is made for.

    Args:
        image_shape: (channels, height, width), each side from 8 to 256.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        halvings = max(2, math.ceil(math.log2(max(height, width) / 4)))
        widths = [max(8, 64 >> i) for i in reversed(range(halvings))]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise([channels, *widths]):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.MaxPool2d(2, ceil_mode=True),  # before the rest, which then has less to do
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        full = nn.Linear(widths[-1] * height * width, DIM, bias=False)
        norm = nn.BatchNorm1d(DIM, affine=False)
        self.layers = nn.Sequential(*layers, nn.Flatten(), full, norm)
        # On a CPU convolutions with the channels last take two thirds of the time.  Here, so that
        # a loaded network has the last bits of the one that was saved.
        self.layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images, uint8 `(n, c, h, w)` → features, float32 `(n, DIM)`."""
        features: torch.Tensor = self.layers(to_float(images))
        return features


class Classifier(Convolutions):
    """Convolutions with a last layer that tells `classes`, the sorted labels, int64, apart."""

    classes: torch.Tensor

    def __init__(self, image_shape: tuple[int, int, int], classes: torch.Tensor) -> None:
        super().__init__(image_shape)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(DIM, len(classes)))
        self.register_buffer("classes", classes)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(n, DIM)` → labels, int64 `(n,)`."""
        with evaluation_mode(self):
            return self.classes[self.head(features.to(self.classes.device)).argmax(1)].cpu()


def shape_of(images: torch.Tensor) -> tuple[int, int, int]:
    """(channels, height, width) of `(n, c, h, w)`."""
    _, channels, height, width = images.shape
    return channels, height, width


def shifted(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Each of `(n, c, h, w)` moved by up to 1/28 of its side; what comes in repeats the edge."""
    n, _, height, width = images.shape
    most = max(1, round(min(height, width) / 28))
    down, across = torch.randint(-most, most + 1, (2, n, 1), generator=random)
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + across).clamp(0, width - 1)
    moved = images[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


@learning
def train_classifier(
    images: torch.Tensor, labels: torch.Tensor, device: torch.device, progress: bool = False
) -> Classifier:
    """Learn to tell the labels of images apart, with a seed of its own.

    Args:
        images: uint8 `(n, c, h, w)`.
        labels: int64 `(n,)`, of at least two classes.
        device: to train on.
        progress: show progress on standard error.
    """
    classes, targets = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise GlannError(
            f"the images are of {len(classes)} class; wanted 2 or more to train a classifier on. "
            "Use features 'random'"
        )
    n = len(images)
    with seeded(0, "features classifier"):
        network = Classifier(shape_of(images), classes)
    network.to(device).train()
    optimiser = adam(network, LR, betas=(0.9, 0.999))
    batches = Batches(n, min(BATCH, n), max(1, min(MOST_EPOCHS, IMAGES_SEEN // n)))
    random = generator(0, "features shifts")
    with Training("classifier", batches, None, {}, progress) as training:
        for step, rows in training.steps(0):
            lr = learning_rate("one-cycle", LR, step, batches.steps)
            set_learning_rate(optimiser, lr)
            features = network(shifted(images[rows], random).to(device))
            loss = nn.functional.cross_entropy(network.head(features), targets[rows].to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            training.record(loss / processes.count(), lr=lr)  # each has learned the whole
    optimiser.zero_grad()  # the gradients' memory is not needed any more
    calibrate(network, images, device)
    return network


def random_convolutions(images: torch.Tensor, device: torch.device) -> Convolutions:
    """The untrained network, with BatchNorm's statistics of `images`, uint8 `(n, c, h, w)`."""
    with seeded(0, "features random"):
        network = Convolutions(shape_of(images)).to(device)
    calibrate(network, images, device)
    return network


def calibrate(network: Convolutions, images: torch.Tensor, device: torch.device) -> None:
    """Give BatchNorm the mean statistics of `images` as they are, without shifts."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over the batches
    network.train()
    rows = permutation(0, "features calibration", 0, len(images))[:CALIBRATION]
    with torch.no_grad():
        for part in rows.tensor_split(math.ceil(len(rows) / 256)):
            network(images[part].to(device))
    network.eval()


def cache_entry(train: Images, cache: Path) -> Path:
    """The folder for the classifier of these images and labels."""
    assert train.labels is not None
    key = f"{VERSION} {train.fingerprint} {storage.fingerprint(train.labels)}"
    return cache / f"classifier-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def load_classifier(train: Images, entry: Path, say: Callable[[str], object]) -> Classifier | None:
    """The classifier kept in `entry`, on the CPU; None if there is none or it is damaged."""
    assert train.labels is not None
    try:
        if not storage.is_saved(entry):
            return None
        network = Classifier(shape_of(train.images), train.labels.unique())
        network.load_state_dict(storage.load(entry, "classifier")[1]["classifier"])
    except (GlannError, OSError, KeyError, RuntimeError) as error:
        say(f"the classifier kept in {entry} can't be used and is trained again: {error}")
        return None
    return network


def keep_classifier(
    network: Classifier, entry: Path, content: dict[str, object], say: Callable[[str], object]
) -> None:
    """Keep it for the next time; not being able to is news, and no error.

    Of two processes that train the same one, the later leaves its own: files are replaced whole,
    and a reader that comes between finds one of them or, at worst, trains again.
    """
    try:
        storage.save(entry, "classifier", content, {"classifier": network.state_dict()})
    except (GlannError, OSError) as error:
        say(f"the classifier is not kept and has to be trained again next time: {error}")
