"""Likelihood under a kernel estimate of the samples: the Parzen-window estimate.

It is how GANs were first measured (Goodfellow et al. 2014, arXiv 1406.2661, section 5), after
Breuleux, Bengio & Vincent 2011.  Theis, van den Oord & Bethge 2016 (arXiv 1511.01844, section 3.1)
show that in many dimensions it is far from the true likelihood for any affordable number of
samples, and that it can prefer centres of clusters, or copies, to a perfect model.
"""

import math
from collections.abc import Sequence

import torch

from glann.errors import GlannError
from glann.evaluation.arrays import as_pair

_TILE = 2**24
"""Distances that are in memory at a time."""


def parzen_log_likelihood(*, real: object, fake: object, sigma: float) -> torch.Tensor:
    """The log-likelihood of each real row under Gaussians of width sigma around all samples.

    log p(x) = log mean_j exp(−‖x − f_j‖² / 2σ²) − d log(σ √2π).

    Args:
        real: data that the samples' density is to explain, float `(n, d)`, n ≥ 1.
        fake: samples, float `(m, d)`, m ≥ 1.
        sigma: the kernel's standard deviation in each dimension, above 0.

    Returns:
        float64 `(n,)` in nats, on the CPU.

    Raises:
        GlannError: on arrays that `as_features` refuses and on a sigma that is not above 0.
    """
    return _log_densities(real, fake, [sigma])[0]


def _log_densities(real: object, fake: object, sigmas: Sequence[float]) -> torch.Tensor:
    """`parzen_log_likelihood` for each of several widths: `(widths, n)`."""
    for sigma in sigmas:
        if not 0 < sigma < math.inf:
            raise GlannError(f"sigma = {sigma} is out of range; wanted above 0")
    reals, fakes = as_pair(real, fake, 1, "")
    # Near the origin fewer digits cancel in ‖x‖² − 2 x·f + ‖f‖².
    middle = fakes.mean(0, dtype=torch.float64)
    fakes = fakes.double() - middle
    norms = fakes.square().sum(1)
    found = []
    for part in reals.split(max(1, _TILE // len(fakes))):
        rows = part.double() - middle
        squared = (rows.square().sum(1)[:, None] - 2 * rows @ fakes.T + norms).clamp_min(0)
        sums = [torch.logsumexp(squared / (-2 * sigma**2), 1) for sigma in sigmas]
        found.append(torch.stack(sums))
    m, dim = fakes.shape
    constants = [math.log(m) + dim * math.log(s * math.sqrt(2 * math.pi)) for s in sigmas]
    return torch.cat(found, 1).cpu() - torch.tensor(constants, dtype=torch.float64)[:, None]


def choose_sigma(*, real: object, fake: object, sigmas: Sequence[float]) -> float:
    """The width of `sigmas` under which held-out real rows are most likely.

    Args:
        real: validation data, that neither trained the model nor test it, float `(n, d)`.
        fake: samples, float `(m, d)`.
        sigmas: widths to choose among, at least one.

    Raises:
        GlannError: as `parzen_log_likelihood`, and if there is no width to choose.
    """
    if not sigmas:
        raise GlannError("there is no width to choose among; wanted at least one in sigmas")
    return sigmas[int(_log_densities(real, fake, sigmas).mean(1).argmax())]


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean of `(n,)` and its standard error, s / √n; NaN for a single value."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))
