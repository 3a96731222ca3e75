"""Mode dropping: how many modes of the data a sampler reaches, and in what proportions.

VEEGAN's protocol (Srivastava et al. 2017, arXiv 1705.07761, section 4.1): 8 Gaussians in a ring, 25
in a grid, 2,500 samples of each model.  And stacked digits, see `glann.studies.stacked`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glann.baselines import MODELS
from glann.comparison import LABELS
from glann.evaluation.modes import count_modes
from glann.images import write_png
from glann.report.studies import Picture, Section, Table
from glann.settings import setting
from glann.studies.mixtures import MIXTURES
from glann.studies.points import POINT_GANS, PointGAN, PointGLANN, PointIMLE, point_gan
from glann.studies.stacked import stacked_row, stacked_section
from glann.studies.study import Place, Row, Run, Study, spread
from glann.studies.support import images_row, support_section

SAMPLES = 2500

OURS = {"imle": "IMLE", "rs-imle": "IMLE, refusing the near", "glann": "GLANN"}
"""Models that are not GANs, with their names for the report."""

PUBLISHED = [
    ["GAN, published", "1 | 3.3", "99.3% | 0.5%", "–"],
    ["VEEGAN, published", "8 | 24.6", "52.9% | 40%", "–"],
    ["PacGAN, published", "7.9 | 24.8", "95.6% | 93.6%", "–"],
]
"""Rings | grids of Srivastava et al. 2017 and Lin et al. 2018 (arXiv 1712.04086)."""

CANDIDATES = {"ring": 40, "grid": 100}
"""Of plain IMLE in a step, about five for each mode: with many more, all data find one near, and
nothing pulls at the others."""

REFUSING, REFUSE = 200, 18.0
"""Candidates of IMLE that refuses the near, and how near: see `PointIMLE`."""


@dataclass(kw_only=True)
class ModesSettings:
    """What is trained on which points, and for how long."""

    mixtures: list[str] = setting([*MIXTURES], "data", choices=tuple(MIXTURES))
    models: list[str] = setting(
        [*OURS, *POINT_GANS], "what is trained", choices=(*OURS, *POINT_GANS)
    )
    stacked: list[str] = setting(
        [], "models that learn stacked images of digits", choices=("glann", *MODELS)
    )
    recipe: str = setting("mnist-short", "of the digits, the networks and the lengths")
    changes: list[str] = setting([], "of the recipe for stacked images, such as glo.epochs=6")
    composites: int = setting(128_000, "stacked images to learn from", minimum=100)
    samples: int = setting(26_000, "stacked images whose digits are read", minimum=10)
    birthday: list[str] = setting(
        [],
        "models of the recipe's own images, trained if they aren't yet: recall and birthday test",
        choices=("glann", *MODELS),
    )
    seeds: int = setting(5, "runs of each model", minimum=1)
    first_seed: int = setting(0, "of the runs", minimum=0)
    points: int = setting(100_000, "points to learn from", minimum=100)
    imle_steps: int = setting(6000, "of IMLE, 500 points each", minimum=1)
    glo_steps: int = setting(2000, "of GLANN's stage one, before IMLE's", minimum=1)
    gan_steps: int = setting(
        2000, "of a GAN's discriminator, 100 points each (published: 400,000)", minimum=1
    )


def runs(settings: ModesSettings) -> list[Run]:
    """One for each mixture, model and seed; of images also one for the training images."""
    own: dict[str, Any] = {"recipe": settings.recipe}
    stacked = own | {"changes": settings.changes, "composed": settings.composites}
    stacked |= {"samples": settings.samples}
    found = []
    # Seed by seed: a study that is stopped has something of every model.
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        for mixture in settings.mixtures:
            for model in settings.models:
                steps = [settings.imle_steps] if model in OURS else [settings.gan_steps]
                if model == "glann":
                    steps.append(settings.glo_steps)
                arguments = {"mixture": mixture, "model": model, "seed": seed}
                arguments |= {"points": settings.points, "steps": steps}
                found.append(Run(f"{mixture}-{model}-{seed}", points_row, arguments))
        for models, name, function, shared in (
            (settings.stacked, "stacked", stacked_row, stacked),
            (settings.birthday, Path(settings.recipe).stem, images_row, own),
        ):
            # The training images need no second seed.
            floor = ["floor"] if models and seed == settings.first_seed else []
            for model in [*floor, *models]:
                arguments = {**shared, "model": model, "seed": seed}
                if function is stacked_row:
                    arguments["changes"] = _concerning(model, settings.changes)
                found.append(Run(f"{name}-{model}-{seed}", function, arguments))
    return found


def _concerning(model: str, changes: list[str]) -> list[str]:
    """Those that are not of another model's section, so that its row stays when they change."""
    others = set(MODELS) - {model}
    return [change for change in changes if change.partition(".")[0] not in others]


