"""Image samplers to compare GLANN with: same generator, same contract, learned in other ways."""

from typing import Any

from glann.baselines.gan import GAN
from glann.baselines.pixel_imle import PixelIMLE
from glann.baselines.sampler import NoiseSampler
from glann.baselines.vae import VAE
from glann.errors import GlannError
from glann.settings import nearest_name

_GRADIENT_PENALTY = {"norm": "none", "beta2": 0.9}

MODELS: dict[str, tuple[type[NoiseSampler], dict[str, Any]]] = {
    # Goodfellow et al. (arXiv 1406.2661), DCGAN's optimiser (Radford et al., arXiv 1511.06434).
    "mm-gan": (GAN, {"loss": "minimax"}),
    "ns-gan": (GAN, {"loss": "non-saturating"}),
    # Mao et al. (arXiv 1611.04076).
    "ls-gan": (GAN, {"loss": "least-squares"}),
    # Arjovsky et al. (arXiv 1701.07875): clip .01, 5 steps.  Adam, as in Lucic et al.'s search.
    "wgan": (GAN, {"loss": "wasserstein", "clip": 0.01, "discriminator_steps": 5}),
    # Gulrajani et al. (arXiv 1704.00028): weight 10, 5 steps, no BatchNorm, Adam 1e-4, (.5, .9).
    "wgan-gp": (
        GAN,
        {
            "loss": "wasserstein",
            "penalty": "interpolated",
            "discriminator_steps": 5,
            "lr": 1e-4,
            **_GRADIENT_PENALTY,
        },
    ),
    # Kodali et al. (arXiv 1705.07215): weight 10, one step; without BatchNorm as in Lucic et al.
    "dragan": (GAN, {"loss": "non-saturating", "penalty": "around-real", **_GRADIENT_PENALTY}),
    # Berthelot et al. (arXiv 1703.10717): Adam 1e-4, k's rate .001.
    "began": (GAN, {"loss": "boundary-equilibrium", "norm": "none", "lr": 1e-4}),
    # Miyato et al. (arXiv 1802.05957): hinge, spectral norm.
    "sn-gan": (GAN, {"loss": "hinge", "norm": "spectral"}),
    # Huang et al. (arXiv 2501.05441): Adam 2e-4 with β1 = 0, R1 + R2, averaged weights.  Their
    # weight of 1 is for images in [−1, 1], where squared gradients are a quarter of those here.
    "r3gan": (
        GAN,
        {
            "loss": "relativistic",
            "penalty": "zero-centred",
            "penalty_weight": 0.25,
            "norm": "none",
            "beta1": 0.0,
            "beta2": 0.99,
            "ema": 0.999,
        },
    ),
    "vae": (VAE, {}),
    "pixel-imle": (PixelIMLE, {"batch_size": 128}),
}
"""Baselines by name: class, and the settings in which it differs from the class's defaults."""


def make_baseline(name: str, **changes: Any) -> NoiseSampler:
    """An unfitted baseline with its published settings, but for `changes`."""
    if name not in MODELS:
        raise GlannError(f"there is no model '{name}'; {nearest_name(name, MODELS)}")
    kind, published = MODELS[name]
    return kind(**{**published, **changes})
