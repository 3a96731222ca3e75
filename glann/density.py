"""The prescribed models of codes: one Gaussian, and a mixture of Gaussians.

Same contract as `IMLE`.  One Gaussian on the codes is what GLO does by itself (arXiv 1707.05776,
section 4); a method that learns to sample has to beat the mixture to earn its place.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from glann.codes import as_codes, in_hand, on_sphere
from glann.errors import GlannError, check_fitted
from glann.networks import Generator, to_sphere
from glann.randomness import noise, permutation
from glann.settings import as_dict, check, setting

MOST = 100
"""Components of a mixture, if their number isn't given: more take minutes to fit."""


class _Gaussians:
    """Σ_k w_k N(μ_k, L_k L_kᵀ), sampled from the same noise blocks as every other code sampler."""

    weights_: torch.Tensor  # (components,), float64
    means_: torch.Tensor  # (components, code_dim)
    factors_: torch.Tensor  # (components, code_dim, code_dim), L_k
    on_sphere_: bool

    def sample(self, n: int, seed: int = 0, start: int = 0) -> torch.Tensor:
        """Codes number `start` to `start + n` of `seed`: float32 `(n, code_dim)` on the CPU."""
        check_fitted(self, "means_")
        code_dim = self.means_.shape[1]
        e = noise(seed, "sample", start, start + n, code_dim + 1).double()
        # The last column picks the component: Φ(e) is uniform.
        uniform = torch.special.ndtr(e[:, -1])
        component = torch.searchsorted(self.weights_.cumsum(0), uniform)
        component = component.clamp_max(len(self.weights_) - 1)
        codes = torch.empty(n, code_dim, dtype=torch.float64)
        for k in component.unique().tolist():
            # Sums of products, not a matrix product: their rounding doesn't depend on how many
            # rows there are.  In parts, as all products at once would fill the memory.
            for rows in (component == k).nonzero()[:, 0].split(max(1, 2**22 // code_dim**2)):
                codes[rows] = self.means_[k] + (self.factors_[k] * e[rows, None, :-1]).sum(2)
        return to_sphere(codes).float() if self.on_sphere_ else codes.float()

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What `from_state` needs: (settings as JSON, tensors)."""
        check_fitted(self, "means_")
        tensors = {"weights": self.weights_, "means": self.means_, "factors": self.factors_}
        return {"settings": as_dict(self), "on_sphere": self.on_sphere_}, tensors

    @classmethod
    def from_state(cls, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
        """A fitted sampler from what `state` gave."""
        sampler = cls(**content["settings"])
        sampler.on_sphere_ = bool(content["on_sphere"])
        for name in ("weights", "means", "factors"):
            setattr(sampler, f"{name}_", tensors[name].double())
        return sampler


@dataclass(kw_only=True)
class Gaussian(_Gaussians):
    """One Gaussian with the codes' mean and covariance."""

    @classmethod
    def standard(cls, dim: int) -> "Gaussian":
        """N(0, I) of `dim` numbers, not learned from anything: the noise of GANs and VAEs."""
        content = {"settings": {}, "on_sphere": False}
        eye = torch.eye(dim)[None]
        tensors = {"weights": torch.ones(1), "means": torch.zeros(1, dim), "factors": eye}
        standard: Gaussian = cls.from_state(content, tensors)
        return standard

    def fit(
        self,
        codes: object,
        *,
        generator: Generator | None = None,
        seed: int = 0,
        device: str = "auto",
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> "Gaussian":
        """Take mean and covariance of codes, float `(n, code_dim)`.

        There is no training: all arguments but codes are there for the contract.
        """
        codes = as_codes(codes)
        if len(codes) < 2:
            raise GlannError("a covariance needs at least 2 codes; 1 was given")
        mean, covariance = _moments(codes)
        self.weights_ = torch.ones(1, dtype=torch.float64)
        self.means_ = mean[None]
        # Codes may lie in a subspace; eigenvalues of 0 are fine, Cholesky's factor is not.
        values, vectors = torch.linalg.eigh(covariance)
        self.factors_ = (vectors * values.clamp_min(0).sqrt()).unsqueeze(0).contiguous()
        self.on_sphere_ = on_sphere(codes)
        return self


def _moments(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased covariance, float64, of codes that may be larger than memory."""
    n, dim = codes.shape
    parts = codes.split(in_hand(codes))
    if len(parts) == 1:  # to the last bit what published results were made with
        double = codes.double()
        covariance = torch.from_numpy(np.atleast_2d(np.cov(double.numpy(), rowvar=False)))
        return double.mean(0), covariance
    mean, scatter = torch.zeros(dim).double(), torch.zeros(dim, dim).double()
    for part in parts:
        mean += part.double().sum(0) / n
    for part in parts:
        apart = part.double() - mean
        scatter += apart.T @ apart
    return mean, scatter / (n - 1)


@dataclass(kw_only=True)
class Mixture(_Gaussians):
    """scikit-learn's mixture of Gaussians with full covariances, fitted by EM.

    By default it has as many components as codes allow, 4 · code_dim codes for each, and no more
    than 100: so 5,000 of MNIST's codes of 64 numbers that it was not fitted to get nearly the
    highest likelihood, whether it was fitted to 400 others or to 5,000.  Twice as many components
    overfit where codes are few.  A hundred codes allow one Gaussian.
    """

    components: int | None = setting(
        None, "Gaussians in the mixture; none: as many as codes allow, up to 100", minimum=1
    )
    codes: int = setting(30_000, "codes that it is fitted to, at the most", minimum=2)
    regularisation: float = setting(0.01, "added to variances, as a share of theirs", minimum=0)
    iterations: int = setting(50, "steps of EM, at the most", minimum=1)

    def check_together(self) -> None:
        """Raise GlannError for settings that don't fit together."""
        if self.components is not None and self.components > self.codes:
            raise GlannError(
                f"imle.components = {self.components}, and imle.codes = {self.codes}; a mixture "
                "needs at least as many codes"
            )

    def fit(
        self,
        codes: object,
        *,
        generator: Generator | None = None,
        seed: int = 0,
        device: str = "auto",
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> "Mixture":
        """Fit the mixture to codes, float `(n, code_dim)`, on the CPU.

        EM is not resumed: all arguments but codes and seed are there for the contract.
        """
        check(self, "imle")
        codes = as_codes(codes)
        n, code_dim = codes.shape
        allowed = min(MOST, max(1, min(n, self.codes) // (4 * code_dim)))
        components = self.components or allowed
        if n < components:
            raise GlannError(
                f"a mixture of imle.components = {components} needs at least as many codes; "
                f"{n} were given"
            )
        chosen = codes[permutation(seed, "mixture", 0, n)[: self.codes]].double().numpy()
        variance = float(chosen.var(0).mean()) or 1e-12  # equal codes have none
        mixture = GaussianMixture(
            components,
            covariance_type="full",
            reg_covar=self.regularisation * variance,
            max_iter=self.iterations,
            random_state=seed % 2**32,
        )
        with warnings.catch_warnings():
            # Stopping at max_iter is part of the setting, not news.
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                mixture.fit(chosen)
            except ValueError as error:
                raise GlannError(
                    f"the mixture can't be fitted: {error}; try fewer imle.components or more "
                    "imle.regularisation"
                ) from error
        self.weights_ = torch.from_numpy(mixture.weights_)
        self.means_ = torch.from_numpy(mixture.means_)
        self.factors_ = torch.linalg.cholesky(torch.from_numpy(mixture.covariances_)).contiguous()
        self.on_sphere_ = on_sphere(codes)
        return self
