"""Stage two, IMLE: a mapper from Gaussian noise to codes that drops no mode of them.

Li & Malik, "Implicit maximum likelihood estimation" (arXiv 1809.09087), algorithm 1: draw candidate
samples, find for each datum the nearest, take steps that bring it nearer.  Every datum pulls some
sample towards itself, so none can be left out.  GLANN applies it to GLO's codes (arXiv 1812.08985,
section 3.2; "ICP" in its authors' code).

Here it is conditional IMLE (Li, Zhang & Malik, arXiv 1811.12373) on cells of the codes: k-means
splits them, one number of noise picks a cell as often as it has codes, and each code is matched
among its own cell's candidates.  So each region has the weight that it has in the data, the map may
jump from one to another with nothing between them, and a matching that looks at `pool` candidates
for each code costs 1/cells of what looking at all candidates would.

Near means near in the images: the generator's own metric measures codes, where it is at hand.  And
a pool never comes near enough to codes of many numbers, so that the noise that won is improved by
small changes, as if the pool had been many times larger (`glann/matching.py`).  A mapper of several
levels goes on from there: each further one chooses noise of its own for what was made so far, and
adds what is left.

A step pulls T(e) towards the mean of the codes that chose noise near e, so what tells these codes
apart is averaged away.  A sample takes a share of it back, from the training code whose own T(e) is
the nearest: IMLE's theorem is about a density of kernels around the samples (section 3 there), and
this is a kernel of the data's own.
"""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from glann import processes
from glann.codes import as_codes, on_sphere
from glann.devices import PRECISIONS, Replayed, autocast, pick_device, pick_precision
from glann.errors import GlannError, check_fitted
from glann.matching import match
from glann.metric import Metric, image_metric
from glann.nearest import EXACT, SEARCHES, nearest
from glann.networks import Generator, Mapper, evaluation_mode
from glann.optimisers import (
    SCHEDULES,
    adam,
    learning_rate,
    load_optimiser_state,
    optimiser_state,
    set_learning_rate,
)
from glann.randomness import BLOCK, noise, permutation, seeded
from glann.randomness import generator as random_generator
from glann.settings import as_dict, check, setting
from glann.storage import fingerprint
from glann.training import SNAPSHOT, Batches, Parts, Training, learning

CLUSTERED = 50_000
"""Codes that k-means is fitted to, at the most: more don't move its centres much."""

START = 8
"""Codes for each cell among which k-means starts."""

KEPT = 131_072
"""Codes whose details are kept, at the most."""


