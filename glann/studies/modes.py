"""Mode dropping: how many modes of the data a sampler reaches, and in what proportions.

VEEGAN's protocol (Srivastava et al. 2017, arXiv 1705.07761, section 4.1): 8 Gaussians in a ring, 25
in a grid, 2,500 samples of each model.  And stacked digits, see `glann.studies.stacked`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from glann.baselines import MODELS
from glann.comparison import LABELS
from glann.evaluation.modes import count_modes
from glann.images import write_png
from glann.report.studies import Picture, Section, Table
from glann.settings import setting
from glann.studies.mixtures import MIXTURES
from glann.studies.points import POINT_GANS, PointGAN, PointGLANN, PointIMLE, point_gan
from glann.studies.stacked import stacked_row
from glann.studies.study import Place, Row, Run, Study

SAMPLES = 2500

OURS = {"imle": "IMLE", "rs-imle": "IMLE, refusing the near", "glann": "GLANN"}
"""Models that are not GANs, with their names for the report."""

PUBLISHED = [
    ["GAN, published", "1 | 3.3", "99.3% | 0.5%", "–"],
    ["VEEGAN, published", "8 | 24.6", "52.9% | 40%", "–"],
    ["PacGAN, published", "7.9 | 24.8", "95.6% | 93.6%", "–"],
]
"""Rings | grids of Srivastava et al. 2017 and Lin et al. 2018 (arXiv 1712.04086)."""

PUBLISHED_STACKED = [
    ("DCGAN", "99", "3.40"),
    ("VEEGAN", "150", "2.95"),
    ("PacGAN", "1000", "0.06"),
    ("WGAN-GP", "959", "0.73"),
    ("R3GAN", "1000", "0.029"),
]
"""After 50 epochs of 128,000 composites: Lin et al. 2018, Huang et al. 2024 (arXiv 2501.05441)."""

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
    composites: int = setting(128_000, "stacked images to learn from", minimum=100)
    samples: int = setting(26_000, "stacked images whose digits are read", minimum=10)
    seeds: int = setting(5, "runs of each model", minimum=1)
    first_seed: int = setting(0, "of the runs", minimum=0)
    points: int = setting(100_000, "points to learn from", minimum=100)
    imle_steps: int = setting(6000, "of IMLE, 500 points each", minimum=1)
    glo_steps: int = setting(2000, "of GLANN's stage one, before IMLE's", minimum=1)
    gan_steps: int = setting(
        2000, "of a GAN's discriminator, 100 points each (published: 400,000)", minimum=1
    )


def runs(settings: ModesSettings) -> list[Run]:
    """One for each mixture, model and seed."""
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
        for model in settings.stacked:
            arguments = {"recipe": settings.recipe, "model": model, "seed": seed}
            arguments |= {"composed": settings.composites, "samples": settings.samples}
            found.append(Run(f"stacked-{model}-{seed}", stacked_row, arguments))
    return found


def points_row(
    place: Place, *, mixture: str, model: str, seed: int, points: int, steps: list[int]
) -> Row:
    """Train a model on points, count the modes that its samples reach, and draw them."""
    data = MIXTURES[mixture]
    learn_from = data.sample(points, seed)
    sampler = make_sampler(mixture, model, steps)
    sampler.fit(learn_from, seed=seed, device=place.device)
    samples = sampler.sample(SAMPLES, seed)
    found = count_modes(fake=samples, centres=data.centres, sigma=data.sigma)
    picture = f"pictures/{place.key}.png"
    write_png(scatter(samples, learn_from), place.folder / picture)
    return {
        "found": found.found,
        "high_quality": found.high_quality,
        "kl": found.kl,
        "spread": within_modes(samples, mixture),
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
    """A table for each mixture, and a scatter of the first seed of each model."""
    good = [row for row in rows if "failed" not in row]
    tables, pictures, findings = [], [], []
    for mixture in settings.mixtures:
        lines = []
        for model in settings.models:
            own = [r for r in rows if (r.get("mixture"), r["model"]) == (mixture, model)]
            done = [row for row in own if row in good]
            name = label(model)
            if done:
                lines.append([
                    name, spread([row["found"] for row in done], 1),
                    spread([100 * row["high_quality"] for row in done], 1) + "%",
                    spread([row["kl"] for row in done], 3),
                    spread([r["spread"] for r in done if r["spread"] is not None], 2),
                    f"{len(own) - len(done)} of {len(own)}",
                ])  # fmt: skip
                first = done[0]
                pictures.append(Picture(first["picture"], f"{mixture}, {name}", model in OURS))
            else:
                lines.append([name, "–", "–", "–", "–", f"{len(own)} of {len(own)}"])
        column = [*MIXTURES].index(mixture)
        lines += [
            [name, *(cell.split(" | ")[min(column, cell.count(" | "))] for cell in cells), "–", "–"]
            for name, *cells in PUBLISHED
        ]
        modes = len(MIXTURES[mixture].centres)
        tables.append(
            Table(
                ["model", f"modes of {modes}", "high quality", "reverse KL", "width", "failed"],
                lines,
                f"{mixture.capitalize()} of {modes}: means over {settings.seeds} seeds ± standard "
                "deviation. Width: of the good samples' modes over the data's, 0.96 if equal.",
                [*OURS.values()],
            )
        )
        ours = [r for r in good if r.get("mixture") == mixture and r["model"] in OURS]
        if ours:
            findings.append(
                f"{mixture}: all {modes} modes in "
                f"{sum(row['found'] == modes for row in ours)} of {len(ours)} runs of IMLE and "
                f"GLANN, {min(r['high_quality'] for r in ours):.0%} to "
                f"{max(r['high_quality'] for r in ours):.0%} of samples of high quality"
            )
    stacked = [row for row in good if row["key"].startswith("stacked-")]
    if stacked:
        tables.append(_stacked_table(settings, stacked))
        findings += [
            f"stacked digits: {LABELS[row['model']]} {row['found']} of 1,000 modes, seed "
            f"{row['seed']}"
            for row in stacked
            if row["model"] == "glann"
        ]
        for row in stacked:
            if row["seed"] == settings.first_seed:
                name = LABELS[row["model"]]
                ours_too = row["model"] == "glann"
                pictures.append(Picture(row["picture"], f"stacked, {name}", ours_too))
                pictures.append(Picture(row["closest"], f"its nearest pairs, {name}", ours_too))
    why = (
        "IMLE pulls a sample to each datum, so no mode is left out; but samples that are nearest "
        "to no datum are never pulled, and lie between the modes. Refusing candidates that are "
        "near a datum already (RS-IMLE) has the others chosen. In GLANN's cells each candidate has "
        "data of its own part near it, and noise picks a cell as often as it has data."
    )
    budget = (
        f"Budget: {settings.imle_steps:,} steps of IMLE, {settings.gan_steps:,} of each "
        "discriminator, of 400,000 in the published protocol: compare the GANs with one another, "
        "and with the published rows. BEGAN is left out: an autoencoder of two numbers learns the "
        "identity."
    )
    finding = "; ".join(findings) or "Neither IMLE nor GLANN was among the models"
    return Section(finding + ".", [why, budget], tables, (), pictures)


def _stacked_table(settings: ModesSettings, rows: Sequence[Row]) -> Table:
    """Modes, KL and birthdays of stacked images, beside the published ones."""
    lines = []
    for model in settings.stacked:
        own = [row for row in rows if row["model"] == model]
        if own:
            sizes = [str(row["birthday"] or "none") for row in own]
            lines.append([
                LABELS[model], spread([row["found"] for row in own], 0),
                spread([row["kl"] for row in own], 3), ", ".join(sizes),
            ])  # fmt: skip
    lines += [[f"{name}, published", modes, kl, "–"] for name, modes, kl in PUBLISHED_STACKED]
    accuracy = rows[0]["accuracy"]
    read = "unknown accuracy" if accuracy is None else f"accuracy {accuracy:.2%} on test digits"
    return Table(
        ["model", "modes of 1,000", "reverse KL", "birthday"],
        lines,
        f"Stacked digits of {settings.recipe}, {settings.samples:,} samples, read by a classifier "
        f"of {read}. Birthday: the smallest sample that likely holds a near-duplicate; the support "
        "is about its square.",
        [LABELS["glann"]],
    )


def label(model: str) -> str:
    """What people call a model."""
    return OURS[model] if model in OURS else LABELS[model]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; a dash for nothing."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


STUDY = Study(
    "modes", "A sampler learned by IMLE drops no mode of the data.", ModesSettings, runs, section
)
