"""Vanishing gradients: what is left of a generator's gradient while its discriminator gets better.

Arjovsky & Bottou 2017 (arXiv 1701.04862), section 2 and figures 2 and 3: freeze a generator at
several stages of its training, train a fresh discriminator on its samples, and see what becomes of
‖∇_θ L_G‖.  GLO and IMLE have no discriminator: their gradient follows from the error that is left,
so it is measured beside this error, over their own training; and for IMLE, whose inner problem is
the search for the nearest candidate, while a frozen mapper's candidates get more.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glann.baselines import MODELS
from glann.baselines.gan import GAN
from glann.comparison import LABELS
from glann.data import load
from glann.devices import pick_device
from glann.recipes import load_recipe
from glann.report.spreads import Bundle, bundles
from glann.report.studies import Chart, Section, Table
from glann.settings import setting
from glann.studies.norms import SMALLEST, Point, against_discriminator, falls, of_glo, of_imle
from glann.studies.study import Place, Row, Run, Study, failures

GANS = tuple(
    name
    for name, (kind, published) in MODELS.items()
    # BEGAN's k holds its discriminator back whenever it is ahead: it is never trained to an end.
    if kind is GAN and published["loss"] != "boundary-equilibrium"
)

POOLS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0)
"""Candidates per code among which the codes of a frozen mapper are matched."""


@dataclass(kw_only=True)
class Gradients:
    """What is frozen, when, and which discriminators are trained on it."""

    recipe: str = setting("digits", "whose images, networks and lengths are taken")
    generator: str = setting("ns-gan", "whose generator is frozen, for all losses", choices=GANS)
    models: list[str] = setting(list(GANS), "whose losses are compared", choices=GANS)
    shares: list[float] = setting(
        [0.01, 0.1, 0.25], "of its training, after which it is frozen", minimum=1e-6, maximum=1
    )
    steps: int = setting(2000, "of each fresh discriminator", minimum=1)
    norm: str = setting(
        "none",
        "of discriminators that are published with BatchNorm, which makes a score depend on the "
        "whole batch; batch: as they are published",
        choices=("none", "batch"),
    )
    seeds: int = setting(3, "runs of everything", minimum=1)


def runs(settings: Gradients) -> list[Run]:
    """One for each frozen generator, and one for each training of GLO and IMLE."""
    found = []
    for seed in range(settings.seeds):
        glann = {"recipe": settings.recipe, "shares": settings.shares, "seed": seed}
        found.append(Run(f"glann-{seed}", own_training, glann))
        for share in settings.shares:
            frozen = {
                "recipe": settings.recipe,
                "generator": settings.generator,
                "models": settings.models,
                "share": share,
                "steps": settings.steps,
                "norm": settings.norm,
                "seed": seed,
            }
            found.append(Run(f"frozen-{share:g}-{seed}", discriminators, frozen))
    return found


def discriminators(
    place: Place,
    *,
    recipe: str,
    generator: str,
    models: Sequence[str],
    share: float,
    steps: int,
    norm: str,
    seed: int,
) -> Row:
    """Freeze a generator after `share` of its training; train each loss's discriminator on it."""
    found = load_recipe(recipe)
    images = load(found.data, place.data).images
    gan = _gan(found.baselines[generator])
    # The learning rate is constant: a shorter training is the beginning of the whole one.
    gan.images_seen, gan.ema = max(1, round(share * gan.images_seen)), 0.0
    frozen = gan.fit(images, seed=seed, device=place.device).generator_
    curves = {}
    for model in models:
        teacher = _gan(found.baselines[model])
        if teacher.norm == "batch":
            teacher.norm = norm
        curves[model] = against_discriminator(
            teacher, frozen, images, steps_to_measure(steps), seed, pick_device(place.device)
        )
    return {"curves": curves}


def _gan(baseline: object) -> GAN:
    assert isinstance(baseline, GAN)
    return copy.copy(baseline)


