"""The ways of doing a piece of work that are compared: glann's, the plain reading's, others'.

A way is a function that prepares everything, warms up, and returns one that does a round of the
work and says how long it took.  Each way runs in a process of its own, so that its peak memory is
its own.
"""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors
from torch import nn

from glann.bench import plain
from glann.bench.timing import Round, time_matching, time_steps, timed
from glann.data import Images
from glann.errors import GlannError
from glann.evaluation import scores as evaluation
from glann.evaluation.features import make_features
from glann.glo import GLO
from glann.images import pad, resize_and_crop, to_float, to_uint8
from glann.imle import IMLE
from glann.losses import LaplacianPyramid
from glann.nearest import nearest
from glann.networks import Generator, Mapper, evaluation_mode, to_sphere
from glann.pipeline import GLANN
from glann.randomness import seeded

faiss: Any
try:
    import faiss
except ImportError:
    faiss = None

ROOT = Path(__file__).parents[2]
"""Where `python -m glann` finds this glann."""

Measure = Callable[[], Round]
"""Does one round of the work."""

DIM = 64
"""Numbers in a code and in a noise vector, as everywhere in the recipe mnist-paper."""

SHAPE = (1, 28, 28)

FEATURES = 128
"""Numbers of an image that scores are computed on, as the classifier's."""


@dataclass(frozen=True)
class Sizes:
    """How much work is measured; the defaults are the recipe mnist-paper's, where not said."""

    device: torch.device
    quick: bool = False
    images: int = 60_000
    width: int = 64
    hidden: int = 1024
    mapper_width: int = 512
    batch: int = 128
    steps: int = 40  # of stage one in a round
    warm_steps: int = 150  # of the plain stage one before it is measured
    epochs: int = 40  # of the plain stage one from start to end
    codes: int = 30_000  # half of MNIST's, as matching by the plain reading takes so long
    queries: int = 60_000
    points: int = 120_000
    fewer_queries: int = 6_000  # for the slower ways: all take time in proportion to the queries
    grown: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    grown_points: int = 20_000
    samples: int = 4_000
    scored: int = 10_000


def sizes(device: torch.device, quick: bool) -> Sizes:
    """Those of a measurement, or ones that take no time and measure nothing."""
    if not quick and device.type == "cuda":  # which does the small ones too fast to be timed
        return Sizes(device, steps=400, fewer_queries=60_000)
    if not quick:
        return Sizes(device)
    return Sizes(
        device,
        quick=True,
        images=200,
        width=8,
        hidden=32,
        mapper_width=32,
        batch=50,
        steps=2,
        warm_steps=2,
        epochs=2,
        codes=500,  # more than the warm-up takes
        queries=400,
        points=800,
        fewer_queries=200,
        grown=(100, 200, 400),
        grown_points=100,
        samples=100,
        scored=100,
    )


Way = Callable[[Sizes], Measure]


# ---------------------------------------------------------------------- stage one

SKIP = 5
"""First steps of a training that don't count: memory is taken, kernels are chosen."""


def generator_of(sizes: Sizes) -> Generator:
    """An untrained generator."""
    with seeded(0, "bench"):
        return Generator(DIM, SHAPE, sizes.width, sizes.hidden)


def mapper_of(sizes: Sizes) -> Mapper:
    """An untrained mapper, of the depth that is `IMLE`'s default."""
    with seeded(0, "bench"):
        return Mapper(DIM, DIM, sizes.mapper_width, 3, on_sphere=True)


