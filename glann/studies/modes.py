"""Mode dropping: how many modes of the data a sampler reaches, and in what proportions.

VEEGAN's protocol (Srivastava et al. 2017, arXiv 1705.07761, section 4.1): 8 Gaussians in a ring, 25
in a grid, 2,500 samples of each model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glann.evaluation.modes import count_modes
from glann.imle import IMLE
from glann.report.studies import Section, Table
from glann.settings import setting
from glann.studies.mixtures import MIXTURES
from glann.studies.study import Place, Row, Run, Study

SAMPLES = 2500


@dataclass(kw_only=True)
class ModesSettings:
    """What is trained on which points, and for how long."""

    mixtures: list[str] = setting([*MIXTURES], "data", choices=tuple(MIXTURES))
    seeds: int = setting(5, "runs of each model", minimum=1)
    first_seed: int = setting(0, "of the runs", minimum=0)
    points: int = setting(100_000, "points to learn from", minimum=100)
    imle_epochs: int = setting(50, "passes of IMLE over the points", minimum=1)


def runs(settings: ModesSettings) -> list[Run]:
    """One for each mixture, model and seed."""
    imle = {"noise_dim": 2, "width": 256, "depth": 3, "epochs": settings.imle_epochs}
    return [
        Run(
            f"{mixture}-imle-{seed}",
            points_row,
            {"mixture": mixture, "model": "imle", "seed": seed, "points": settings.points}
            | {"settings": imle},
        )
        for mixture in settings.mixtures
        for seed in range(settings.first_seed, settings.first_seed + settings.seeds)
    ]


def points_row(
    place: Place, *, mixture: str, model: str, seed: int, points: int, settings: dict[str, Any]
) -> Row:
    """Train a model on points and count the modes that its samples reach."""
    data = MIXTURES[mixture]
    imle = IMLE(**settings).fit(data.sample(points, seed), seed=seed, device=place.device)
    return score(imle.sample(SAMPLES, seed), mixture) | {"seconds": imle.seconds_}


def score(samples: torch.Tensor, mixture: str) -> Row:
    """What `count_modes` finds, as a row."""
    data = MIXTURES[mixture]
    found = count_modes(fake=samples, centres=data.centres, sigma=data.sigma)
    return {"found": found.found, "high_quality": found.high_quality, "kl": found.kl}


def section(settings: ModesSettings, rows: Sequence[Row], folder: Path) -> Section:
    """The table of both mixtures."""
    lines = [
        [
            f"{row['mixture']}, {row['model']}, seed {row['seed']}",
            str(row["found"]),
            f"{row['high_quality']:.1%}",
            f"{row['kl']:.3f}",
        ]
        for row in rows
        if "failed" not in row
    ]
    least = min((row["found"] for row in rows if "failed" not in row), default=0)
    table = Table(["model", "modes", "high quality", "reverse KL"], lines)
    return Section(f"The fewest modes that a run found: {least}.", tables=[table])


STUDY = Study(
    "modes", "A sampler learned by IMLE drops no mode of the data.", ModesSettings, runs, section
)