def points_row(
    place: Place, *, mixture: str, model: str, seed: int, points: int, steps: list[int]
) -> Row:
    """Train a model on points, count the modes that its samples reach, and draw them."""
    data = MIXTURES[mixture]
    learn_from = data.sample(points, seed)
    sampler = make_sampler(mixture, model, steps)
    began = time.process_time()
    sampler.fit(learn_from, seed=seed, device=place.device)
    cpu_seconds = time.process_time() - began
    samples = sampler.sample(SAMPLES, seed)
    found = count_modes(fake=samples, centres=data.centres, sigma=data.sigma)
    picture = f"pictures/{place.key}.png"
    write_png(scatter(samples, learn_from), place.folder / picture)
    return {
        "found": found.found,
        "high_quality": found.high_quality,
        "kl": found.kl,
        "spread": within_modes(samples, mixture),
        "cpu_seconds": round(cpu_seconds, 3),
        "picture": picture,
    }


def make_sampler(mixture: str, model: str, steps: list[int]) -> PointIMLE | PointGLANN | PointGAN:
    """An unfitted sampler of points."""
    if model in POINT_GANS:
        return point_gan(model, steps[0])
    if model == "imle":
        return PointIMLE(steps=steps[0], candidates=CANDIDATES[mixture])
    refusing = PointIMLE(steps=steps[0], candidates=REFUSING, refuse=REFUSE)
    if model == "rs-imle":
        return refusing
    return PointGLANN(imle_steps=steps[0], glo_steps=steps[1])


def within_modes(samples: torch.Tensor, mixture: str) -> float | None:
    """Standard deviation of the samples of high quality around their centres, over the data's.

    1 (.96, as they are cut off) is as wide as the data; near 0, modes have collapsed to points.
    None if there is no such sample.
    """
    data = MIXTURES[mixture]
    distances, which = torch.cdist(samples, data.centres).min(1)
    good = distances <= 3 * data.sigma
    if not good.any():
        return None
    return float((samples - data.centres[which])[good].square().mean().sqrt() / data.sigma)


def scatter(samples: torch.Tensor, data: torch.Tensor, side: int = 220) -> torch.Tensor:
    """Samples in black above data in orange: uint8 `(3, side, side)`."""
    reach = 1.25 * float(data.abs().max())
    picture = torch.full((3, side, side), 255, dtype=torch.uint8)
    for points, colour in ((data[:5000], (255, 205, 160)), (samples, (20, 20, 20))):
        inside = points[(points.abs() < reach).all(1)]
        column, row = ((inside * torch.tensor([1, -1]) / reach + 1) / 2 * side).long().T
        picture[:, row, column] = torch.tensor(colour, dtype=torch.uint8)[:, None]
    return picture


