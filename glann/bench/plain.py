"""A plain reading of the method, the baseline of the benchmark: what one writes down first.

The authors' loops (github.com/yedidh/glann) with glann's networks and loss, so that only the way of
computing differs: float32 throughout, images kept as floats, `torch.optim.Adam` as it comes, over
the generator and, densely, over all codes; no flushing of denormals; all distances of 2000 codes to
every candidate at once.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from glann.losses import LaplacianPyramid
from glann.networks import Generator, Mapper, evaluation_mode, to_sphere

ROWS = 2000
"""Codes that are matched at a time."""

BETAS = (0.5, 0.999)


def codes_of(n: int, code_dim: int, device: torch.device, seed: int = 0) -> nn.Embedding:
    """Codes before they are learned, on the sphere, `(n, code_dim)`."""
    start = torch.randn(n, code_dim, generator=torch.Generator().manual_seed(seed))
    codes: nn.Embedding = nn.Embedding.from_pretrained(to_sphere(start).to(device), freeze=False)
    return codes


def stage_one(
    generator: Generator,
    codes: nn.Embedding,
    images: torch.Tensor,
    batch_size: int,
    halved: int = 20,
    seed: int = 0,
) -> Iterator[torch.Tensor]:
    """GLO without an end: gives the batch's mean loss after each step.

    Args:
        generator: on the device of the images.
        codes: one of each image, likewise.
        images: float `(n, c, h, w)` in [0, 1].
        batch_size: images in a step; as in the authors' code an epoch's last, smaller batch is
            left out.
        halved: epochs after which learning rates are halved; of the authors' 200, 20.
        seed: of the order of the images.
    """
    n, device = len(images), images.device
    random = torch.Generator().manual_seed(seed)
    loss_of = LaplacianPyramid((images.shape[2], images.shape[3])).to(device)
    generator.train()
    for epoch in itertools.count():
        rate = 0.5 ** (epoch // halved)
        generator_adam = torch.optim.Adam(generator.parameters(), lr=1e-3 * rate, betas=BETAS)
        codes_adam = torch.optim.Adam(codes.parameters(), lr=1e-2 * rate, betas=BETAS)
        order = torch.randperm(n, generator=random).to(device)
        for rows in order[: n - n % batch_size].split(batch_size):
            loss = loss_of(generator(codes(rows)), images[rows]).mean()
            generator_adam.zero_grad()
            codes_adam.zero_grad()
            loss.backward()
            generator_adam.step()
            codes_adam.step()
            yield loss.detach()
        codes.weight.data = to_sphere(codes.weight.data)


def nearest(queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The nearest of `points`, `(m, d)`, to each of `queries`, `(n, d)`: indices, int64 `(n,)`."""
    norms = points.square().sum(1)
    return torch.cat([(norms - 2 * q @ points.T).argmin(1) for q in queries.split(ROWS)])


def stage_two(
    mapper: Mapper, codes: torch.Tensor, noise_dim: int, batch_size: int, seed: int = 0
) -> Iterator[str]:
    """IMLE without an end: after each piece of work its name, "drawing", "matching" or "steps".

    Args:
        mapper: on the device of the codes.
        codes: float `(n, code_dim)`.
        noise_dim: numbers in a noise vector.
        batch_size: codes in a step.
        seed: of the candidates and the order of the codes.
    """
    n, device = len(codes), codes.device
    random = torch.Generator().manual_seed(seed)
    mapper.train()
    while True:
        noise = torch.randn(2 * n, noise_dim, generator=random).to(device)
        with evaluation_mode(mapper):
            candidates = torch.cat([mapper(part) for part in noise.split(ROWS)])
        yield "drawing"
        chosen = nearest(codes, candidates)
        yield "matching"
        adam = torch.optim.Adam(mapper.parameters(), lr=1e-3, betas=BETAS, weight_decay=1e-5)
        order = torch.randperm(n, generator=random).to(device)
        for rows in order[: n - n % batch_size].split(batch_size):
            loss = (mapper(noise[chosen[rows]]) - codes[rows]).square().sum(1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            yield "steps"


def sample(
    generator: Generator, mapper: Mapper, n: int, batch_size: int, seed: int = 0
) -> torch.Tensor:
    """New images: float `(n, c, h, w)` in [0, 1] on the CPU."""
    device = next(generator.parameters()).device
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, mapper.config["noise_dim"], generator=random).to(device)
    with evaluation_mode(mapper), evaluation_mode(generator):
        return torch.cat([generator(mapper(part)).cpu() for part in noise.split(batch_size)])
