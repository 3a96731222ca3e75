"""Moments: mean and covariance of what many steps made, and which way others' lie.

A step's few samples have no covariance of hundreds of numbers to speak of.  So moments run along
over the steps, and only the step's own samples move: Yang, Geng, Ju, Tian & Wang 2026,
"Representation Fréchet loss for visual generation" (arXiv 2604.28190).

Of a normal distribution with moments m and S the map T(x) = μ + A (x − m), where
A = Σ^½ (Σ^½ S Σ^½)^-½ Σ^½, makes one with moments μ and Σ, and moves it as little as can be (Olkin
& Pukelsheim 1982, "The distance between two random vectors with given dispersion matrices").  The
mean of |x − T(x)|² is their Fréchet distance, and has its gradient where T(x) is held.
"""

import torch

from glann.errors import NotFinite

FLATTEST = 1e-4
"""The least eigenvalue of (Σ^½ S Σ^½)^½, as a share of the largest."""

STRETCH = 2.0
"""How many times as spread as they are rows are to become at once, at the most."""

NEAR = 0.1
"""How far apart, in units of rows, moments pull the hardest: from farther away no harder."""


class Moments:
    """Running moments of samples' rows, and the map that would give them those of `wanted`.

    Args:
        wanted: float `(n, d)`, n ≥ 2.
    """

    STATE = ("mean", "square", "at", "turn", "weight")

    def __init__(self, wanted: torch.Tensor) -> None:
        rows, d = wanted.cpu().double(), wanted.shape[1]  # not every GPU knows doubles
        self.wanted_mean = rows.mean(0).float().to(wanted.device)
        variances, axes = torch.linalg.eigh(rows.T.cov().view(d, d))
        self.wanted_root = (axes * variances.clamp_min(0).sqrt()) @ axes.T
        self.mean = torch.zeros_like(self.wanted_mean)
        self.square = self.mean.new_zeros(d, d)
        # The map, and how much it counts: there is none yet.
        self.at, self.turn = self.mean.clone(), self.square.clone()
        self.weight = self.mean.new_zeros(())

    def state(self) -> dict[str, torch.Tensor]:
        """What a training that goes on needs."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, table in self.state().items():
            table.copy_(state[name])

    def distance(self, rows: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
        """Mean |x − T(x)|², weighted; `share` of the moments are those of these rows from now on.

        Args:
            rows: a step's, float32 `(n, d)`.
            share: above 0, at most 1.

        Returns:
            a scalar; 0 before the first `renew`.
        """
        seen = rows.detach()
        self.mean.lerp_(seen.mean(0), share)
        self.square.lerp_(seen.T @ seen / len(seen), share)
        there = self.wanted_mean + (seen - self.at) @ self.turn
        return self.weight * (rows - there).square().sum(1).mean()

    def renew(self) -> float:
        """Find the map from where moments are now; gives their Fréchet distance.

        Raises:
            NotFinite: if moments are not.

        Moments lag behind what is made: by the time that rows are as spread as they were to be, the
        map still asks for more.  So it stretches and pulls no more than STRETCH and NEAR say.
        """
        mean, square = self.mean.cpu().double(), self.square.cpu().double()
        covariance = square - mean[:, None] * mean
        if not covariance.isfinite().all():
            raise NotFinite(
                "what samples look like is no longer finite; try a lower finetune.lr, or a lower "
                "finetune.distance"
            )
        squares, directions = torch.linalg.eigh(self.wanted_root @ covariance @ self.wanted_root)
        spreads = squares.clamp_min(0).sqrt()
        halves = spreads.clamp_min(max(FLATTEST * float(spreads[-1]), 1e-12)).rsqrt()
        half = self.wanted_root @ (directions * halves)
        turn = half @ half.T
        # Hardly ever does it stretch too much, and to ask is a tenth of the work of a limit.
        if torch.linalg.cholesky_ex(STRETCH * torch.eye(len(turn)) - turn).info:
            stretches, axes = torch.linalg.eigh(turn)
            turn = (axes * stretches.clamp_max(STRETCH)) @ axes.T
        self.turn.copy_(turn)
        self.at.copy_(self.mean)
        spread = covariance.trace() + self.wanted_root.square().sum() - 2 * spreads.sum()
        apart = float((mean - self.wanted_mean.cpu()).square().sum() + spread)
        self.weight.fill_(min(1.0, NEAR / max(apart, 1e-12) ** 0.5))
        return apart