def own_training(place: Place, *, recipe: str, shares: Sequence[float], seed: int) -> Row:
    """GLO's and IMLE's gradients and errors after the same shares of their trainings, and all.

    Learning rates are held constant, so that the stages are those of one training, as the GAN's.
    """
    found = load_recipe(recipe)
    images = load(found.data, place.data).images
    device = pick_device(place.device)
    glo, imle = copy.copy(found.glo), copy.copy(found.imle)
    glo.schedule = imle.schedule = "constant"
    if glo.loss == "contrastive":
        glo.loss = "scattering"  # features depend on a training's length, and so would the errors
    imle.refine = 0  # what gets better is the pool alone
    stages: dict[str, list[Point]] = {"glo": [], "imle": []}
    for epochs in _epochs(found.glo.epochs, shares):
        glo.epochs = epochs
        glo.fit(images, seed=seed, device=place.device)
        stages["glo"].append({"epochs": epochs, **of_glo(glo, images, seed, device)})
    matched = []
    for epochs in _epochs(found.imle.epochs, shares):
        imle.epochs = epochs
        imle.fit(glo.codes_, seed=seed, device=place.device)
        point = of_imle(imle, glo.codes_, found.imle.pool, seed, device)
        stages["imle"].append({"epochs": epochs, **point})
        matched.append(
            [{"pool": pool, **of_imle(imle, glo.codes_, pool, seed, device)} for pool in POOLS]
        )
    return {**stages, "matched": matched}


def _epochs(whole: float, shares: Sequence[float]) -> list[int]:
    return sorted({max(1, round(share * whole)) for share in (*shares, 1.0)})


def steps_to_measure(steps: int) -> list[int]:
    """1, 2, 5, 10, 20, … up to `steps`, and `steps`."""
    decades = range(len(str(steps)))
    round_numbers = [lead * 10**decade for decade in decades for lead in (1, 2, 5)]
    return [step for step in round_numbers if step < steps] + [steps]


