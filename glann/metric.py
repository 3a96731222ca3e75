"""How far apart codes are in what they make: the metric that images give to codes.

GLO leaves codes about equally spread in all directions, and the generator far more sensitive in
some than in others: a step that turns one digit into another in one direction hardly changes the
image in the next.  Plain distances between codes weigh both alike.
"""

from typing import NamedTuple

import torch

from glann.devices import pick_device
from glann.errors import GlannError
from glann.losses import Scattering
from glann.networks import Generator, evaluation_mode, to_sphere
from glann.randomness import permutation

PROBED = 100
"""Codes around which the generator is tried, at the most."""

PIXELS = 2**25
"""Pixels made for that, at the most: there are fewer such codes where images are large."""

PIXELS_AT_ONCE = 2**20
"""Of these, how many at a time, for memory's sake."""

STEP = 0.16
"""Steps to each side, in the codes' standard deviation: small beside the distance to the next."""

FLATTEST = 1e-3
"""The least weight of a direction, as a share of the largest: what is measured must be undone."""


class Metric(NamedTuple):
    """Coordinates of codes in which Euclidean distances are those of a metric.

    `codes @ stretch` are coordinates, `coordinates @ back` codes: each a symmetric matrix, float32
    `(code_dim, code_dim)`.  `on_sphere`: whether codes have norm 1.
    """

    stretch: torch.Tensor
    back: torch.Tensor
    on_sphere: bool

    @classmethod
    def plain(cls, code_dim: int, on_sphere: bool) -> "Metric":
        """Distances between codes themselves."""
        return cls(torch.eye(code_dim), torch.eye(code_dim), on_sphere)

    @classmethod
    def of(cls, matrix: torch.Tensor, on_sphere: bool) -> "Metric":
        """Of a symmetric matrix M, float `(code_dim, code_dim)`: distances² are δᵀ M δ.

        Its scale doesn't count; 0 is taken for the identity.
        """
        values, vectors = torch.linalg.eigh(matrix.double())
        if values[-1] <= 0:
            return cls.plain(len(matrix), on_sphere)
        values = values.clamp_min(FLATTEST * float(values[-1]))
        scales = (values / values.mean()).sqrt()
        stretch, back = ((vectors * s) @ vectors.T for s in (scales, 1 / scales))
        return cls(stretch.float(), back.float(), on_sphere)

    def tables(self) -> dict[str, torch.Tensor]:
        """The matrices by name."""
        return {"stretch": self.stretch, "back": self.back}

    def coordinates(self, codes: torch.Tensor) -> torch.Tensor:
        """Of codes, `(n, code_dim)`: a new table, but where they are the codes themselves."""
        plain = torch.equal(self.stretch, torch.eye(len(self.stretch)))
        return codes if plain else codes @ self.stretch

    def codes(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Back to codes, `(n, code_dim)`, on the sphere if all codes are."""
        codes = coordinates @ self.back
        return to_sphere(codes) if self.on_sphere else codes


def image_metric(
    generator: Generator, codes: torch.Tensor, *, seed: int = 0, device: str = "auto"
) -> torch.Tensor:
    """M for which δᵀ M δ is about |F(G(z + δ)) − F(G(z))|², on average over codes z.

    It is the mean of JᵀJ over some codes, J being the Jacobian of F∘G by central differences: the
    metric that images pull back to codes (Arvanitidis, Hansen & Hauberg, arXiv 1710.11379), made
    the same everywhere.  F are the numbers that the loss "scattering" compares: the levels of a
    Laplacian pyramid and scattering coefficients.

    Args:
        generator: G.
        codes: float32 `(n, code_dim)`.
        seed: of which codes are taken.
        device: where to compute: "auto", "cpu", "cuda", …

    Returns:
        float32 `(code_dim, code_dim)`, symmetric and positive semi-definite, on the CPU.

    Raises:
        GlannError: if the generator takes codes of another length.
    """
    code_dim = codes.shape[1]
    if code_dim != generator.config["code_dim"]:
        raise GlannError(
            f"codes have {code_dim} numbers; the generator's have {generator.config['code_dim']}"
        )
    on_device = pick_device(device)
    home = next(generator.parameters()).device
    height, width = generator.image_shape[1:]
    features = Scattering((height, width)).to(on_device)
    probed = max(1, min(PROBED, PIXELS // (2 * code_dim * height * width)))
    at_once = max(2, PIXELS_AT_ONCE // (height * width))
    chosen = codes[permutation(seed, "metric", 0, len(codes))[:probed]].to(on_device)
    step = STEP * float(chosen.var(0, correction=0).mean().sqrt()) or STEP
    steps = step * torch.eye(code_dim, device=on_device)
    metric = torch.zeros(code_dim, code_dim, device=on_device)
    generator.to(on_device)
    with evaluation_mode(generator):
        for code in chosen:
            around = torch.cat([code + steps, code - steps]).split(at_once)
            seen = torch.cat([features.features(generator(part)) for part in around])
            further, back = seen.chunk(2)
            slopes = (further - back) / (2 * step)
            metric += slopes @ slopes.T / len(chosen)
    generator.to(home)
    return metric.cpu()
