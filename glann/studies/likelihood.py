"""Likelihood: whether samples' density explains held-out data as IMLE's objective falls.

Li & Malik (arXiv 1809.09087, section 3) show that IMLE maximises likelihood under conditions,
without ever computing one.  Here it is computed afterwards, under a kernel estimate of the samples:
while the objective falls on data of known density, and at the end on images, in the protocol of
the published figures.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glann.baselines import MODELS
from glann.comparison import LABELS, SAMPLE_SEED
from glann.evaluation.likelihood import choose_sigma, mean_and_error, parzen_log_likelihood
from glann.images import to_float
from glann.nearest import nearest
from glann.randomness import permutation
from glann.recipes import load_recipe
from glann.report.curves import Curve, two_curves
from glann.report.studies import Chart, Section, Table
from glann.settings import setting
from glann.studies.mixtures import MIXTURES, GaussianMixture
from glann.studies.points import PointIMLE
from glann.studies.study import Place, Row, Run, Study, failures, spread
from glann.studies.trained import images_of, name_of, trained

GAUSSIANS = {f"gaussian-{dim}": GaussianMixture(torch.zeros(1, dim), 1.0) for dim in (2, 8)}
DENSITIES = {**MIXTURES, **GAUSSIANS}

WIDTHS = [round(10 ** (i / 5 - 2.6), 4) for i in range(16)]
"""Of kernels to choose among, from .0025 to 2.5 of the data's unit, 1.6 times apart."""

CANDIDATES = 500
"""Of IMLE in a step, as many as data: the theorem wants no fewer."""

PUBLISHED = {"GMMN": "147 ± 2", "GAN": "225 ± 2", "IMLE": "257 ± 6", "AAE": "340 ± 2"}
"""Mean log-likelihoods of MNIST's test images as their papers give them, in nats: generative moment
matching, Goodfellow et al. 2014, Li & Malik 2018, and adversarial autoencoders."""

AGAINST = (
    "Against the measure: Theis, van den Oord and Bethge (2016) show that in as many dimensions as "
    "an image has, the estimate is far from the true likelihood for any number of samples that one "
    "can draw, that it prefers centres of clusters, and that it can put a lookup table of training "
    "images above a good model. It says little of how samples look; it is given because the "
    "papers gave it."
)


@dataclass(kw_only=True)
class LikelihoodSettings:
    """Which densities and which models of a recipe's images."""

    densities: list[str] = setting([*DENSITIES], "known ones", choices=tuple(DENSITIES))
    seeds: int = setting(3, "runs of each", minimum=1)
    steps: int = setting(10_000, "of IMLE on data of known density", minimum=8)
    held_out: int = setting(1000, "fresh points whose likelihood is measured", minimum=2)
    recipe: str = setting("mnist-short", "whose images and models are scored; none: no images")
    models: list[str] = setting(
        ["floor", "mixture", "glann", "pixel-imle", "vae", "ns-gan", "wgan-gp"],
        "trained if they aren't yet in the recipe's run; floor: training images themselves, "
        "mixture: on the codes of GLANN's stage one",
        choices=("floor", "mixture", "glann", *MODELS),
    )
    samples: int = setting(10_000, "of each model, under their kernels", minimum=10)
    validation: int = setting(1000, "training images by which the width is chosen", minimum=2)


def runs(settings: LikelihoodSettings) -> list[Run]:
    """One for each density and seed, then one for each model and seed."""
    known = [
        Run(
            f"{density}-{seed}",
            density_row,
            {
                "density": density,
                "seed": seed,
                "steps": settings.steps,
                "held_out": settings.held_out,
            },
        )
        for density in settings.densities
        for seed in range(settings.seeds)
    ]
    if settings.recipe == "none":
        return known
    fields = ("recipe", "samples", "validation")
    shared = {name: getattr(settings, name) for name in fields}
    named = Path(settings.recipe).stem  # it may be a file's path
    seeds, of_codes = range(settings.seeds), ("mixture", "glann")
    together = {*of_codes} <= {*settings.models}
    codes = [
        Run(f"{named}-mixture-glann-{seed}", codes_rows, {"seed": seed} | shared) for seed in seeds
    ]
    others = [
        Run(f"{named}-{model}-{seed}", images_row, {"model": model, "seed": seed} | shared)
        for model in settings.models
        if not (together and model in of_codes)
        for seed in seeds
    ]
    return known + codes * together + others


def density_row(place: Place, *, density: str, seed: int, steps: int, held_out: int) -> Row:
    """IMLE on data of known density: its objective and the held-out likelihood, over training.

    The objective is over all of one more set of points and as many candidates: the mean squared
    distance from a point to the nearest sample.
    """
    data = DENSITIES[density]
    points = data.sample(20_000, seed)
    validation = data.sample(held_out, seed, "validation")
    test = data.sample(held_out, seed, "test")
    imle = PointIMLE(steps=steps, candidates=CANDIDATES)
    at = sorted({round(steps * 2**-i) for i in range(8)})
    curve = []
    for step, _ in imle.training(points, seed, place.device):
        if step in at:
            samples = imle.sample(5 * held_out, seed)
            sigma = choose_sigma(real=validation, fake=samples, sigmas=WIDTHS)
            found = parzen_log_likelihood(real=test, fake=samples, sigma=sigma)
            objective = float(nearest(test, samples)[1].mean())
            curve.append(
                {
                    "step": step,
                    "objective": objective,
                    "likelihood": float(found.mean()),
                    "sigma": sigma,
                }
            )
    return {"curve": curve, "truth": float(data.log_density(test).mean())}