def findings(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By what factors norms fell: of each GAN loss, and of GLO and IMLE with their errors.

    "glo" and "imle" are over their own training, "imle-matched" is a frozen mapper with ever more
    candidates; "loss_fell" is by what factor the error fell, and "relative_fell" the norm divided
    by the error.
    """
    found: dict[str, dict[str, float]] = {}
    gans = [row["curves"] for row in rows if "curves" in row]
    for model in dict.fromkeys(model for curves in gans for model in curves):
        found[model] = falls([curves[model] for curves in gans])
    own = [row for row in rows if "glo" in row]
    bundles = {name: [row[name] for row in own] for name in ("glo", "imle")}
    bundles["imle-matched"] = [curve for row in own for curve in row["matched"]]
    for name, curves in bundles.items():
        if curves:
            relative = [
                [{"norm": point["norm"] / point["loss"]} for point in curve] for curve in curves
            ]
            found[name] = falls(curves) | {
                "loss_fell": falls(curves, "loss")["fell"],
                "relative_fell": falls(relative)["fell"],
            }
    return found


def section(settings: Gradients, rows: Sequence[Row], folder: Path) -> Section:
    """Curves of norms, and the factors by which they fell."""
    found = findings(rows)
    gans = {name: numbers for name, numbers in found.items() if name in GANS}
    own = {name: numbers for name, numbers in found.items() if name not in GANS}
    of_gans = [row for row in rows if "share" in row]
    of_own = [row for row in rows if "shares" in row]
    return Section(
        finding=_finding(gans, own),
        paragraphs=[_MEANING],
        tables=[
            Table(
                ["loss", "norm, first to last", "norm, highest to last"],
                [
                    [LABELS[name], _spread(n, "fell"), _spread(n, "fell_from_peak")]
                    for name, n in gans.items()
                ],
                "Norm of a frozen generator's gradient while a fresh discriminator takes "
                f"{settings.steps:,} steps: the factor by which it fell (÷) or rose (×), geometric "
                "mean over stages and seeds (×/÷ standard deviation)."
                + failures(of_gans, lambda row: f"frozen at {100 * row['share']:g}%"),
            ),
            Table(
                ["without a discriminator", "norm", "error", "norm ÷ error"],
                [
                    [
                        _OWN[name],
                        _spread(n, "fell"),
                        _change(n["loss_fell"]),
                        _change(n["relative_fell"]),
                    ]
                    for name, n in own.items()
                ],
                "First to last, in the same way. The error is the loss that is minimised. × in the "
                "last column: for the error that is left the gradient is larger than it was. ÷: "
                "it comes near a minimum, with an error that the network can't take away."
                + failures(of_own, lambda row: "GLO and IMLE"),
                ours=set(_OWN.values()),
            ),
        ],
        charts=_charts(rows),
    )


_MEANING = (
    "One generator for all losses, frozen at each stage; against it a discriminator that starts "
    "anew. Both are in training mode, gradients are of the mean loss over the same batches of "
    "noise. A loss has its own unit: only the shape of a line compares with another's, not its "
    "height. The generator's error doesn't change along a line: what the norm loses there, it "
    "loses by the discriminator's getting better. For IMLE what gets better is the search: the "
    "mapper stands still and each code is matched among more candidates. Adam divides gradients by "
    "their size, so a small one is not yet a slow training; one that is lost in rounding or noise "
    "is."
)

_OWN = {
    "glo": "GLO, over its training",
    "imle": "IMLE, over its training",
    "imle-matched": "IMLE, frozen, more candidates",
}


def _change(fell: float) -> str:
    """÷ by what a number fell, or × by what it rose."""
    sign, factor = ("÷", fell) if fell >= 1 else ("×", 1 / fell)
    return f"{sign} {float(f'{factor:.3g}'):,g}"


def _spread(numbers: dict[str, float], name: str) -> str:
    return f"{_change(numbers[name])} (×/÷ {numbers[f'{name}_spread']:.2g})"


def _finding(gans: dict[str, dict[str, float]], own: dict[str, dict[str, float]]) -> str:
    parts = []
    if gans:
        most = max(gans, key=lambda name: gans[name]["fell_from_peak"])
        parts.append(
            "As its discriminator gets better, a frozen generator's gradient falls most with the "
            f"{LABELS[most]}: {_spread(gans[most], 'fell')} from the first measurement to the "
            f"last, {_spread(gans[most], 'fell_from_peak')} from its highest."
        )
        kept = [LABELS[name] for name, n in gans.items() if n["fell_from_peak"] < 2]
        if kept:
            parts.append(f"It keeps more than half of its highest with: {'; '.join(kept)}.")
    when = {
        "imle-matched": f"with {POOLS[-1] / POOLS[0]:,.0f} times as many candidates",
        "imle": "over its training",
        "glo": "over its training",
    }
    for name, what in when.items():
        if name in own:
            label, n = name.removesuffix("-matched").upper(), own[name]
            parts.append(
                f"{label}'s {what}: {_change(n['fell'])}, and its error {_change(n['loss_fell'])}."
            )
    return " ".join(parts)


def _charts(rows: Sequence[Row]) -> list[Chart]:
    charts = []
    gans = [row["curves"] for row in rows if "curves" in row]
    if gans:
        lines = [
            Bundle(name, [[_at_step(point) for point in curves[name]] for curves in gans])
            for name in gans[0]
        ]
        charts.append(
            Chart(
                "A frozen generator's gradient",
                bundles(
                    lines, "gradients-gan", "steps of the discriminator", "norm of the gradient"
                ),
                "A thin line for each stage and seed, a thick one for their geometric mean.",
            )
        )
    own = [row for row in rows if "glo" in row]
    if own:
        matched = [curve for row in own for curve in row["matched"]]
        charts.append(
            Chart(
                "IMLE's, matched better and better",
                bundles(
                    _beside_error("IMLE", matched, "pool"),
                    "gradients-matched",
                    "candidates per code",
                    "beside the first",
                ),
                "The mapper stands still. Gradient and error, each divided by its first value.",
            )
        )
        trained = [
            bundle
            for name in ("imle", "glo")
            for bundle in _beside_error(name.upper(), [row[name] for row in own], "epochs")
        ]
        charts.append(
            Chart(
                "Over their own training",
                bundles(trained, "gradients-own", "epochs", "beside the first"),
                "Gradient and error, each divided by its first value.",
            )
        )
    return charts


def _at_step(point: Point) -> tuple[float, float]:
    return point["step"], max(point["norm"], SMALLEST)


def _beside_error(name: str, curves: Sequence[Sequence[Point]], x: str) -> list[Bundle]:
    """The curves' norms and errors, relative to where they start."""
    return [
        Bundle(
            f"{name}, {what}",
            [[(point[x], point[key] / curve[0][key]) for point in curve] for curve in curves],
            ours=key == "norm",
        )
        for what, key in (("gradient", "norm"), ("error", "loss"))
    ]


STUDY = Study(
    name="gradients",
    claim="the gradient does not vanish while there is something to learn",
    settings=Gradients,
    runs=runs,
    section=section,
)
