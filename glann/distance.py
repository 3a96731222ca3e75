"""How far apart samples and images are as wholes: two distances between their features.

A reconstruction loss asks of each training image whether it came out.  What samples look like that
are no training image's, it never sees.  A distance between distributions sees just that, and needs
no adversary: that of generative moment matching networks (Li, Swersky & Zemel 2015, arXiv
1502.02761), on the features of a network that stays as it is (dos Santos, Mroueh, Padhi & Dognin
2019, arXiv 1904.02762), is here the energy distance (Székely & Rizzo 2013, "Energy statistics"),
which has no bandwidth to choose and is 0 for equal distributions only.

Of a step's few samples it tells little of directions in which features hardly vary.  So the Fréchet
distance stands beside it, by what many steps made (`glann.moments`), which sees nothing but means
and covariances, and of these much more.
"""

import copy

import torch

from glann import processes
from glann.contrastive import Features, images_at_once
from glann.devices import autocast
from glann.errors import GlannError
from glann.images import moved, to_float
from glann.moments import Moments
from glann.randomness import generator as random_generator
from glann.randomness import permutation

REFERENCES = 65_536
"""Training images whose features are at hand, at the most."""

COMPARED = 512
"""Of these, how many a step's samples are compared with."""

WITHIN = 4096
"""References among whose pairs the mean distance of images from each other is found."""

DIRECTIONS = 256
"""Random ones, that what the last map has at all of its places together is seen in."""

FLATTEST = 1e-3
"""The least variance of a direction, as a share of the largest."""

PARTS = 1000
"""Images whose features are found at a time, at the most: of large ones fewer."""

WINDOW = 8192
"""Samples that running moments are of, about: with each step older ones count for less."""

KNOWN = 8
"""Samples, and images, for each of a summary's numbers: of fewer, moments are too little known."""

RENEWED = 8
"""Steps from one look at the moments to the next."""


class Distance:
    """Of samples from training images: Σ over summaries of features, energy and Fréchet distance.

    The energy distance sees what this step made, at once; moments see more, and lag behind.  Alone,
    they would be overshot again and again.

    Samples and images are moved at random before features look at them (`images.moved`): these have
    strides, and see more of some pixels than of others.

    Args:
        features: what sees the images; it stays as it is.
        images: training images, uint8 `(n, c, h, w)` on the CPU.
        device: where samples are.
        precision: of matrix products.
        seed: of which images are taken for references, and of directions.
    """

    def __init__(
        self,
        features: Features,
        images: torch.Tensor,
        device: torch.device,
        precision: torch.dtype,
        seed: int = 0,
    ) -> None:
        self.features = copy.deepcopy(features).to(device)  # its owner's stays where it is
        self.device, self.precision = device, precision
        with torch.no_grad():
            last = self._maps(to_float(images[:1].to(device)))[-2]
        random = random_generator(seed, "directions")
        self.directions = torch.randn(last.numel(), DIRECTIONS, generator=random).to(device)
        rows = permutation(seed, "references", 0, len(images))[:REFERENCES]
        ways = torch.rand(len(rows), 2, generator=random_generator(seed, "references moved"))
        parts = min(PARTS, images_at_once(*images.shape[2:]))
        with torch.no_grad():
            found = [
                self._summaries(moved(to_float(images[part].to(device)), way.to(device)))
                for part, way in zip(rows.split(parts), ways.split(parts), strict=True)
            ]
        tables = [torch.cat(each) for each in zip(*found, strict=True)]
        self.means = [table.mean(0) for table in tables]
        self.turns = [half_whitening(table) for table in tables]
        self.tables = [
            ((table - mean) @ turn).half()
            for table, mean, turn in zip(tables, self.means, self.turns, strict=True)
        ]
        self.within = [
            float(_mean_distance_within(table[:WITHIN].float())) for table in self.tables
        ]
        self.moments = [Moments(table) for table in self.tables]

    def rows(self, seed: int, step: int) -> torch.Tensor:
        """The references of a step: int64 `(COMPARED,)`, on the CPU."""
        random = random_generator(seed, "references", step)
        return torch.randint(len(self.tables[0]), (COMPARED,), generator=random)

    def __call__(
        self,
        samples: torch.Tensor,
        ways: torch.Tensor,
        rows: torch.Tensor,
        share: torch.Tensor | float,
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of float samples `(n, c, h, w)` in [0, 1]: a scalar.

        With several processes each has its own samples, and gives its part of the distance of them
        all: the parts add up.

        Args:
            samples: at least 2, of all processes.
            ways: how these are moved, float `(n, 2)`, as of `images.moved`.
            rows: of the references that energy is found by, int64 `(m,)`, on the device.
            share: of the moments that these samples are, as `share` says.
            own: which of the samples of all processes are this one's, bool; None: all.
        """
        found = self._summaries(moved(samples, ways))
        references = zip(self.means, self.turns, self.tables, self.within, strict=True)
        distances = []
        for summary, (mean, turn, table, within), moments in zip(
            found, references, self.moments, strict=True
        ):
            spread = processes.together((summary - mean) @ turn, own)
            distances.append(energy_distance(spread, table[rows].float(), within))
            distances.append(moments.distance(spread, share))
        return torch.stack(distances).sum() / processes.count()

    def state(self) -> dict[str, torch.Tensor]:
        """What a training that goes on needs: where moments are."""
        return {
            f"{number}.{name}": table
            for number, moments in enumerate(self.moments)
            for name, table in moments.state().items()
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            GlannError: what another version gave, which compared other summaries.
        """
        if state.keys() != self.state().keys():
            raise GlannError(
                "fine-tuning was left off by another version, which compared other features; "
                "--restart to begin it anew"
            )
        for number, moments in enumerate(self.moments):
            moments.load_state({name: state[f"{number}.{name}"] for name in Moments.STATE})

    def share(self, step: int, samples: int) -> float:
        """What share of the moments is of this step's samples, of all processes together."""
        return max(min(1.0, samples / WINDOW), 1 / (step + 1))

    def renew(self, step: int, samples: int) -> None:
        """Look where moments are by now, every RENEWED steps."""
        fewest = min((step + 1) * samples, len(self.tables[0]))
        for moments in self.moments:
            if step % RENEWED == 0 and fewest >= KNOWN * len(moments.mean):
                moments.renew()

    def _maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        with autocast(self.precision, self.device):
            return self.features.maps(images.contiguous(memory_format=torch.channels_last))

    def _summaries(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Of float images, float32 `(n, numbers)` each.

        One of what there is of each channel of the maps, wherever it is: mean and root mean square.
        One of what is where in the last of them.  One of the last hidden layer, which has seen the
        whole image, and leaves out what views were not told apart by.
        """
        *local, whole = (each.float() for each in self._maps(images))
        textures = [
            part
            for each in local
            for part in (each.mean((2, 3)), each.square().mean((2, 3)).clamp_min(1e-6).sqrt())
        ]
        return [torch.cat(textures, 1), local[-1].flatten(1) @ self.directions, whole]


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
    rows = table.cpu().double()  # not every GPU knows doubles
    spread = rows.std(0).clamp_min(1e-3)
    values, vectors = torch.linalg.eigh(((rows - rows.mean(0)) / spread).T.cov())
    values = values.clamp_min(FLATTEST * float(values[-1]) or 1.0)
    halved: torch.Tensor = (vectors * values**-0.25) @ vectors.T / values.sqrt().sum().sqrt()
    return (halved / spread[:, None]).float().to(table.device)


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