def concordance(curve: Sequence[dict[str, float]]) -> float:
    """Of all pairs of measurements, the share in which a lower objective has a higher likelihood.

    1 if the likelihood rises whenever the objective falls; 1/2 if they have nothing to do with each
    other (Kendall's τ is twice that, less one).
    """
    pairs = [*itertools.combinations(curve, 2)]
    agree = [
        (a["objective"] < b["objective"]) == (a["likelihood"] > b["likelihood"]) for a, b in pairs
    ]
    return sum(agree) / len(agree)


def images_row(
    place: Place, *, recipe: str, model: str, seed: int, samples: int, validation: int
) -> Row:
    """The Parzen log-likelihood of a recipe's test images under a model's samples.

    Of "floor" samples are training images, but for those that the width is chosen by: as many, or
    all that there are.
    """
    train, test = images_of(place, load_recipe(recipe))
    order = permutation(seed, "likelihood's validation", 0, len(train))
    if model == "floor":
        made = train.images[order[validation : validation + samples]]
    else:
        made = trained(place, recipe, model, seed).sample(samples, SAMPLE_SEED)
    some = train.images[order[:validation]]
    fake, real, held_out = (to_float(images).flatten(1) for images in (made, test.images, some))
    sigma = choose_sigma(real=held_out, fake=fake, sigmas=WIDTHS)
    mean, error = mean_and_error(parzen_log_likelihood(real=real, fake=fake, sigma=sigma))
    return {"likelihood": mean, "error": error, "sigma": sigma, "test_images": len(real)}


def codes_rows(place: Place, *, recipe: str, seed: int, samples: int, validation: int) -> list[Row]:
    """`images_row` of the mixture and of GLANN, whose stage one is trained by one run, not two."""
    how: dict[str, Any] = {"recipe": recipe, "seed": seed, "samples": samples}
    return [
        {"model": model, **images_row(place, model=model, validation=validation, **how)}
        for model in ("mixture", "glann")
    ]


def section(settings: LikelihoodSettings, rows: Sequence[Row], folder: Path) -> Section:
    """Curves of known densities, and the table of the images."""
    known = [row for row in rows if "curve" in row]
    scored = [row for row in rows if "likelihood" in row]
    findings = []
    if known:
        ends = [(row["curve"][0], row["curve"][-1]) for row in known]
        findings.append(
            "From the first to the last measurement the held-out log-likelihood rose in "
            f"{sum(last['likelihood'] > first['likelihood'] for first, last in ends)} of "
            f"{len(known)} runs on data of known density, while the objective fell in "
            f"{sum(last['objective'] < first['objective'] for first, last in ends)}; of two "
            "measurements of a run, the one with the lower objective has the higher likelihood in "
            f"{statistics.fmean(concordance(row['curve']) for row in known):.0%}."
        )
    tables, charts, paragraphs = [], [], []
    lines = []
    for density in settings.densities:
        own = [row for row in known if row["density"] == density]
        if not own:
            continue
        last = [row["curve"][-1] for row in own]
        lines.append(
            [
                density,
                spread([point["likelihood"] for point in last], 2),
                spread([row["truth"] for row in own], 2),
                spread([point["objective"] for point in last], 5),
                spread([100 * concordance(row["curve"]) for row in own], 0) + "%",
            ]
        )
        falls, rises = (
            Curve(name, [[(p["step"], p[key]) for p in row["curve"]] for row in own])
            for name, key in (("objective", "objective"), ("log-likelihood", "likelihood"))
        )
        caption = "Left axis, dashed: IMLE's objective. Right axis: log-likelihood in nats."
        svg = two_curves(falls, rises, f"likelihood-{density}", "steps")
        charts.append(Chart(density, svg, caption))
    of_densities = [row for row in rows if "density" in row]
    if of_densities:
        head = ["density", "log-likelihood at the end", "of the true density", "objective", "agree"]
        note = (
            "In nats, means over seeds ± standard deviation. Agree: the share of pairs of a run's "
            "measurements in which the lower objective has the higher likelihood; 50% is chance."
        ) + failures(of_densities, lambda row: str(row["density"]))
        tables.append(Table(head, lines, note))
    of_images = [row for row in rows if "density" not in row]
    if of_images:
        lines = []
        for model in settings.models:
            own = [row for row in scored if row["model"] == model]
            if own:
                best = own[0]
                findings.append(
                    f"Test images of {settings.recipe} under the samples of {LABELS[model]}: "
                    f"{spread([row['likelihood'] for row in own], 0)} nats."
                )
                lines.append([
                    LABELS[model], f"{best['likelihood']:.0f} ± {best['error']:.0f}",
                    spread([row["likelihood"] for row in own], 0), f"{best['sigma']:g}",
                ])  # fmt: skip
        of_mnist = str(settings.recipe).startswith("mnist")  # as the published ones are
        published = PUBLISHED if of_mnist else {}
        lines += [[f"{name}, published", text, "–", "–"] for name, text in published.items()]
        head = ["model", "first seed ± standard error", "over seeds", "width"]
        note = (
            f"Mean log-likelihood of test images of {settings.recipe} in nats, pixels in [0, 1], "
            f"Gaussian kernels on {settings.samples:,} samples, width chosen on "
            f"{settings.validation:,} training images."
        )
        if published:
            note += " Published figures are their papers', for MNIST."
        # The run of two models fails as one: GLANN's training did.
        note += failures(of_images, lambda row: name_of({"model": "glann"} | row))
        tables.append(Table(head, lines, note, [LABELS["glann"]]))
        paragraphs.append(AGAINST)
    return Section(" ".join(findings), paragraphs, tables, charts)


STUDY = Study(
    "likelihood",
    "IMLE maximises likelihood under conditions, without computing one.",
    LikelihoodSettings,
    runs,
    section,
)
