"""What moves a network's weights: Adam or Muon, and how fast as training goes on."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.adam import adam as adam_step

from glann.devices import at_once
from glann.errors import GlannError

SCHEDULES = ("one-cycle", "cosine", "halving", "constant")

OPTIMISERS = ("adam", "muon")

BETAS = (0.5, 0.999)
"""Of Adam, as in the authors' code."""


def learning_rate(schedule: str, base: float, step: int, steps: int) -> float:
    """The learning rate at `step` of `steps`; `base` is the highest.

    one-cycle: up from base/25 over the first 30 %, then down to nearly 0, both as half a cosine
    (Smith & Topin, arXiv 1708.07120, with torch's OneCycleLR defaults).  halving: halved after
    every tenth (GLANN's 200 epochs halved every 20).
    """
    done = step / steps
    if schedule == "one-cycle":
        start, end = (base / 25, base) if done < 0.3 else (base, base / 250_000)
        part = done / 0.3 if done < 0.3 else (done - 0.3) / 0.7
        return end + (start - end) * (1 + math.cos(math.pi * part)) / 2
    if schedule == "cosine":
        return float(base * (1 + math.cos(math.pi * done)) / 2)
    if schedule == "halving":
        return float(base * 0.5 ** math.floor(10 * done))
    if schedule == "constant":
        return base
    raise GlannError(f"schedule = {schedule!r} is unknown; wanted one of {', '.join(SCHEDULES)}")


def make_optimiser(name: str, network: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimiser called `name`, one of OPTIMISERS, of a network's weights."""
    if name == "adam":
        return adam(network, lr)
    if name == "muon":
        return Muon(network, lr)
    raise GlannError(f"optimiser = {name!r} is unknown; wanted one of {', '.join(OPTIMISERS)}")


def adam(
    network: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = BETAS,
) -> torch.optim.Adam:
    """Adam, by default with β = (.5, .999) as in the authors' code."""
    # Fused: on a CPU its plain loops cost a third of a step of these small networks.
    return torch.optim.Adam(
        network.parameters(),
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        fused=True,
        capturable=next(network.parameters()).is_cuda,  # by a `Replayed` step
    )


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal, for all convolutions but a first one; else Adam.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks": the gradient's
    moving average M = U Σ Vᵀ of a layer's weights, taken as a matrix, is replaced by about U Vᵀ,
    so that a step changes the layer's outputs equally in all directions, and not most in those that
    have been changed the most before.  As in Liu et al. (arXiv 2502.16982) steps are .2 √(longer
    side) long, which makes them as long as Adam's: one learning rate does for both.

    A convolution's matrix has its first dimension for rows; of one row or column alone there is
    nothing to make orthogonal.  The layer that reads the network's input gets Adam's steps, as with
    Jordan et al.: of a few pixels it would come to see all frequencies alike, the finest as well as
    strokes.  So do full layers: a generator's first one learns as well by them, and of a large one
    U Vᵀ would cost more than the gradient.

    Args:
        network: its weights are on one device.
        lr: learning rate, a number or a tensor `()`.
        momentum: of the gradient's moving average; steps are Nesterov's.
        betas: of Adam.
    """

    KINDS = (nn.Conv2d, nn.ConvTranspose2d)

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = BETAS,
    ) -> None:
        layers = [m for m in network.modules() if isinstance(m, (*self.KINDS, nn.Linear))]
        turned = [layer.weight for layer in layers[1:] if isinstance(layer, self.KINDS)]
        matrices = [w for w in turned if min(len(w), w[0].numel()) > 1]
        known = {id(w) for w in matrices}
        others = [p for p in network.parameters() if id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "momentum": momentum},
            {"params": others, "betas": betas},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, by the gradients that `backward` left."""
        works: list[Callable[[], None]] = []
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if "momentum" in group:
                for alike in _by_shorter_side(weights):
                    works.append(partial(self._turn, alike, group["lr"], group["momentum"]))
            elif weights:
                works.append(partial(self._adam, weights, group["lr"], *group["betas"]))
        if works:
            at_once(self.param_groups[0]["params"][0].device, *works)

    def _turn(self, weights: list[torch.Tensor], lr: float | torch.Tensor, momentum: float) -> None:
        matrices = []
        for p in weights:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["mean"] = torch.zeros_like(p)
            mean = state["mean"].lerp_(p.grad, 1 - momentum)
            matrices.append(p.grad.lerp(mean, momentum).flatten(1))
        for p, step in zip(weights, orthogonal(matrices), strict=True):
            p.sub_(step.view_as(p).mul_(lr * (0.2 * max(step.shape) ** 0.5)))

    def _adam(
        self, weights: list[torch.Tensor], lr: float | torch.Tensor, beta1: float, beta2: float
    ) -> None:
        for p in weights:
            if not self.state[p]:
                self.state[p]["mean"] = torch.zeros_like(p)
                self.state[p]["square"] = torch.zeros_like(p)
                self.state[p]["steps"] = torch.zeros((), device=p.device)
        means, squares, steps = (
            [self.state[p][name] for p in weights] for name in ("mean", "square", "steps")
        )
        adam_step(
            weights,
            [p.grad for p in weights if p.grad is not None],
            means,
            squares,
            [],
            steps,
            fused=True,
            capturable=weights[0].is_cuda,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


def _by_shorter_side(weights: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Weights whose matrices have equally long shorter sides together."""

    def side(p: torch.Tensor) -> int:
        return min(len(p), p[0].numel())

    return [list(alike) for _, alike in itertools.groupby(sorted(weights, key=side), side)]


def orthogonal(matrices: Sequence[torch.Tensor], turns: int = 5) -> list[torch.Tensor]:
    """About U Vᵀ of matrices U Σ Vᵀ: singular values come to lie between about .7 and 1.2.

    By Newton and Schulz's iteration X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X with the numbers of Jordan
    et al., which is quick rather than exact.  All of it are polynomials in the first X Xᵀ: they are
    multiplied out on the shorter side, and the long one is only touched at both ends.

    Args:
        matrices: float32 `(rows, columns)`, with shorter sides of one length.
        turns: of the iteration.

    Returns:
        float32 `(rows, columns)` for each; zeros stay zeros.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    squares = [m.T @ m if _is_tall(m) else m @ m.T for m in matrices]
    square = torch.stack(squares)
    # The matrices' own norms, which they are divided by.
    norms = square.diagonal(dim1=1, dim2=2).sum(1).clamp_min_(1e-30).sqrt_()[:, None, None]
    square /= norms.square()
    product = None
    for turn in range(turns):
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if turn < turns - 1:
            square = factor @ square @ factor
    assert product is not None
    product /= norms
    return [m @ p if _is_tall(m) else p @ m for m, p in zip(matrices, product, strict=True)]


def _is_tall(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float | torch.Tensor) -> None:
    """Use `lr`, a number or a tensor `()` on the optimiser's device, from the next step on."""
    for group in optimiser.param_groups:
        group["lr"] = lr


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as tensors by name, to be saved."""
    return {
        f"{number}.{name}": value
        for number, state in optimiser.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimiser_state(
    optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """Undo `optimiser_state`."""
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        weight = weights[int(number)]
        if value.shape == weight.shape:
            # Laid out in memory as its weight is: fused Adam goes through both side by side.
            value = torch.empty_like(weight, dtype=value.dtype).copy_(value)
        state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
