"""Stage one, GLO: a generator and one code for each training image, learned together.

Bojanowski, Joulin, Lopez-Paz & Szlam, "Optimizing the latent space of generative networks" (arXiv
1707.05776), with the changes of GLANN (Hoshen, Li & Malik, arXiv 1812.08985, section 3.1).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA

from glann import images as pixels
from glann import processes
from glann.codes import in_hand
from glann.contrastive import Features, learn_features
from glann.devices import (
    PRECISIONS,
    Replayed,
    Rows,
    at_once,
    autocast,
    pick_device,
    pick_precision,
)
from glann.errors import GlannError
from glann.losses import LOSSES, make_loss
from glann.networks import BLOCKS, Generator, evaluation_mode, to_ball, to_sphere
from glann.optimisers import (
    OPTIMISERS,
    SCHEDULES,
    learning_rate,
    load_optimiser_state,
    make_optimiser,
    optimiser_state,
    set_learning_rate,
)
from glann.randomness import generator as random_generator
from glann.randomness import permutation, seeded
from glann.settings import as_dict, check, setting
from glann.storage import fingerprint, scratch
from glann.training import Batches, Parts, Training, learning

PCA_IMAGES = 10_000
"""Images that the PCA of the codes' start is fitted to, at the most: more don't change it much."""

PCA_NUMBERS = 2**28
"""Numbers of these images, each twice four bytes: of large images there are fewer."""

SHOWN = 32
"""Images whose reconstructions are shown while training."""

FEATURES = "features"
"""Folder within that of a training, where it keeps features that it learned."""

PLACES = ("vgg_weights", "codes_on")
"""Settings that say where things lie: not part of what is trained, a run goes on with others."""


@dataclass(kw_only=True)
class GLO:
    """Generative latent optimisation: min over G and z_i of Σ ℓ(G(z_i), x_i), ‖z_i‖ held.

    After `fit`: `generator_`, a `Generator` in evaluation mode, and `codes_`, float32
    `(n, code_dim)`, row i for image i; `features_`, which the loss "contrastive" compares, learned
    first, or None; `seconds_`, the time that all training took.
    """

    code_dim: int = setting(64, "numbers in a code", minimum=1, maximum=4096)
    epochs: float = setting(50.0, "passes over the images", minimum=0.01)
    batch_size: int = setting(128, "images in a step, at the most", minimum=2)
    optimiser: str = setting("muon", "what moves the generator's weights", choices=OPTIMISERS)
    generator_lr: float = setting(1e-2, "learning rate of the generator", minimum=0)
    code_lr: float = setting(1e-2, "Adam's learning rate of the codes", minimum=0)
    schedule: str = setting("one-cycle", "how learning rates change", choices=SCHEDULES)
    loss: str = setting("contrastive", "reconstruction loss", choices=LOSSES)
    feature_images: int = setting(
        300_000,
        "images seen, again and again, while the features of loss 'contrastive' are learned; no "
        "more than twice as many as stage one sees",
        minimum=1,
    )
    feature_width: int = setting(
        32,
        "channels of the first layer of the network that learns these features; each further one "
        "has twice as many",
        minimum=4,
        maximum=512,
    )
    vgg_weights: str | None = setting(None, "file with VGG16's weights, for loss 'vgg'")
    codes_on: str = setting(
        "memory",
        "where codes and their optimiser's state are while they are learned; on disk they may be "
        "larger than memory",
        choices=("memory", "disk"),
    )
    space: str = setting("sphere", "where codes are held", choices=("sphere", "ball"))
    start: str = setting("pca", "where codes start", choices=("pca", "random"))
    width: int = setting(64, "channels before the generator's last layer", minimum=4, maximum=512)
    hidden: int = setting(1024, "units of the generator's first layer", minimum=8, maximum=8192)
    batch_norm: bool = setting(True, "BatchNorm in the generator")
    blocks: str = setting("transposed", "what the generator is made of", choices=BLOCKS)
    precision: str = setting(
        "auto", "of matrix products; auto: bfloat16 where that is faster", choices=PRECISIONS
    )

    @learning
    def fit(
        self,
        images: object,
        *,
        seed: int = 0,
        device: str = "auto",
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> "GLO":
        """Learn generator and codes from images.

        Args:
            images: uint8 `(n, channels, height, width)`, a NumPy array or a tensor.
            seed: of the starting weights and the order of the images.
            device: "auto", "cpu", "cuda", …
            folder: where checkpoint, log and pictures go; a second call with the same settings and
                images resumes there, and on a CPU ends bit for bit as one that was never stopped.
            progress: show progress on standard error.

        Returns:
            self.

        Raises:
            GlannError: a setting out of range, unfit images, a folder of another training, a loss
                that is not finite; Interrupted after Ctrl-C, when there is a folder.
        """
        check(self, "glo")
        images = pixels.as_images(images)
        n, channels, height, width = images.shape
        if not (8 <= height <= 256 and 8 <= width <= 256):
            raise GlannError(f"images are {height}×{width}; wanted sides from 8 to 256")
        batches = Batches(n, self.batch_size, self.epochs)
        on_device = pick_device(device)
        if self.codes_on == "disk" and folder is None:
            raise GlannError(
                "glo.codes_on = 'disk' needs a folder; give one, or keep them in memory"
            )
        precision = pick_precision(self.precision, on_device)
        settings = {key: value for key, value in as_dict(self).items() if key not in PLACES}
        identity = {"settings": settings, "seed": seed, "data": fingerprint(images)}
        training = Training("glo", batches, folder, identity, progress)
        training.refuse_another()  # not after minutes of learning features
        self.features_, *took = None, 0.0, 0.0
        if self.loss == "contrastive":
            self.features_, *took = self.learn_features(images, seed, on_device, folder, progress)

        with seeded(seed, "generator"):
            generator = Generator(
                code_dim=self.code_dim,
                image_shape=(channels, height, width),
                width=self.width,
                hidden=self.hidden,
                batch_norm=self.batch_norm,
                blocks=self.blocks,
                on_sphere=self.space == "sphere",
            )
        with training:
            saved = training.resume()
            if not saved:
                training.seconds, training.cpu_seconds = took
            if saved:
                generator.load_state_dict(saved["generator"])
            if not training.done:
                codes = self._train(training, generator, images, saved, seed, on_device, precision)
                parts = {"generator": generator.state_dict(), "codes": {"codes": codes}}
                training.save(parts, done=True, generator=generator.config)
            elif saved:
                codes = saved["codes"]["codes"]
            self.seconds_ = training.elapsed
        self.generator_ = generator.cpu().eval()
        self.codes_ = codes.cpu()
        return self

    def _train(
        self,
        training: Training,
        generator: Generator,
        images: torch.Tensor,
        saved: Parts | None,
        seed: int,
        device: torch.device,
        precision: torch.dtype,
    ) -> torch.Tensor:
        hold = to_sphere if self.space == "sphere" else to_ball
        share = processes.Share(len(images))
        generator.to(device).train()
        model = processes.parallel(generator)
        optimiser = make_optimiser(self.optimiser, generator, self.generator_lr)
        home = device if self.codes_on == "memory" else torch.device("cpu")
        tables = [self._table(len(share), training.folder) for _ in range(3)]
        if saved:
            kept = [saved["codes"]["codes"], *(saved["code_adam"][key] for key in CodeAdam.STATE)]
            for table, values in zip(tables, kept, strict=True):
                table.copy_(values[share.items])
            load_optimiser_state(optimiser, saved["optimiser"])
            saved.clear()  # a file that is mapped takes its room on the disk even when deleted
        else:
            alone = len(share) == len(images)
            codes = self._starting_codes(images, seed, tables[0] if alone else None)
            if self.space == "ball":  # all of it in use, rather than all codes on its surface
                codes /= codes.norm(dim=1).max()
            if not alone:
                tables[0].copy_(codes[share.items])
            for part in tables[0].split(in_hand(codes)):
                part.copy_(hold(part))
        codes, *moments = (table.to(home) for table in tables)
        code_adam = CodeAdam(codes, dict(zip(CodeAdam.STATE, moments, strict=True)))
        size = images.shape[2], images.shape[3]
        loss_of = make_loss(self.loss, size, device, self.vgg_weights, self.features_, precision)
        steps = training.batches.steps
        own_images = Rows(images[share.items], device)

        def learn(
            sent: torch.Tensor,
            places: torch.Tensor,
            ways: torch.Tensor,
            size: float,
            lr: float,
            code_lr: float,
            *unbiased: float,
        ) -> torch.Tensor:
            set_learning_rate(optimiser, lr)
            z = codes[places].to(device).requires_grad_()
            with autocast(precision, device):
                made = model(z).float()
            batch = pixels.to_float(own_images.found(sent))
            if self.features_ is not None:
                # Their strides see more of some pixels than of others.  Here they see each image
                # from elsewhere every time, as E-LPIPS does (arXiv 1906.03973).
                made, batch = (pixels.moved(each, ways) for each in (made, batch))
            loss: torch.Tensor = loss_of(made, batch).sum() / size
            optimiser.zero_grad()
            loss.backward()

            def move_codes() -> None:
                # The mean divides each code's gradient by the batch; Adam doesn't mind.
                assert z.grad is not None
                moved = code_adam.step(codes, places, z.grad.to(home), code_lr, *unbiased)
                codes[places] = hold(moved)

            at_once(home, optimiser.step, move_codes)
            return loss.detach()

        learned = Replayed(learn, home, exact=self.precision == "float32")
        for step, rows in training.steps(seed):
            lr = learning_rate(self.schedule, self.generator_lr, step, steps)
            code_lr = learning_rate(self.schedule, self.code_lr, step, steps)
            unbiased = code_adam.unbiased(visits=step // training.batches.per_epoch + 1)
            places = share.places(share.of(rows))
            sent = own_images.sent(places)
            ways = torch.rand(len(rows), 2, generator=random_generator(seed, "ways", step))
            ways = ways[share.among(rows)]
            loss = learned(sent, places, ways, len(rows), lr, code_lr, *unbiased)

            training.record(loss, lr=lr)
            if training.picture_due:
                shown = share.first(codes, SHOWN).to(device)
                training.picture("reconstructions", reconstruction_rows(generator, shown, images))
            if training.checkpoint_due:
                moving = code_adam.state().items()
                training.save(
                    {
                        "generator": generator.state_dict(),
                        "codes": {"codes": share.whole(codes)},
                        "optimiser": optimiser_state(optimiser),
                        "code_adam": {key: share.whole(table) for key, table in moving},
                    }
                )
        optimiser.zero_grad()  # the gradients' memory is not needed any more
        return share.whole(codes)

    def learn_features(
        self,
        images: torch.Tensor,
        seed: int,
        device: torch.device,
        folder: str | Path | None,
        progress: bool,
    ) -> tuple[Features, float, float]:
        """What the loss "contrastive" compares, and the seconds and CPU seconds that it took.

        Args as in `fit`, with uint8 images and a torch device.
        """
        return learn_features(
            images,
            epochs=min(self.feature_images / len(images), 2 * self.epochs),
            width=self.feature_width,
            seed=seed,
            device=device,
            precision=pick_precision(self.precision, device),
            folder=None if folder is None else Path(folder) / FEATURES,
            progress=progress,
        )

    def _table(self, n: int, folder: Path | None) -> torch.Tensor:
        """Room for a row of each code, where they are kept: zeros, float32 `(n, code_dim)`."""
        if self.codes_on == "memory" or folder is None:
            return torch.zeros(n, self.code_dim)
        return scratch(folder, (n, self.code_dim))

    def _starting_codes(
        self, images: torch.Tensor, seed: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Codes before they are put on the sphere or into the ball: float32 `(n, code_dim)`.

        They are written to `out` if it is given.
        """
        n = len(images)
        # The authors' start; with PCA it fills the dimensions for which there are no components.
        random = random_generator(seed, "codes")
        codes = torch.randn(n, self.code_dim, generator=random, out=out).mul_(0.01)
        if self.start == "random":
            return codes
        flat = images.flatten(1)
        fitted = min(PCA_IMAGES, max(2 * self.code_dim, PCA_NUMBERS // flat.shape[1]))
        chosen = permutation(seed, "pca", 0, n)[:fitted]
        components = min(self.code_dim, len(chosen), flat.shape[1])
        # Whitened: on the sphere all directions then count alike, and detail is not squeezed into
        # those of little variance, where a mapper's errors would be large beside it.
        pca = PCA(components, whiten=True, svd_solver="randomized", random_state=seed % 2**32)
        with np.errstate(invalid="ignore"):  # images that are all alike have no variance to share
            pca.fit(pixels.to_float(flat[chosen]).numpy())
        # What has no variance but rounding would be blown up to as much as the rest.
        variance = pca.explained_variance_
        components = int((variance > max(1e-10, 1e-6 * variance[0])).sum())
        at_once = min(PCA_IMAGES, max(1, PCA_NUMBERS // 8 // flat.shape[1]))
        for some, into in zip(flat.split(at_once), codes.split(at_once), strict=True):
            found = pca.transform(pixels.to_float(some).numpy())[:, :components]
            into[:, :components] += torch.from_numpy(found).float()
        return codes


class CodeAdam:
    """Adam for codes: a step touches only the batch's rows, moments and all.

    Like `torch.optim.SparseAdam`, but it corrects the moments' bias by the visits that a code has
    had (one an epoch) and not by the steps of the whole run: uncorrected, early steps are many
    times too long.  A dense Adam would go on moving every code by its old momentum at each of an
    epoch's steps, at a cost that grows with n.  Both end at a higher loss and take longer.
    """

    BETA1, BETA2, EPSILON = 0.5, 0.999, 1e-8
    STATE = ("mean", "square")

    def __init__(self, codes: torch.Tensor, state: dict[str, torch.Tensor] | None = None) -> None:
        state = state or {"mean": torch.zeros_like(codes), "square": torch.zeros_like(codes)}
        self.mean = state["mean"].to(codes.device)
        self.square = state["square"].to(codes.device)

    def state(self) -> dict[str, torch.Tensor]:
        """Both moments, float32 `(n, code_dim)`."""
        return {"mean": self.mean, "square": self.square}

    def unbiased(self, visits: int) -> tuple[float, float]:
        """What the moments of a constant are short of it by, as factors, after so many visits."""
        return 1 - self.BETA1**visits, 1 - self.BETA2**visits

    def step(
        self,
        codes: torch.Tensor,
        rows: torch.Tensor,
        gradient: torch.Tensor,
        lr: float,
        mean_factor: float,
        square_factor: float,
    ) -> torch.Tensor:
        """The moved codes of `rows`, `(len(rows), code_dim)`; both factors as `unbiased` gives."""
        mean = self.mean[rows].lerp_(gradient, 1 - self.BETA1)
        square = self.square[rows].lerp_(gradient.square(), 1 - self.BETA2)
        self.mean[rows], self.square[rows] = mean, square
        mean, square = mean / mean_factor, square / square_factor
        moved: torch.Tensor = codes[rows] - lr * mean / square.sqrt_().add_(self.EPSILON)
        return moved


def reconstruction_rows(
    generator: Generator, codes: torch.Tensor, images: torch.Tensor
) -> torch.Tensor:
    """One picture: rows of eight images, each above the row of their reconstructions."""
    shown = images[: len(codes)]
    with evaluation_mode(generator):
        made = pixels.to_uint8(generator(codes)).cpu()
    return pixels.grid(pixels.interleave(shown, made), columns=min(8, len(shown)))
