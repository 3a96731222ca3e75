"""How far apart samples and images are as wholes: the energy distance between their features.

A reconstruction loss asks of each training image whether it came out.  What samples look like that
are no training image's, it never sees.  A distance between distributions sees just that, and needs
no adversary: that of generative moment matching networks (Li, Swersky & Zemel 2015, arXiv
1502.02761), on the features of a network that stays as it is (dos Santos, Mroueh, Padhi & Dognin
2019, arXiv 1904.02762), is here the energy distance (Székely & Rizzo 2013, "Energy statistics"),
which has no bandwidth to choose and is 0 for equal distributions only.
"""

import torch

from glann import processes
from glann.contrastive import Features
from glann.devices import autocast
from glann.images import moved, to_float
from glann.randomness import generator as random_generator
from glann.randomness import permutation

REFERENCES = 65_536
"""Training images whose features are at hand, at the most."""

COMPARED = 512
"""Of these, how many a step's samples are compared with."""

WITHIN = 4096
"""References among whose pairs the mean distance of images from each other is found."""

FLATTEST = 1e-3
"""The least variance of a direction, as a share of the largest."""

PARTS = 1000
"""Images whose features are found at a time."""


class Energy:
    """The energy distance of samples from training images: Σ over summaries of their features.

    Both are moved at random before features look at them (`images.moved`), which have strides, and
    see more of some pixels than of others.

    Args:
        features: what sees the images; it stays as it is.
        images: training images, uint8 `(n, c, h, w)` on the CPU.
        device: where samples are.
        precision: of matrix products.
        seed: of which images are taken for references.
    """

    def __init__(
        self,
        features: Features,
        images: torch.Tensor,
        device: torch.device,
        precision: torch.dtype,
        seed: int = 0,
    ) -> None:
        self.features = features.to(device)
        self.device, self.precision = device, precision
        rows = permutation(seed, "references", 0, len(images))[:REFERENCES]
        ways = torch.rand(len(rows), 2, generator=random_generator(seed, "references moved"))
        with torch.no_grad():
            found = [
                self._summaries(moved(to_float(images[part].to(device)), way.to(device)))
                for part, way in zip(rows.split(PARTS), ways.split(PARTS), strict=True)
            ]
        tables = [torch.cat(parts) for parts in zip(*found, strict=True)]
        self.means = [table.mean(0) for table in tables]
        self.turns = [half_whitening(table) for table in tables]
        self.tables = [
            ((table - mean) @ turn).half()
            for table, mean, turn in zip(tables, self.means, self.turns, strict=True)
        ]
        self.within = [
            float(_mean_distance_within(table[:WITHIN].float())) for table in self.tables
        ]

    def rows(self, seed: int, step: int) -> torch.Tensor:
        """The references of a step: int64 `(COMPARED,)`, on the CPU."""
        random = random_generator(seed, "references", step)
        return torch.randint(len(self.tables[0]), (COMPARED,), generator=random)

    def __call__(
        self,
        samples: torch.Tensor,
        ways: torch.Tensor,
        rows: torch.Tensor,
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of float samples `(n, c, h, w)` in [0, 1] from the references `rows`: a scalar.

        With several processes each has its own samples, and gives its part of the distance of them
        all: the parts add up.

        Args:
            samples: at least 2, of all processes.
            ways: how these are moved, float `(n, 2)`, as of `images.moved`.
            rows: int64 `(m,)`, on the device.
            own: which of the samples of all processes are this one's, bool; None: all.
        """
        found = self._summaries(moved(samples, ways))
        references = zip(found, self.means, self.turns, self.tables, self.within, strict=True)
        distances = [
            energy_distance(
                processes.together((summary - mean) @ turn, own), table[rows].float(), within
            )
            for summary, mean, turn, table, within in references
        ]
        return torch.stack(distances).sum() / processes.count()

    def _summaries(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Of float images, float32 `(n, numbers)` each.

        One of what there is of each channel of the maps, wherever it is: mean and root mean square.
        One of the last hidden layer, which has seen the whole image.
        """
        with autocast(self.precision, self.device):
            maps = self.features.maps(images.contiguous(memory_format=torch.channels_last))
        *local, whole = (each.float() for each in maps)
        textures = [
            part
            for each in local
            for part in (each.mean((2, 3)), each.square().mean((2, 3)).clamp_min(1e-6).sqrt())
        ]
        return [torch.cat(textures, 1), whole]


def half_whitening(table: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix that turns rows, less their mean, into ones of total variance 1.

    Numbers are brought to one spread, and what varies by λ together then to √λ: halfway from all as
    it is, where a distance tells of a few wide directions alone, to all directions alike, where
    most of it is of those that hardly matter.

    Args:
        table: float `(n, d)`, n ≥ 2.

    Returns:
        float32 `(d, d)`, on the table's device.
    """
    rows = table.double()
    spread = rows.std(0).clamp_min(1e-3)
    values, vectors = torch.linalg.eigh(((rows - rows.mean(0)) / spread).T.cov())
    values = values.clamp_min(FLATTEST * float(values[-1]) or 1.0)
    halved: torch.Tensor = (vectors * values**-0.25) @ vectors.T / values.sqrt().sum().sqrt()
    return (halved / spread[:, None]).float()


def energy_distance(
    some: torch.Tensor, others: torch.Tensor, within: float | None = None
) -> torch.Tensor:
    """2 E|x − y| − E|x − x′| − E|y − y′|, an estimate without bias: a scalar.

    Args:
        some: x, float `(n, d)`, n ≥ 2.
        others: y, float `(m, d)`.
        within: E|y − y′|, where it is known; None: as among `others`, m ≥ 2.
    """
    apart = 2 * torch.cdist(some, others).mean() - _mean_distance_within(some)
    return apart - (_mean_distance_within(others) if within is None else within)


def _mean_distance_within(some: torch.Tensor) -> torch.Tensor:
    """E|x − x′| of different rows, `(n, d)`."""
    n = len(some)
    return torch.cdist(some, some).sum() / (n * (n - 1))