@dataclass(kw_only=True)
class IMLE:
    """Implicit maximum likelihood estimation of a mapper T: noise → code.

    Minimises Σ_i min_j ‖z_i − T(e_j)‖² over T, with candidates e_1 … e_m ~ N(0, I) of z_i's cell,
    drawn anew for each matching.  After `fit`: `mapper_`, in evaluation mode, and `code_dim_`;
    `details_`, if samples get any; `metric_`, in whose coordinates both are; `chosen_`, the noise
    that each code chose last, float32 `(n, noise_dim)`; `seconds_`.
    """

    noise_dim: int = setting(64, "numbers in a noise vector", minimum=1, maximum=4096)
    width: int = setting(512, "units of the mapper's hidden layers", minimum=8, maximum=8192)
    depth: int = setting(3, "hidden layers of the mapper, of each level", minimum=1, maximum=16)
    levels: int = setting(
        1,
        "levels of the mapper, each with its part of the noise, that add what those before left "
        "out",
        minimum=1,
        maximum=16,
    )
    cells: int | None = setting(
        None,
        "parts that codes are split into by k-means, each matched by itself; none: the square root "
        "of their number, or where that is more, one for 64 codes, up to 1000; 1: all codes are "
        "matched together",
        minimum=1,
    )
    epochs: float = setting(60.0, "passes over the codes", minimum=0.01)
    batch_size: int = setting(128, "codes in a step, at the most", minimum=2)
    lr: float = setting(1e-3, "Adam's learning rate", minimum=0)
    weight_decay: float = setting(1e-5, "Adam's weight decay", minimum=0)
    schedule: str = setting("cosine", "how the learning rate changes", choices=SCHEDULES)
    pool: float = setting(8.0, "candidates drawn for a matching, per code", minimum=0.01)
    refine: int = setting(
        8,
        "rounds in which small changes of the chosen noise are tried; 0, or with refuse: none",
        minimum=0,
    )
    keep: int = setting(6, "epochs for which a matching is kept", minimum=1)
    detail: float = setting(
        0.75,
        "share of what the mapper leaves out of a training code that is added to samples near it; "
        "0: none, and nothing of single codes is kept",
        minimum=0,
        maximum=1,
    )
    mix: float = setting(
        0.0,
        "how many times as much of a second near code's is added besides, so that a sample is like "
        "neither; 0: nothing",
        minimum=0,
        maximum=10,
    )
    tries: int = setting(
        1,
        "candidates drawn for a sample that gets details, of which the first is taken, or the "
        "second where the first is the farthest of all from what codes chose; 1: no choice",
        minimum=1,
        maximum=100,
    )
    refuse: float = setting(
        0.0,
        "candidates nearer than this to a code of their cell are not matched; its unit is the "
        "median distance from a code to the nearest other; 0: all are",
        minimum=0,
    )
    metric: str = setting(
        "images",
        "what near is measured in: images, to first order, where the generator is known; or codes",
        choices=("images", "codes"),
    )
    perturbation: float = setting(
        0.0, "standard deviation of what is added to the chosen noise in a step", minimum=0
    )
    search: str = setting(
        "torch", "nearest-neighbour search; ivf may miss the nearest", choices=SEARCHES
    )
    precision: str = setting(
        "auto",
        "of the mapper's matrix products; among what it makes the nearest are found exactly",
        choices=PRECISIONS,
    )

    def check_together(self) -> None:
        """Raise GlannError for settings that don't fit together."""
        if self.levels > self.noise_dim:
            raise GlannError(
                f"imle.levels = {self.levels}, and imle.noise_dim = {self.noise_dim}; each level "
                "needs a number of noise at least"
            )

    @learning
    def fit(
        self,
        codes: object,
        *,
        generator: Generator | None = None,
        seed: int = 0,
        device: str = "auto",
        folder: str | Path | None = None,
        progress: bool = False,
    ) -> "IMLE":
        """Learn the mapper from codes.

        Args:
            codes: float `(n, code_dim)`, a NumPy array or a tensor, from any model.  If all have
                norm 1, so have the samples.
            generator: what makes images of them, as `GLO.generator_`.  Without it distances are
                those between codes.
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
        identity["generator"] = generator is not None

        with Training("imle", batches, folder, identity, progress) as training:
            saved = training.resume()
            metric = self._metric(codes, generator, saved, seed, device)
            codes = metric.coordinates(codes)
            centres = saved["mapper"]["centres"] if saved else self._centres(codes, seed, on_device)
            with seeded(seed, "mapper"):
                mapper = Mapper(
                    self.noise_dim,
                    code_dim,
                    self.width,
                    self.depth,
                    on_sphere(codes),
                    len(centres),
                    self.levels,
                )
            if saved:
                mapper.load_state_dict(saved["mapper"])
            if not training.done:
                # One of the centres may be no code's nearest where codes are all but alike.
                cells, squares = nearest(codes, centres)
                counts = cells.bincount(minlength=len(centres))
                if not saved:
                    mapper.centres.copy_(centres)
                    mapper.shares.copy_(counts / n)
                    mapper.scale.fill_(float(squares.mean() / code_dim) ** 0.5 or 1.0)
                details, chosen = self._train(
                    training, mapper, codes, cells, counts, metric, saved, seed, on_device
                )
                result = {"mapper": mapper.state_dict(), "details": details._asdict()}
                result |= {"metric": metric.tables(), "matching": {"noise": chosen}}
                training.save(result, done=True)
            elif saved:
                details = Details(**saved["details"])
                # Earlier versions kept the noise of unfinished trainings alone.
                chosen = saved.get("matching", {}).get("noise", torch.empty(0))
            self.seconds_ = training.elapsed
        self.mapper_ = mapper.cpu().eval()
        self.details_ = Details(*(table.cpu() for table in details))
        self.metric_ = metric
        self.chosen_, self._chosen_by = chosen.cpu(), identity["data"]
        self.code_dim_ = code_dim
        return self

    def _metric(
        self,
        codes: torch.Tensor,
        generator: Generator | None,
        saved: Parts | None,
        seed: int,
        device: str,
    ) -> Metric:
        """What distances between codes are measured by."""
        sphere = on_sphere(codes)
        if saved:  # the same numbers, not others that round differently
            return Metric(saved["metric"]["stretch"], saved["metric"]["back"], sphere)
        if generator is None or self.metric == "codes":
            return Metric.plain(codes.shape[1], sphere)
        return Metric.of(image_metric(generator, codes, seed=seed, device=device), sphere)

    def _centres(self, codes: torch.Tensor, seed: int, device: torch.device) -> torch.Tensor:
        """The cells' centres, found by k-means: float32 `(cells, code_dim)`."""
        n = len(codes)
        rows = permutation(seed, "cells", 0, n)[:CLUSTERED]
        chosen = codes[rows].numpy()
        cells = min(
            self.cells or max(round(n**0.5), min(1000, n // 64)), len(np.unique(chosen, axis=0))
        )
        # One thread: sums in the same order every time, in each of several processes too. A GPU
        # rounds differently anyway, and would wait.
        alone = device.type == "cuda" and processes.count() == 1
        start_of = np.random.RandomState(seed % 2**32)
        with threadpool_limits(None if alone else 1), warnings.catch_warnings():
            # Where codes are all but alike some cells stay empty: these are left out below.
            warnings.simplefilter("ignore", ConvergenceWarning)
            # Of a part of the codes as good a start is found as of all, in a fraction of the time.
            start, _ = kmeans_plusplus(chosen[: START * cells], cells, random_state=start_of)
            found = KMeans(cells, init=start, n_init=1, max_iter=20).fit(chosen)
        centres = torch.from_numpy(found.cluster_centers_).float()
        occupied, _ = nearest(codes, centres)
        return centres[occupied.unique()]

    def _train(
        self,
        training: Training,
        mapper: Mapper,
        codes: torch.Tensor,
        cells: torch.Tensor,
        counts: torch.Tensor,
        metric: Metric,
        saved: Parts | None,
        seed: int,
        device: torch.device,
    ) -> tuple["Details", torch.Tensor]:
        share, known = processes.Share(len(codes)), codes
        codes, cells = codes[share.items].to(device), cells[share.items].to(device)
        mapper.to(device).train()
        model = processes.parallel(mapper)
        optimiser = adam(mapper, self.lr, self.weight_decay)
        steps_of_matching = self.keep * training.batches.per_epoch
        chosen = torch.empty(len(codes), self.noise_dim, device=device)
        if saved:
            load_optimiser_state(optimiser, saved["optimiser"])
            chosen.copy_(saved["matching"]["noise"][share.items])
        radius = self.refuse * _apart(known, seed) if self.refuse else 0.0
        precision = pick_precision(self.precision, device)
        steps = training.batches.steps
        more = {}
        if saved and "recall" in saved["matching"]:
            more["recall"] = float(saved["matching"]["recall"])  # until the next matching

        def learn(
            places: torch.Tensor, nudge: torch.Tensor, size: float, lr: float
        ) -> torch.Tensor:
            set_learning_rate(optimiser, lr)
            e = chosen[places]
            if self.perturbation:
                e = e + self.perturbation * nudge
            with autocast(precision, device):
                made = model(e, cells[places], every=True)
            # 1 is what the cells' centres alone would give, whatever unit the codes came in.
            errors = ((made.float() - codes[places]) / mapper.scale).square().mean(2)
            losses: torch.Tensor = errors.sum(1) / size
            optimiser.zero_grad()
            losses.sum().backward()
            optimiser.step()
            return losses[-1].detach()  # of what comes out in the end

        learned = Replayed(learn, device, exact=self.precision == "float32")
        for step, rows in training.steps(seed):
            if step % steps_of_matching == 0:
                matching = step // steps_of_matching
                found, recalled = self.match(mapper, codes, cells, counts, seed, matching, radius)
                chosen.copy_(found)  # where `learn` looks for it
                if self.search not in EXACT:
                    more["recall"] = float(processes.total(recalled)) / share.n
            lr = learning_rate(self.schedule, self.lr, step, steps)
            nudge = torch.empty(0)
            if self.perturbation:
                random = random_generator(seed, "perturbation", step)
                nudge = torch.randn(len(rows), self.noise_dim, generator=random)[share.among(rows)]
            loss = learned(share.places(share.of(rows)), nudge, len(rows), lr)

            training.record(loss, lr=lr, **more)
            if training.picture_due:
                details = self._details(mapper, known, cells, chosen, share, seed)
                made = self._drawn(mapper, details, metric, seed, "snapshot", 0, SNAPSHOT)
                training.snapshot(made)
            if training.checkpoint_due:
                training.save(
                    {
                        "mapper": mapper.state_dict(),
                        "metric": metric.tables(),
                        "optimiser": optimiser_state(optimiser),
                        "matching": {
                            "noise": share.whole(chosen),
                            **{name: torch.tensor(value) for name, value in more.items()},
                        },
                    }
                )
        return self._details(mapper, known, cells, chosen, share, seed), share.whole(chosen)

    def match(
        self,
        mapper: Mapper,
        codes: torch.Tensor,
        cells: torch.Tensor,
        counts: torch.Tensor,
        seed: int,
        matching: int,
        radius: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`glann.matching.match` by these settings: number `matching` of `seed`."""
        return match(
            mapper,
            codes,
            cells,
            counts,
            pool=self.pool,
            refine=self.refine,
            radius=radius,
            search=self.search,
            precision=self.precision,
            seed=seed,
            number=matching,
        )

    def _details(
        self,
        mapper: Mapper,
        codes: torch.Tensor,
        cells: torch.Tensor,
        chosen: torch.Tensor,
        share: processes.Share,
        seed: int,
    ) -> "Details":
        """What the mapper leaves out of `codes`; `cells` and `chosen` are those of this share."""
        rows = permutation(seed, "details", 0, share.n)[: KEPT if self.detail else 0].sort().values
        anchors = torch.zeros(len(rows), codes.shape[1])
        own = share.among(rows)
        places = share.places(rows[own]).to(chosen.device)
        parts = [_candidates(mapper, chosen, cells, part).cpu() for part in places.split(8192)]
        anchors[own] = torch.cat([anchors[:0], *parts])
        processes.total(anchors)
        return Details(anchors, self.detail * (codes[rows] - anchors))

    def reached(self, codes: object) -> torch.Tensor:
        """What samples' codes are at the training codes: T(e_i) + a (z_i − T(e_i)).

        e_i is the noise that code z_i chose, a the share of the details (`detail`).  Samples get
        another code's besides, if there is `mix`: images to learn from are known without.

        Args:
            codes: those that were learned from, float `(n, code_dim)`.

        Returns:
            float32 `(n, code_dim)`, on the CPU.

        Raises:
            GlannError: other codes than these, or after `from_state`: what was saved to be sampled
                knows no longer which noise was chosen.
        """
        check_fitted(self, "mapper_")
        if not hasattr(self, "chosen_"):
            raise GlannError(
                "a saved pipeline doesn't keep the noise that its codes chose; take the IMLE that "
                "`fit` gave, with the folder that it learned in"
            )
        codes = as_codes(codes)
        if not len(self.chosen_):
            raise GlannError(
                "an earlier version learned from these codes and did not keep the noise that they "
                "chose; begin stage two anew (--restart)"
            )
        if fingerprint(codes) != self._chosen_by:
            raise GlannError(
                f"{len(codes)} codes were given, and others, {len(self.chosen_)}, chose the noise; "
                "wanted those that `fit` was given, in their order"
            )
        targets = self.metric_.coordinates(codes)
        cells, _ = nearest(targets, self.mapper_.centres)
        rows = torch.arange(len(targets)).split(8192)
        made = torch.cat([_candidates(self.mapper_, self.chosen_, cells, part) for part in rows])
        return self.metric_.codes(made.lerp_(targets, self.detail))

    def sample(self, n: int, seed: int = 0, start: int = 0) -> torch.Tensor:
        """Codes number `start` to `start + n` of `seed`: float32 `(n, code_dim)` on the CPU."""
        check_fitted(self, "mapper_")
        fitted = self.mapper_, self.details_, self.metric_
        return self._drawn(*fitted, seed, "sample", start, start + n)

    def fresh(self, n: int, seed: int = 0) -> torch.Tensor:
        """Codes such as `sample` gives, of noise that no sample has: float32 `(n, code_dim)`.

        What learns from samples is not to learn from those that will be looked at.
        """
        check_fitted(self, "mapper_")
        fitted = self.mapper_, self.details_, self.metric_
        return self._drawn(*fitted, seed, "fresh", 0, n)

    def _drawn(
        self,
        mapper: Mapper,
        details: "Details",
        metric: Metric,
        seed: int,
        purpose: str,
        start: int,
        stop: int,
    ) -> torch.Tensor:
        """Rows `start` to `stop` of the codes that noise of `seed` gives, `(…, code_dim)`.

        By whole blocks: the same numbers come out whichever rows are asked for together.
        """
        first = start - start % BLOCK
        device = mapper.centres.device
        made = [torch.empty(0, mapper.config["code_dim"])]
        for i in range(first, stop, BLOCK):
            e = noise(seed, purpose, i, i + BLOCK, self.noise_dim + 1)
            e, of_cell = e[:, :-1], e[:, -1]
            tries = self.tries if len(details.anchors) else 1
            if tries > 1:
                more = (tries - 1) * self.noise_dim
                e = torch.cat([e, noise(seed, f"{purpose} tries", i, i + BLOCK, more)], 1)
            e = e.reshape(-1, self.noise_dim).to(device)
            cells = mapper.cells_of(of_cell.to(device)).repeat_interleave(tries)
            with evaluation_mode(mapper):
                codes = mapper(e, cells).cpu()
            if len(details.anchors):
                codes = details.added(codes.view(BLOCK, tries, -1), self.mix)
            made.append(metric.codes(codes))
        return torch.cat(made)[start - first : stop - first]

    def with_fewer_details(self, n: int) -> "IMLE":
        """The same fitted IMLE, but with the details of `n` of its codes at the most, at random."""
        if n < 0:
            raise GlannError(f"details of {n} codes were asked for; wanted 0 or more")
        fewer = copy.copy(self)
        rows = permutation(0, "fewer details", 0, len(self.details_.anchors))[:n].sort().values
        fewer.details_ = Details(*(table[rows] for table in self.details_))
        return fewer

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What `from_state` needs: (settings and sizes as JSON, tensors)."""
        check_fitted(self, "mapper_")
        settings = {key: value for key, value in as_dict(self).items() if value is not None}
        content = {
            "settings": settings,
            "mapper": self.mapper_.config,
            "on_sphere": self.metric_.on_sphere,
        }
        details = {f"details.{name}": table for name, table in self.details_._asdict().items()}
        metric = {f"metric.{name}": table for name, table in self.metric_.tables().items()}
        return content, {**self.mapper_.state_dict(), **details, **metric}

    @classmethod
    def from_state(cls, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> "IMLE":
        """A fitted IMLE from what `state` gave."""
        imle = cls(**content["settings"])
        imle.mapper_ = Mapper(**content["mapper"]).eval()
        # Pipelines of before there was a metric say by their mapper where codes lie.
        on_sphere = bool(content.get("on_sphere", imle.mapper_.on_sphere))
        imle.metric_ = Metric.plain(content["mapper"]["code_dim"], on_sphere)
        if "metric.stretch" in tensors:
            stretch, back = (tensors[f"metric.{name}"].float() for name in ("stretch", "back"))
            imle.metric_ = Metric(stretch, back, on_sphere)
        others = ("details.", "metric.")
        mapper = {key: tensor for key, tensor in tensors.items() if not key.startswith(others)}
        imle.mapper_.load_state_dict(mapper)
        imle.details_ = Details(*(tensors[f"details.{name}"].float() for name in Details._fields))
        imle.code_dim_ = content["mapper"]["code_dim"]
        return imle


class Details(NamedTuple):
    """What the mapper leaves out of training codes: two tables, float32 `(kept, code_dim)`.

    `anchors` are T(e) of the noise that codes chose, `details` what samples near them get besides.
    """

    anchors: torch.Tensor
    details: torch.Tensor

    def added(self, candidates: torch.Tensor, mix: float) -> torch.Tensor:
        """Of each row's candidates one, with the nearest anchor's details, `(n, code_dim)`.

        What noise makes that no code ever chose may lie between the data.  So it is the first of
        them, but the second where the first is the farthest of them all from what codes chose.
        Cells keep their shares, and in each noise that is farther than a share u of it comes
        (1 − uᵏ) (k + 1) / k times as often, k being tries − 1.

        Args:
            candidates: float32 `(n, tries, code_dim)`.
            mix: how many times another anchor's details are added: of the nearest anchor among
                those whose row is odd where the first one's is even, and the other way round.
        """
        n, tries = candidates.shape[:2]
        anchors, squares = nearest(candidates.flatten(0, 1), self.anchors)
        farthest = squares.view(n, tries).argmax(1)
        rows = torch.arange(n), ((farthest == 0) & (tries > 1)).long()
        codes, first = candidates[rows], anchors.view(n, tries)[rows]
        made = codes + self.details[first]
        for odd in (0, 1):
            others = torch.arange(1 - odd, len(self.anchors), 2)
            to = first % 2 == odd
            if mix and len(others):
                there = others[nearest(codes[to], self.anchors[others])[0]]
                made[to] += mix * self.details[there]
        return made


def _apart(codes: torch.Tensor, seed: int) -> float:
    """The median distance of a code to the nearest other, of a thousand among KEPT of them."""
    some = codes[permutation(seed, "apart", 0, len(codes))[:KEPT]]
    parts = [torch.cdist(part, some).kthvalue(2).values for part in some[:1000].split(64)]
    return float(torch.cat(parts).median())


def _candidates(
    mapper: Mapper, noise: torch.Tensor, cells: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """T(e) for some rows of the noise, as it comes out when sampling: no batch's statistics."""
    with evaluation_mode(mapper):
        codes: torch.Tensor = mapper(noise[rows], cells[rows])
    return codes
