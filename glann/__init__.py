"""Train image generators without an adversary: GLO learns the codes, IMLE learns to sample them.

from glann import GLANN, save_grid
save_grid(GLANN.load("digits").sample(64, seed=3), "samples.png")
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glann.density import Gaussian as Gaussian
    from glann.density import Mixture as Mixture
    from glann.errors import GlannError as GlannError
    from glann.finetuning import FineTuning as FineTuning
    from glann.glo import GLO as GLO
    from glann.images import save_grid as save_grid
    from glann.images import save_images as save_images
    from glann.imle import IMLE as IMLE
    from glann.pipeline import GLANN as GLANN

__version__ = "0.1.0"

_HOMES = {
    "FineTuning": "finetuning",
    "GLANN": "pipeline",
    "GLO": "glo",
    "IMLE": "imle",
    "Gaussian": "density",
    "Mixture": "density",
    "GlannError": "errors",
    "save_grid": "images",
    "save_images": "images",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> object:
    # Looked up when first used: the command line's help must not wait for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"glann.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'glann' has no attribute {name!r}")
