"""Stage two, IMLE: a mapper from Gaussian noise to codes that drops no mode of them.

Li & Malik, "Implicit maximum likelihood estimation" (arXiv 1809.09087), algorithm 1: draw candidate
samples, find for each datum the nearest, take steps that bring it nearer.  Every datum pulls some
sample towards itself, so none can be left out.  GLANN applies it to GLO's codes (arXiv 1812.08985,
section 3.2; "ICP" in its authors' code).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glann import processes
from glann.codes import as_codes, on_sphere
from glann.nearest import EXACT, SEARCHES, nearest, recall
from glann.networks import Mapper, evaluation_mode
from glann.randomness import BLOCK, noise, seeded
from glann.randomness import generator as random_generator
from glann.settings import as_dict, check, setting
from glann.storage import fingerprint
from glann.training import (
    PRECISIONS,
    SCHEDULES,
    SNAPSHOT,
    Batches,
    Parts,
    Training,
    adam,
    autocast,
    learning_rate,
    load_optimiser_state,
    optimiser_state,
    pick_device,
    pick_precision,
    set_learning_rate,
)


@dataclass(kw_only=True)
class IMLE:
    """Implicit maximum likelihood estimation of a mapper T: noise → code.

    Minimises Σ_i min_j ‖z_i − T(e_j)‖² over T, with candidates e_1 … e_m ~ N(0, I) drawn anew for
    each matching.  After `fit`: `mapper_`, in evaluation mode, and `code_dim_`; `seconds_`.
    """

    noise_dim: int = setting(64, "numbers in a noise vector", minimum=1, maximum=4096)
    width: int = setting(512, "units of the mapper's hidden layers", minimum=8, maximum=8192)
    depth: int = setting(3, "hidden layers of the mapper", minimum=1, maximum=16)
    epochs: int = setting(50, "passes over the codes", minimum=1)
    batch_size: int = setting(128, "codes in a step, at the most", minimum=2)
    lr: float = setting(1e-3, "Adam's learning rate", minimum=0)
    weight_decay: float = setting(1e-5, "Adam's weight decay", minimum=0)
    schedule: str = setting("cosine", "how the learning rate changes", choices=SCHEDULES)
    pool: float = setting(2.0, "candidates drawn for a matching, per code", minimum=0.01)
    keep: int = setting(1, "epochs for which a matching is kept", minimum=1)
    perturbation: float = setting(0.0, "noise added to the chosen noise in a step", minimum=0)
    search: str = setting(
        "torch", "nearest-neighbour search; ivf may miss the nearest", choices=SEARCHES
    )
    precision: str = setting(
        "auto", "of a step's matrix products; matching is exact", choices=PRECISIONS
    )

    def fit(
        self,
        codes: object,
        *,
        seed: int = 0,
        device: str = "auto",
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> "IMLE":
        """Learn the mapper from codes.

        Args:
            codes: float `(n, code_dim)`, a NumPy array or a tensor, from any model.  If all have
                norm 1, so have the samples.
            seed: of the starting weights, the candidates and the order of the codes.
            device: "auto", "cpu", "cuda", …
            folder: where checkpoint and log go; the same call resumes there.
            progress: show progress on standard error.

        Returns:
            self.

        Raises:
            GlannError: a setting out of range, unfit codes, a folder of another training, a loss
                that is not finite; Interrupted after Ctrl-C, when there is a folder.
        """
        check(self, "imle")
        codes = as_codes(codes)
        n, code_dim = codes.shape
        batches = Batches(n, self.batch_size, self.epochs)
        on_device = pick_device(device)
        identity = {"settings": as_dict(self), "seed": seed, "data": fingerprint(codes)}

        with seeded(seed, "mapper"):
            mapper = Mapper(self.noise_dim, code_dim, self.width, self.depth, on_sphere(codes))
        mapper.mean.copy_(codes.mean(0))
        mapper.scale.copy_(codes.std(0).square().mean().sqrt())
        with Training("imle", batches, folder, identity, progress) as training:
            saved = training.resume()
            if saved:
                mapper.load_state_dict(saved["mapper"])
            if not training.done:
                share = processes.Share(n)
                self._train(training, mapper, codes[share.items].to(on_device), share, saved, seed)
                training.save({"mapper": mapper.state_dict()}, done=True)
            self.seconds_ = training.elapsed
        self.mapper_ = mapper.cpu().eval()
        self.code_dim_ = code_dim
        return self

    def _train(
        self,
        training: Training,
        mapper: Mapper,
        codes: torch.Tensor,
        share: processes.Share,
        saved: Parts | None,
        seed: int,
    ) -> None:
        device, n = codes.device, share.n
        mapper.to(device).train()
        model = processes.parallel(mapper)
        optimiser = adam(mapper, self.lr, self.weight_decay)
        steps_of_matching = self.keep * training.batches.per_epoch
        pool = chosen = torch.empty(0)
        if saved:
            load_optimiser_state(optimiser, saved["optimiser"])
            # The matching under way goes on; at its first step it would have been made anew.
            chosen = saved["matching"]["chosen"][share.items].to(device)
            pool = self._draw(seed, (training.step - 1) // steps_of_matching, n, device)
        # Distances and losses in units of the codes' spread, whatever unit they came in.
        scale = 1.0 if mapper.on_sphere else float(mapper.scale)
        precision = pick_precision(self.precision, device)
        steps = training.batches.steps
        found: dict[str, float] = {}

        for step, rows in training.steps(seed):
            if step % steps_of_matching == 0:
                pool = self._draw(seed, step // steps_of_matching, n, device)
                candidates = processes.by_parts(pool.split(8192), partial(_candidates, mapper))
                chosen, _ = nearest(codes, candidates, self.search)
                if self.search not in EXACT:
                    found["recall"] = recall(codes, candidates, chosen)
            lr = learning_rate(self.schedule, self.lr, step, steps)
            set_learning_rate(optimiser, lr)
            places = share.places(share.of(rows)).to(device)
            e = pool[chosen[places]]
            if self.perturbation:
                random = random_generator(seed, "perturbation", step)
                nudge = torch.randn(len(rows), self.noise_dim, generator=random)
                e += self.perturbation * nudge[share.among(rows)].to(device)

            with autocast(precision, device):
                made = model(e)
            loss = ((made.float() - codes[places]) / scale).square().sum(1).sum() / len(rows)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

            training.record(loss, lr=lr, **found)
            if training.picture_due:
                shown = noise(seed, "snapshot", 0, SNAPSHOT, self.noise_dim).to(device)
                training.snapshot(_candidates(mapper, shown).cpu())
            if training.checkpoint_due:
                training.save(
                    {
                        "mapper": mapper.state_dict(),
                        "optimiser": optimiser_state(optimiser),
                        "matching": {"chosen": share.whole(chosen)},
                    }
                )

    def _draw(self, seed: int, matching: int, n: int, device: torch.device) -> torch.Tensor:
        """The noise of all candidates of a matching, float32 `(pool · n, noise_dim)`."""
        size = max(1, round(self.pool * n))
        return noise(seed, f"candidates {matching}", 0, size, self.noise_dim).to(device)

    def sample(self, n: int, seed: int = 0, start: int = 0) -> torch.Tensor:
        """Codes number `start` to `start + n` of `seed`: float32 `(n, code_dim)` on the CPU."""
        stop = start + n
        first = start - start % BLOCK
        # By whole blocks: the same numbers come out whichever samples are asked for together.
        blocks = [
            _candidates(self.mapper_, noise(seed, "sample", i, i + BLOCK, self.noise_dim))
            for i in range(first, stop, BLOCK)
        ]
        return torch.cat([*blocks, torch.empty(0, self.code_dim_)])[start - first : stop - first]

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What `from_state` needs: (settings and sizes as JSON, tensors)."""
        content = {"settings": as_dict(self), "mapper": self.mapper_.config}
        return content, self.mapper_.state_dict()

    @classmethod
    def from_state(cls, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> "IMLE":
        """A fitted IMLE from what `state` gave."""
        imle = cls(**content["settings"])
        imle.mapper_ = Mapper(**content["mapper"]).eval()
        imle.mapper_.load_state_dict(tensors)
        imle.code_dim_ = content["mapper"]["code_dim"]
        return imle


def _candidates(mapper: Mapper, pool: torch.Tensor) -> torch.Tensor:
    """T(e) for every row of `pool`, as it comes out when sampling: BatchNorm in evaluation mode."""
    codes = pool.new_empty(len(pool), int(mapper.config["code_dim"]))
    with evaluation_mode(mapper):
        for made, part in zip(codes.split(8192), pool.split(8192), strict=True):
            made.copy_(mapper(part))
    return codes