def section(settings: ModesSettings, rows: Sequence[Row], folder: Path) -> Section:
    """Of points a table for each mixture and a scatter of each model; then what images show."""
    of_images = [row for row in rows if "mixture" not in row]
    stacked = [row for row in of_images if "composed" in row]
    own = [row for row in of_images if "composed" not in row]
    parts = [_points_section(settings, rows)] if settings.mixtures else []
    parts += [stacked_section(settings.recipe, settings.samples, stacked)] if stacked else []
    parts += [support_section(settings.recipe, own)] if own else []
    finding = "; ".join(part.finding for part in parts if part.finding)
    return Section(
        f"{finding or 'There are no numbers of IMLE or GLANN'}.",
        [text for part in parts for text in part.paragraphs],
        [table for part in parts for table in part.tables],
        (),
        [picture for part in parts for picture in part.pictures],
    )


def _points_section(settings: ModesSettings, rows: Sequence[Row]) -> Section:
    """A table for each mixture, and a scatter of the first seed of each model."""
    tables, pictures, findings = [], [], []
    for mixture in settings.mixtures:
        lines = []
        for model in settings.models:
            own = [r for r in rows if (r.get("mixture"), r["model"]) == (mixture, model)]
            done = [row for row in own if "failed" not in row]
            failed = f"{len(own) - len(done)} of {len(own)}"
            lines.append([label(model), *_cells(done), failed])
            if done:
                caption = f"{mixture}, {label(model)}"
                pictures.append(Picture(done[0]["picture"], caption, model in OURS))
        column = [*MIXTURES].index(mixture)
        lines += [
            [name, *(cell.split(" | ")[min(column, cell.count(" | "))] for cell in cells), *"–––"]
            for name, *cells in PUBLISHED
        ]
        modes = len(MIXTURES[mixture].centres)
        tables.append(
            Table(
                [
                    "model",
                    f"modes of {modes}",
                    "high quality",
                    "reverse KL",
                    "width",
                    "CPU seconds",
                    "failed",
                ],
                lines,
                f"{mixture.capitalize()} of {modes}: means over {settings.seeds} seeds ± standard "
                "deviation. Width: of the good samples' modes over the data's, 0.96 if equal. "
                "CPU seconds are of training.",
                [*OURS.values()],
            )
        )
        ours = [
            row
            for row in rows
            if row.get("mixture") == mixture and row["model"] in OURS and "failed" not in row
        ]
        if ours:
            findings.append(
                f"{mixture}: all {modes} modes in "
                f"{sum(row['found'] == modes for row in ours)} of {len(ours)} runs of IMLE and "
                f"GLANN, {min(r['high_quality'] for r in ours):.0%} to "
                f"{max(r['high_quality'] for r in ours):.0%} of samples of high quality"
            )
    why = [_WHY] if OURS.keys() & set(settings.models) else []
    if POINT_GANS.keys() & set(settings.models):
        why.append(
            f"GANs had {settings.gan_steps:,} steps of the discriminator, of 400,000 in the "
            "published protocol: compare them with one another, and with the published rows. BEGAN "
            "is left out: an autoencoder of two numbers learns the identity."
        )
    return Section("; ".join(findings), why, tables, (), pictures)


def _cells(rows: Sequence[Row]) -> list[str]:
    """Modes, quality, KL, width and time of one model's runs; dashes for none."""
    if not rows:
        return ["–"] * 5
    return [
        spread([row["found"] for row in rows], 1),
        spread([100 * row["high_quality"] for row in rows], 1) + "%",
        spread([row["kl"] for row in rows], 3),
        spread([row["spread"] for row in rows if row["spread"] is not None], 2),
        spread([row["cpu_seconds"] for row in rows], 0),
    ]


_WHY = (
    "IMLE pulls a sample to each datum, so no mode is left out; but samples that are nearest to no "
    "datum are never pulled, and lie between the modes. Refusing candidates that are near a datum "
    "already (RS-IMLE) has the others chosen. In GLANN's cells each candidate has data of its own "
    "part near it, and noise picks a cell as often as it has data."
)


def label(model: str) -> str:
    """What people call a model."""
    return OURS[model] if model in OURS else LABELS[model]


STUDY = Study(
    "modes",
    "A sampler learned by IMLE drops no mode of the data.",
    ModesSettings,
    runs,
    section,
    version=2,
)
