"""What the machine can give at best, and what the networks ask of it."""

import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from glann.bench.timing import Round, timed
from glann.devices import pick_precision
from glann.networks import evaluation_mode

SHAPES = {
    "quick": ((256, 256, 256),),
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 64, 1024), (128, 1024, 6272)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 64, 16384)),
}
"""Rows × inner × columns of the matrix products that are tried: the best one counts."""

OPERATIONS = {"quick": 1e7, "cpu": 2e10, "cuda": 1e13}
"""Operations that are timed at once: some tenths of a second."""


def forward_flops(network: nn.Module, inputs: int) -> float:
    """Floating-point operations of the network's layers for one row of `inputs` numbers.

    Of full layers and convolutions: the others' are few.  A multiplication and an addition are two.
    """
    counted = 0.0

    def count(layer: nn.Module, given: tuple[torch.Tensor], made: torch.Tensor) -> None:
        nonlocal counted
        assert isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
        # Each weight meets each place of the image once: of the one that comes in where a
        # convolution is transposed, else of the one that goes out.
        image = given[0] if isinstance(layer, nn.ConvTranspose2d) else made
        places = image[0, 0].numel() if image.ndim == 4 else 1
        counted += 2.0 * layer.weight.numel() * places

    hooks = [
        layer.register_forward_hook(count)
        for layer in network.modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
    ]
    with evaluation_mode(network):
        network(torch.zeros(1, inputs))
    for hook in hooks:
        hook.remove()
    return counted


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are computed as such: on GPUs, on CPUs with AMX or AVX512-BF16."""
    return pick_precision("auto", device) == torch.bfloat16


def products(dtype: torch.dtype, quick: bool, device: torch.device) -> Callable[[], Round]:
    """Times matrix products; a round is the shape with the highest rate, in operations."""
    kind = "quick" if quick else "cuda" if device.type == "cuda" else "cpu"
    tasks = []
    for rows, inner, columns in SHAPES[kind]:
        # Not of ones: a GPU draws less power over them, and runs faster.
        a = torch.rand(rows, inner, device=device).to(dtype)
        b = torch.rand(inner, columns, device=device).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        times = max(1, round(OPERATIONS[kind] / (2 * rows * inner * columns)))
        tasks.append((a, b, out, times))

    def one(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, times: int) -> Round:
        def multiply() -> None:
            for _ in range(times):
                torch.mm(a, b, out=out)

        return Round(2.0 * times * a.shape[0] * a.shape[1] * b.shape[1], timed(multiply, device))

    def measure() -> Round:
        return max((one(*task) for task in tasks), key=lambda found: found.rate)

    measure()
    return measure


def copying(quick: bool, device: torch.device) -> Callable[[], Round]:
    """Times a copy that no cache holds, in bytes read and written."""
    source = torch.ones(2**18 if quick else 2**26, device=device)
    target = torch.empty_like(source)
    times = 1 if quick else 4 if device.type == "cpu" else 100

    def copy() -> None:
        for _ in range(times):
            target.copy_(source)

    copy()
    return lambda: Round(2.0 * times * source.numel() * 4, timed(copy, device))


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
