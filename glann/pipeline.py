"""The trained whole: noise → code → image.  Sampled, saved, loaded."""

import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from glann import __version__, processes, storage
from glann.codes import as_codes
from glann.density import Gaussian, Mixture
from glann.devices import pick_device
from glann.errors import GlannError
from glann.images import as_images, to_float, to_uint8
from glann.imle import IMLE
from glann.losses import make_loss
from glann.nearest import nearest
from glann.networks import Generator, evaluation_mode, to_ball, to_sphere
from glann.optimisers import learning_rate
from glann.places import find_pipeline
from glann.training import learning


class CodeSampler(Protocol):
    """What learns from codes and then gives new ones."""

    def fit(
        self,
        codes: object,
        *,
        generator: Generator | None = None,
        seed: int = 0,
        device: str = "auto",
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> Any:
        """Learn from codes, float `(n, code_dim)`, of `generator`; returns self."""

    def sample(self, n: int, seed: int = 0, start: int = 0) -> torch.Tensor:
        """Codes number `start` to `start + n` of `seed`: float32 `(n, code_dim)`."""

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What `from_state` needs: (JSON, tensors)."""


CODE_SAMPLERS: dict[str, Any] = {"imle": IMLE, "gaussian": Gaussian, "mixture": Mixture}
"""Code samplers by the name that recipes and manifests use."""


def sampler_name(sampler: CodeSampler) -> str:
    """The name of a code sampler's class in CODE_SAMPLERS."""
    return next(name for name, kind in CODE_SAMPLERS.items() if type(sampler) is kind)


def save_sampler(sampler: CodeSampler, folder: str | Path) -> None:
    """Save a fitted code sampler by itself, for stage two on somebody else's codes."""
    content, tensors = sampler.state()
    content = {"sampler": {"name": sampler_name(sampler), **content}, "versions": versions()}
    storage.save(Path(folder), "sampler", content, {"sampler": tensors})


def load_sampler(folder: str | Path) -> CodeSampler:
    """Load what `save_sampler` wrote."""
    manifest, parts = storage.load(Path(folder), "sampler")
    return _sampler_from(Path(folder), manifest, parts)


def versions() -> dict[str, str]:
    """What a result may depend on."""
    return {
        "glann": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


@dataclasses.dataclass(frozen=True)
class Projection:
    """Codes found for given images.

    codes: float32 `(n, code_dim)`; images: the generator's images of them, uint8
    `(n, c, h, w)`; errors: mean absolute difference of the pixels of each, float32 `(n,)` in
    [0, 1].
    """

    codes: torch.Tensor
    images: torch.Tensor
    errors: torch.Tensor


class GLANN:
    """A generator with a code sampler: Generative Latent Nearest Neighbours.

    Args:
        generator: `GLO.generator_`, code → image.
        sampler: a fitted code sampler: `IMLE`, `Gaussian` or `Mixture`.
        codes: the training images' codes, float `(n, code_dim)`, for `reconstruct`.
        info: what the manifest says besides: data, recipe, training times (JSON).
    """

    def __init__(
        self,
        generator: Generator,
        sampler: CodeSampler,
        codes: object = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(generator, torch.nn.Module):
            raise GlannError(
                f"generator is a {type(generator).__name__}; wanted the network, `GLO.generator_`"
            )
        self.generator = generator.eval()
        self.sampler = sampler
        self.codes = None if codes is None else as_codes(codes)
        self.info = info or {}
        self.device = torch.device("cpu")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        return self.generator.image_shape

    @property
    def code_dim(self) -> int:
        """Numbers in a code."""
        return int(self.generator.config["code_dim"])

    def to(self, device: str) -> "GLANN":
        """Move the generator to a device ("auto", "cpu", "cuda", …); returns self."""
        self.device = pick_device(device)
        self.generator.to(self.device)
        return self

    # ------------------------------------------------------------------ images

    def _block(self) -> int:
        # Images made at a time.  It depends on nothing but their size, so that an image's last
        # bit doesn't depend on how many are asked for.
        _, height, width = self.image_shape
        return max(4, min(256, 2**18 // (height * width)))

    def generate(self, codes: object) -> torch.Tensor:
        """The images of codes `(n, code_dim)`: uint8 `(n, channels, height, width)` on the CPU."""
        codes = as_codes(codes)
        if codes.shape[1] != self.code_dim:
            raise GlannError(
                f"codes have {codes.shape[1]} numbers; this generator's have {self.code_dim}"
            )
        block = self._block()

        def make(part: torch.Tensor) -> torch.Tensor:
            full = torch.cat([part, part[-1:].expand(block - len(part), -1)])
            return to_uint8(self.generator(full.to(self.device))[: len(part)]).cpu()

        with evaluation_mode(self.generator):
            return processes.by_parts(codes.split(block), make)

    def sample(self, n: int, seed: int = 0, start: int = 0) -> torch.Tensor:
        """New images, number `start` to `start + n` of `seed`.

        Image 7 of seed 3 is the same whatever else is asked for with it.

        Returns:
            uint8 `(n, channels, height, width)` on the CPU.
        """
        if n < 0 or start < 0:
            raise GlannError(f"n = {n} and start = {start} were given; wanted 0 or more")
        if n == 0:
            return torch.empty(0, *self.image_shape, dtype=torch.uint8)
        # From a block's beginning, so that each image keeps its place in its block.
        before = start % self._block()
        return self.generate(self.sampler.sample(n + before, seed, start - before))[before:]

    def reconstruct(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """The generator's images of training images' codes: uint8 `(len(indices), c, h, w)`."""
        if self.codes is None:
            raise GlannError(
                "this pipeline was saved without codes, so it can't reconstruct training images; "
                "save it with codes (with_codes=True, on the command line --with-codes), or use "
                "`project` on the images"
            )
        given = torch.as_tensor(indices)
        whole = not (given.is_floating_point() or given.dtype == torch.bool)
        if given.ndim != 1 or not (whole or len(given) == 0):
            raise GlannError(f"indices = {indices}; wanted whole numbers in a row, as [0, 5]")
        if not len(given):
            return torch.empty(0, *self.image_shape, dtype=torch.uint8)
        indices = given.to(torch.int64)
        bad = indices[(indices < 0) | (indices >= len(self.codes))]
        if len(bad):
            raise GlannError(
                f"there is no training image {int(bad[0])}; wanted 0 to {len(self.codes) - 1}"
            )
        return self.generate(self.codes[indices])

    @learning
    def project(self, images: object, steps: int = 300, lr: float = 0.05) -> Projection:
        """Find codes for images that were not trained on, by optimisation.

        Each starts from the nearest of 1024 samples and takes `steps` of Adam on the Laplacian
        pyramid loss, its code held where samples' are: on the sphere, or else no farther out than
        the farthest of these.

        Args:
            images: uint8 `(n, c, h, w)` of the pipeline's shape.
            steps: of optimisation.
            lr: Adam's learning rate at the start; it falls to 0 as a cosine.
        """
        images = as_images(images)
        if tuple(images.shape[1:]) != self.image_shape:
            raise GlannError(
                f"images have shape {tuple(images.shape[1:])}; this pipeline's have "
                f"{self.image_shape} (channels, height, width)"
            )
        loss_of = make_loss("laplacian", self.image_shape[1:], self.device)
        first_codes = self.sampler.sample(1024)
        farthest = float(first_codes.norm(dim=1).max()) or 1.0

        def hold(codes: torch.Tensor) -> torch.Tensor:
            return to_sphere(codes) if self.generator.on_sphere else to_ball(codes, farthest)

        first_images = to_float(self.generate(first_codes)).flatten(1)
        found = []
        for part in images.split(self._block()):
            target = to_float(part.to(self.device))
            best, _ = nearest(target.cpu().flatten(1), first_images)
            codes = first_codes[best].to(self.device).requires_grad_()
            adam = torch.optim.Adam([codes], lr=lr)
            for step in range(steps):
                adam.param_groups[0]["lr"] = learning_rate("cosine", lr, step, steps)
                loss = loss_of(self.generator(codes), target).sum()
                (codes.grad,) = torch.autograd.grad(loss, codes)
                adam.step()
                with torch.no_grad():
                    codes.copy_(hold(codes))
            found.append(codes.detach().cpu())
        codes = torch.cat([*found, torch.empty(0, self.code_dim)])
        made = self.generate(codes) if len(codes) else images
        errors = (to_float(made) - to_float(images)).abs().flatten(1).mean(1)
        return Projection(codes, made, errors)

    def interpolate(self, a: object, b: object, steps: int = 8) -> torch.Tensor:
        """Images on the way from codes `a` to codes `b`, each `(code_dim,)` or `(n, code_dim)`.

        Along great circles where codes lie on the sphere, else along straight lines.

        Returns:
            uint8 `(n · steps, c, h, w)`: the steps of each pair together, ends included.
        """
        if steps < 2:
            raise GlannError(f"steps = {steps} was given; wanted at least 2 (both ends)")
        start, end = (as_codes(torch.atleast_2d(torch.as_tensor(ends))) for ends in (a, b))
        if start.shape != end.shape:
            raise GlannError(
                f"as many codes at both ends are wanted; {tuple(start.shape)} and "
                f"{tuple(end.shape)} were given"
            )
        between = slerp if self.generator.on_sphere else torch.lerp
        path = [between(start, end, t) for t in torch.linspace(0, 1, steps)]
        return self.generate(torch.stack(path, dim=1).flatten(0, 1))

    # ------------------------------------------------------------------ saved

    def save(
        self,
        folder: str | Path,
        with_codes: bool = False,
        half: bool = False,
        details: int | None = None,
    ) -> None:
        """Save into a folder: `manifest.json` and a safetensors file for each part.

        Args:
            folder: made if need be; a pipeline that is there is replaced.
            with_codes: the training images' codes as well (`reconstruct` needs them).
            half: numbers as float16, for half the size, but for tables with larger ones than that
                holds, or smaller ones alone.
            details: of how many training codes IMLE's details are saved, at the most; None: of all
                that it keeps.

        Raises:
            GlannError: no room, or a generator other than `Generator`, which nobody could load.
        """
        if type(self.generator) is not Generator:
            raise GlannError(
                f"a {type(self.generator).__name__} can't be saved in a pipeline, which knows how "
                "to make glann's own Generator alone; keep your network yourself and the sampler "
                "by glann.pipeline.save_sampler"
            )
        sampler = self.sampler
        if details is not None and isinstance(sampler, IMLE):
            sampler = sampler.with_fewer_details(details)
        content, tensors = sampler.state()
        parts = {"generator": self.generator.state_dict(), "sampler": tensors}
        if with_codes:
            if self.codes is None:
                raise GlannError("with_codes was asked for, but this pipeline has no codes")
            parts["codes"] = {"codes": self.codes}
        if half:
            parts = {
                name: {key: _halved(tensor) for key, tensor in part.items()}
                for name, part in parts.items()
            }
        manifest = {
            "image_shape": list(self.image_shape),
            "generator": self.generator.config,
            "sampler": {"name": sampler_name(self.sampler), **content},
            "info": self.info,
            "versions": versions(),
        }
        storage.save(Path(folder), "pipeline", manifest, parts)

    @classmethod
    @learning  # weights that were loaded in inference mode never have gradients
    def load(cls, folder_or_name: str | Path, device: str = "cpu") -> "GLANN":
        """Load a pipeline: its folder, its run's folder, or the name of a shipped one.

        Raises:
            GlannError: there is none, or it is damaged or from a newer glann.
        """
        pick_device(device)  # refused before networks are made
        folder = find_pipeline(folder_or_name)
        manifest, parts = storage.load(folder, "pipeline")
        parts = {
            name: {k: v.float() if v.dtype == torch.float16 else v for k, v in part.items()}
            for name, part in parts.items()
        }
        try:
            generator = Generator(**manifest["generator"])
            generator.load_state_dict(parts["generator"])
            codes = parts["codes"]["codes"] if "codes" in parts else None
            info = manifest["info"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise _unfit(folder, error) from error
        return cls(generator, _sampler_from(folder, manifest, parts), codes, info).to(device)


def _sampler_from(
    folder: Path, manifest: dict[str, Any], parts: dict[str, dict[str, torch.Tensor]]
) -> CodeSampler:
    try:
        content = dict(manifest["sampler"])
        kind = CODE_SAMPLERS[content.pop("name")]
        sampler: CodeSampler = kind.from_state(content, parts["sampler"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise _unfit(folder, error) from error
    return sampler


def _unfit(folder: Path, error: Exception) -> GlannError:
    return GlannError(
        f"{folder}: manifest and weights don't fit this glann ({type(error).__name__}: {error}); "
        f"it was saved with the versions that {folder / storage.MANIFEST} lists"
    )


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    """As float16, if it can be.

    In long trainings BatchNorm's variances grow beyond 65,504, and where each code has a cell to
    itself what a mapper adds to its centre is so little that nothing would be left of it.
    """
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    lost = tensor.any() and tensor.abs().max() < torch.finfo(torch.float16).tiny
    return half if half.isfinite().all() and not lost else tensor


def slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The points at share `t` of the great circles from `a` to `b`, rows of norm 1, `(n, d)`.

    Between opposite ends all ways are as long: one of them is taken.

    Shoemake 1985, "Animating rotation with quaternion curves", section 3.3.
    """
    a, b = to_sphere(a), to_sphere(b)
    angle = (a * b).sum(1, keepdim=True).clamp(-1, 1).acos()
    aside = torch.zeros_like(a).scatter_(1, a.abs().argmin(1, keepdim=True), 1)
    aside = to_sphere(aside - (a * aside).sum(1, keepdim=True) * a)
    opposite = angle > torch.pi - 1e-3
    b, angle = torch.where(opposite, aside, b), torch.where(opposite, torch.pi / 2, angle)
    t = torch.where(opposite, 2 * t, t)
    # Nearly equal ends: a straight line is the same, and sin(angle) would divide by 0.
    weight_a = torch.where(angle < 1e-4, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    weight_b = torch.where(angle < 1e-4, t, (t * angle).sin() / angle.sin())
    return to_sphere(weight_a * a + weight_b * b)