def images_of(n: int) -> torch.Tensor:
    """Real digits with black around them, as MNIST's, n of them: uint8 `(n, 1, 28, 28)`."""
    digits = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    large = [resize_and_crop(torch.from_numpy(digit)[None], (20, 20)) for digit in digits]
    images = pad(torch.stack(large), SHAPE[1:])
    return images.repeat(-(-n // len(images)), 1, 1, 1)[:n]


def stage_one(sizes: Sizes) -> Measure:
    """`GLO.fit`'s own loop, with images and settings as in mnist-paper but for the loss."""
    images = images_of(sizes.images)
    # Without PCA: it is no part of the loop.  With the loss and optimiser that the plain loop has.
    glo = GLO(
        width=sizes.width,
        hidden=sizes.hidden,
        batch_size=sizes.batch,
        loss="laplacian",
        optimiser="adam",
        start="random",
        epochs=2,
    )

    def measure(count: int) -> Round:
        items, start, end = time_steps(
            lambda: glo.fit(images, device=str(sizes.device)), SKIP, count, sizes.device
        )
        return Round(items, end - start)

    measure(2)
    return lambda: measure(sizes.steps)


def plain_stage_one(sizes: Sizes) -> Measure:
    """The plain loop, which goes on from round to round."""
    images = to_float(images_of(sizes.images)).to(sizes.device)
    generator, codes = _untrained(len(images), sizes)
    steps = plain.stage_one(generator, codes, images, sizes.batch)

    def go(count: int) -> None:
        for _ in itertools.islice(steps, count):
            pass

    go(sizes.warm_steps)
    return lambda: Round(sizes.steps * sizes.batch, timed(lambda: go(sizes.steps), sizes.device))


def _untrained(n: int, sizes: Sizes) -> tuple[Generator, nn.Embedding]:
    """What the plain stage one begins with: generator and codes of n images."""
    return generator_of(sizes).to(sizes.device), plain.codes_of(n, DIM, sizes.device)


def _digits(sizes: Sizes) -> torch.Tensor:
    """Every digit once."""
    return images_of(min(sizes.images, len(load_digits().images)))


def plain_training(sizes: Sizes) -> Measure:
    """The plain stage one from start to end, of few images and as many epochs as that allows."""
    return lambda: Round(1, timed(lambda: trained_plainly(sizes), sizes.device))


def trained_plainly(sizes: Sizes) -> float:
    """Its loss on all images in the end."""
    images = to_float(_digits(sizes)).to(sizes.device)
    generator, codes = _untrained(len(images), sizes)
    # The authors halve learning rates every 20 of 200 epochs.
    halved = max(1, sizes.epochs // 10)
    steps = plain.stage_one(generator, codes, images, sizes.batch, halved)
    for _ in itertools.islice(steps, sizes.epochs * (len(images) // sizes.batch)):
        pass
    return loss_on(images, generator, codes.weight.data)


def loss_on(images: torch.Tensor, generator: Generator, codes: torch.Tensor) -> float:
    """Mean loss of reconstructions; images are float `(n, c, h, w)` in [0, 1]."""
    loss_of = LaplacianPyramid((images.shape[2], images.shape[3])).to(images.device)
    with evaluation_mode(generator):
        parts = [
            loss_of(generator(some), images[rows]).sum()
            for rows, some in zip(
                torch.arange(len(images)).split(500), codes.split(500), strict=True
            )
        ]
    return float(torch.stack(parts).sum()) / len(images)


def trained(epochs: int, images: torch.Tensor, sizes: Sizes) -> GLO:
    """Stage one as it comes, but for the loss, which is the plain one's."""
    glo = GLO(width=sizes.width, hidden=sizes.hidden, loss="laplacian", epochs=epochs)
    return glo.fit(images, device=str(sizes.device))


def fewest_epochs(wanted: float, images: torch.Tensor, sizes: Sizes) -> int:
    """Epochs after which the loss on all images is no more than `wanted`."""
    for epochs in range(1, 10 * sizes.epochs + 1):
        glo = trained(epochs, images, sizes)
        if loss_on(to_float(images), glo.generator_, glo.codes_) <= wanted:
            return epochs
    raise GlannError(f"stage one did not come to a loss of {wanted:.3g} in {epochs} epochs")


def training(sizes: Sizes) -> Measure:
    """Stage one from start to end, with as few epochs as bring it to the plain one's loss."""
    images = _digits(sizes)
    epochs = fewest_epochs(trained_plainly(sizes), images, sizes)
    return lambda: Round(1, timed(lambda: trained(epochs, images, sizes), sizes.device))


# ---------------------------------------------------------------------- stage two


def _codes(n: int, seed: int = 0) -> torch.Tensor:
    return to_sphere(torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)))


def stage_two(sizes: Sizes) -> Measure:
    """An epoch of `IMLE.fit`'s own loop, at the plain loop's work: all codes in one cell."""
    imle = IMLE(
        noise_dim=DIM,
        width=sizes.mapper_width,
        batch_size=sizes.batch,
        epochs=1,
        levels=1,
        cells=1,
        pool=2.0,
        refine=0,
    )
    codes = _codes(sizes.codes)

    def measure(some: torch.Tensor) -> Round:
        return time_matching(lambda: imle.fit(some, device=str(sizes.device)), sizes.device)

    measure(codes[: 8 * sizes.batch])
    return lambda: measure(codes)


def plain_stage_two(sizes: Sizes) -> Measure:
    """An epoch of the plain loop."""

    def measure(work: Iterator[str], steps: int) -> Round:
        def all_steps() -> None:
            for _ in itertools.islice(work, steps):
                pass

        parts = {
            "drawing": timed(lambda: next(work), sizes.device),
            "matching": timed(lambda: next(work), sizes.device),
            "steps": timed(all_steps, sizes.device),
        }
        return Round(steps * sizes.batch, sum(parts.values()), parts)

    def work(n: int) -> Iterator[str]:
        mapper = mapper_of(sizes).to(sizes.device)
        return plain.stage_two(mapper, _codes(n).to(sizes.device), DIM, sizes.batch)

    measure(work(8 * sizes.batch), 8)
    epochs = work(sizes.codes)
    return lambda: measure(epochs, sizes.codes // sizes.batch)


# ---------------------------------------------------------------------- matching


def _matching(
    search: Callable[[torch.Tensor, torch.Tensor], object], n: int, sizes: Sizes
) -> Measure:
    queries, points = (
        _codes(count, seed).to(sizes.device) for seed, count in enumerate((n, sizes.points))
    )
    search(queries[:2000], points[:2000])
    return lambda: Round(n, timed(lambda: search(queries, points), sizes.device))


def match(sizes: Sizes) -> Measure:
    """`glann.nearest`."""
    return _matching(nearest, sizes.queries, sizes)


def match_plainly(sizes: Sizes) -> Measure:
    """All distances of 2000 codes at a time."""
    return _matching(plain.nearest, sizes.fewer_queries, sizes)


def by_faiss(queries: torch.Tensor, points: torch.Tensor) -> np.ndarray:
    """Exact search by faiss, its index built anew: indices `(n,)`."""
    index: Any = faiss.IndexFlatL2(points.shape[1])
    index.add(points.numpy())
    found: np.ndarray = index.search(queries.numpy(), 1)[1][:, 0]
    return found


def by_sklearn(queries: torch.Tensor, points: torch.Tensor) -> np.ndarray:
    """Exact search by scikit-learn: indices `(n,)`."""
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(points.numpy())
    found: np.ndarray = search.kneighbors(queries.numpy(), return_distance=False)[:, 0]
    return found


def match_by_faiss(sizes: Sizes) -> Measure:
    """Of fewer codes by faiss."""
    return _matching(by_faiss, sizes.fewer_queries, sizes)


def match_by_sklearn(sizes: Sizes) -> Measure:
    """Of fewer codes by scikit-learn."""
    return _matching(by_sklearn, sizes.fewer_queries, sizes)


# ---------------------------------------------------------------------- sampling and scoring


def sample(sizes: Sizes) -> Measure:
    """`GLANN.sample`."""
    # Barely trained: what it samples doesn't matter, how long it takes doesn't depend on it.
    imle = IMLE(noise_dim=DIM, width=sizes.mapper_width, levels=1, batch_size=50, epochs=1)
    pipeline = GLANN(generator_of(sizes), imle.fit(_codes(50), device="cpu"))
    pipeline.to(str(sizes.device))
    pipeline.sample(sizes.samples // 4)
    return lambda: Round(sizes.samples, timed(lambda: pipeline.sample(sizes.samples), sizes.device))


def plain_sample(sizes: Sizes) -> Measure:
    """Noise, mapper and generator in batches."""
    generator, mapper = generator_of(sizes).to(sizes.device), mapper_of(sizes).to(sizes.device)

    def sample(n: int) -> torch.Tensor:
        return to_uint8(plain.sample(generator, mapper, n, sizes.batch))

    sample(sizes.samples // 4)
    return lambda: Round(sizes.samples, timed(lambda: sample(sizes.samples), sizes.device))


def features(sizes: Sizes) -> Measure:
    """Features of images, as scores take them."""
    images = images_of(sizes.scored)
    train = Images(images, None, "digits", "", "scikit-learn", ())
    features = make_features("random", train=train, test=None, device=str(sizes.device))
    features(images[: sizes.scored // 10])
    return lambda: Round(sizes.scored, timed(lambda: features(images), sizes.device))


def scores(sizes: Sizes) -> Measure:
    """Every score of `glann.evaluation`."""
    random = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, sizes.scored, FEATURES, generator=random)
    some = max(100, sizes.scored // 10)
    evaluation.scores(real=real[:some], fake=fake[:some])
    return lambda: Round(1, timed(lambda: evaluation.scores(real=real, fake=fake), sizes.device))


# ---------------------------------------------------------------------- starting


def start_python(arguments: list[str], sizes: Sizes) -> Measure:
    """Times Python with these arguments from start to end."""
    times = 1 if sizes.quick else 2

    def start() -> None:
        for _ in range(times):
            command = [sys.executable, *arguments]
            subprocess.run(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=True
            )

    if not sizes.quick:
        start()
    return lambda: Round(times, timed(start, torch.device("cpu")))


def start(sizes: Sizes) -> Measure:
    """The command line's help."""
    return start_python(["-m", "glann", "--help"], sizes)


def start_with_torch(sizes: Sizes) -> Measure:
    """The same, had the command line imported torch."""
    program = (
        "import torch, sys; sys.argv = ['glann', '--help']; from glann.cli import main; main()"
    )
    return start_python(["-c", program], sizes)
