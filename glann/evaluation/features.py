"""Features of images, on which all scores are computed: extracted once, shared by all."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glann import processes
from glann.data import Images
from glann.devices import pick_device
from glann.errors import GlannError
from glann.evaluation.classifier import (
    DIM,
    Classifier,
    cache_entry,
    keep_classifier,
    load_classifier,
    random_convolutions,
    shape_of,
    train_classifier,
)
from glann.images import as_images, to_float
from glann.losses import read_weights
from glann.networks import evaluation_mode
from glann.places import cache_folder
from glann.settings import nearest_name
from glann.storage import fingerprint

FEATURES = ("auto", "classifier", "inception", "random", "pixels")
"""Kinds of features; `make_features` says what they are."""

INCEPTION_DIM = 2048
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"

PIXELS = 16
"""Sides of the small images whose pixels are features, at the most."""


@dataclass(frozen=True, eq=False)  # a generated == would compare networks
class Features:
    """A function from images to features, with what a score has to say about it.

    Attributes:
        name: "classifier", "inception", "random" or "pixels".
        dim: numbers that an image gives.
        accuracy: share of test images, which it never saw, whose label the classifier finds.
        test_images: how many these were.
        image_shape: (channels, height, width) of the images that it takes.
        network: uint8 `(n, c, h, w)` on `device` → float `(n, dim)`.
        device: where it computes.
    """

    name: str
    dim: int
    accuracy: float | None
    test_images: int | None
    image_shape: tuple[int, int, int]
    network: nn.Module
    device: torch.device

    def __call__(self, images: object) -> torch.Tensor:
        """Features of images, each on its own: float32 `(n, dim)` on the CPU.

        Args:
            images: uint8 `(n, c, h, w)` of `image_shape`, a NumPy array or a tensor.
        """
        images = as_images(images)
        if shape_of(images) != self.image_shape:
            raise GlannError(
                f"images have shape {shape_of(images)}; these features are of {self.image_shape}, "
                "the real images' shape. Score samples against real images of the same shape"
            )
        # Images at a time.  It depends on nothing but their size, and the last block is filled up,
        # so that a row's last bit doesn't depend on how many are asked for.
        _, height, width = self.image_shape
        block = 32 if self.name == "inception" else max(4, min(256, 2**18 // (height * width)))
        if not len(images):
            return torch.empty(0, self.dim)

        def extract(part: torch.Tensor) -> torch.Tensor:
            full = torch.cat([part, part[-1:].expand(block - len(part), -1, -1, -1)])
            features: torch.Tensor = self.network(full.to(self.device))[: len(part)]
            return features.float().cpu()

        with evaluation_mode(self.network):
            return processes.by_parts(images.split(block), extract)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """The labels that the classifier reads from features `(n, dim)`: int64 `(n,)`."""
        if not isinstance(self.network, Classifier):
            raise GlannError(
                f"features '{self.name}' know no labels; wanted features 'classifier', which need "
                "labelled images"
            )
        return self.network.classify(features)

    def predict(self, images: object) -> torch.Tensor:
        """The labels that the classifier gives images: int64 `(n,)`."""
        return self.classify(self(images))

    def describe(self) -> dict[str, Any]:
        """What a result says of its features (JSON): only scores with the same ones compare."""
        state = self.network.state_dict()
        digest = hashlib.sha256("".join(f"{k} {fingerprint(state[k])} " for k in state).encode())
        return {
            "name": self.name,
            "dim": self.dim,
            "accuracy": self.accuracy,
            "test_images": self.test_images,
            "weights": digest.hexdigest() if state else None,
        }


def make_features(
    kind: str,
    *,
    train: Images,
    test: Images | None,
    device: str = "auto",
    weights: str | Path | None = None,
    cache: Path | None = None,
    progress: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Features:
    """The features called `kind`, one of FEATURES, for images like `train`'s.

    Args:
        kind: "classifier" is a small network that learns `train`'s labels; "random" the same,
            untrained (Naeem et al., arXiv 2002.09797, who find random networks fit for images far
            from ImageNet's); "inception" is torch-fidelity's, of the usual FID; "pixels" are the
            pixels of images averaged down to at most 16×16.  "auto" is "classifier" where there
            are test labels, 500 training images and 10 of each class, or else "random".
        train: training images; with their labels for "classifier".
        test: test images; used for nothing but stating the classifier's accuracy, which without
            them or their labels is None.
        device: "auto", "cpu", "cuda", …
        weights: the file with Inception's weights.
        cache: folder where trained classifiers are kept; None: `cache_folder()`.
        progress: show the classifier's training on standard error.
        say: called with a line of news when the cache can't be read or written.

    Raises:
        GlannError: an unknown kind, no labels, other shapes, Inception or its weights missing.
    """
    if kind not in FEATURES:
        raise GlannError(f"features = '{kind}' is unknown; {nearest_name(kind, FEATURES)}")
    if kind == "auto":
        kind = "classifier" if _can_classify(train, test) else "random"
    if weights is not None and kind != "inception":
        raise GlannError(f"weights = '{weights}' are only for features 'inception', not '{kind}'")
    if len(train) < 2:
        raise GlannError(f"there are {len(train)} training images; wanted 2 or more")
    images, on_device = as_images(train.images, "train"), pick_device(device)
    if test is not None and test.images.shape[1:] != images.shape[1:]:
        raise GlannError(
            f"test images have shape {tuple(test.images.shape[1:])} and training images "
            f"{tuple(images.shape[1:])}; wanted the same. Set data.size or data.channels"
        )

    if kind == "classifier":
        return _classifier(train, test, on_device, cache or cache_folder(), progress, say)
    network: nn.Module
    if kind == "inception":
        network = _Inception(weights)
    elif kind == "random":
        network = random_convolutions(images, on_device)
    else:
        network = _Pixels()
    network = network.to(on_device).eval()
    with torch.no_grad():
        dim = network(images[:2].to(on_device)).shape[1]
    return Features(kind, dim, None, None, shape_of(images), network, on_device)


def _can_classify(train: Images, test: Images | None) -> bool:
    """Whether a classifier is worth training, and its accuracy can be stated."""
    if train.labels is None or test is None or test.labels is None or len(train) < 500:
        return False
    _, counts = train.labels.unique(return_counts=True)
    return len(counts) >= 2 and int(counts.min()) >= 10


def _classifier(
    train: Images,
    test: Images | None,
    device: torch.device,
    cache: Path,
    progress: bool,
    say: Callable[[str], object],
) -> Features:
    """The classifier from the cache, or trained; with its accuracy if there are test labels."""
    if train.labels is None:
        raise GlannError(
            "features 'classifier' are learned from labels, and these images have none; use "
            "features 'random'"
        )
    entry = cache_entry(train, cache)
    kept = load_classifier(train, entry, say)
    if processes.any_of([kept is None])[0]:  # each may have a cache of its own
        kept = None
    network = kept or train_classifier(train.images, train.labels, device, progress)
    network = network.to(device).eval()
    processes.agree(network)  # they round differently, and each makes some images' features
    accuracy, tested = None, None
    features = Features("classifier", DIM, None, None, shape_of(train.images), network, device)
    if test is not None and test.labels is not None and len(test):
        right = features.predict(test.images) == test.labels
        accuracy, tested = float(right.double().mean()), len(test)
    if kept is None:
        keep_classifier(network, entry, {"accuracy": accuracy, "test_images": tested}, say)
    return replace(features, accuracy=accuracy, test_images=tested)


class _Pixels(nn.Module):
    """Pixels in [0, 1] of the images averaged down by whole factors to at most PIXELS×PIXELS."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        factors = [math.ceil(side / PIXELS) for side in images.shape[2:]]
        small = nn.functional.avg_pool2d(to_float(images), factors, ceil_mode=True)
        return small.flatten(1)


class _Inception(nn.Module):
    """torch-fidelity's Inception, with the weights and the resizing of the usual FID."""

    def __init__(self, weights: str | Path | None) -> None:
        super().__init__()
        if weights is None:
            raise GlannError(
                "features 'inception' need Inception's weights: torch-fidelity's file "
                f"({INCEPTION_FILE}, from its releases on GitHub), given by --weights FILE"
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except Exception as error:  # torchvision beside a CPU build of torch: not an ImportError
            raise GlannError(
                f"features 'inception' need torch-fidelity, which can't be imported ({error}); "
                "install glann[inception], with a torchvision made for your torch"
            ) from error
        try:
            # First, because torch-fidelity would unpickle anything: this refuses all but tensors.
            read_weights(Path(weights), "weights", INCEPTION_FILE)
            self.inception = FeatureExtractorInceptionV3(
                "inception", [str(INCEPTION_DIM)], feature_extractor_weights_path=str(weights)
            )
        except Exception as error:  # of the file system, the unpickler, torch-fidelity
            raise GlannError(
                f"weights = '{weights}' can't be read as Inception's weights "
                f"({error.__cause__ or error}); wanted torch-fidelity's file {INCEPTION_FILE}"
            ) from error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.inception(images.expand(-1, 3, -1, -1))[0]
        return features
