"""Training instability: how well models do with settings that nobody has tuned.

Lucic et al. 2018 (arXiv 1711.10337) compare GANs over settings drawn at random from wide ranges.
Here the same is done to GLANN: as many settings from ranges as wide, the same images, generator,
seeds and share of a recipe's lengths.
"""

import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glann.baselines import MODELS
from glann.comparison import LABELS, SAMPLE_SEED, load_test, load_whole, make_protocol
from glann.data import load
from glann.density import Gaussian
from glann.errors import NotFinite
from glann.evaluation.scores import Protocol
from glann.images import to_float, to_uint8
from glann.recipes import Recipe, load_recipe
from glann.report.spreads import Strip, strips
from glann.report.studies import Chart, Section, Table
from glann.settings import setting
from glann.studies.draws import Settings, as_it_is, draw, drawn_recipe
from glann.studies.study import Place, Row, Run, Study
from glann.studies.trained import fitted


def score(recipe: Recipe, model: str, protocol: Protocol, device: str) -> Row:
    """Train a model and give its samples' FID and FID ÷ floor, or why it "failed".

    A training that came to numbers that are not finite is a result, any other error is raised.
    """
    try:
        pipeline = fitted(recipe, model, protocol.train.images, device=device)
    except NotFinite as error:
        return {"failed": str(error)}
    return ratio(pipeline.sample(protocol.n, SAMPLE_SEED), protocol)


def ratio(samples: torch.Tensor, protocol: Protocol) -> dict[str, float]:
    """FID and FID ÷ floor of uint8 samples."""
    fid = protocol.distance(samples)
    return {"fid": fid, "fid_over_floor": protocol.ratio(fid)}


def one_gaussian(images: torch.Tensor, n: int) -> torch.Tensor:
    """`n` samples of one Gaussian with the mean and covariance of the images' pixels, uint8.

    What anybody gets without training: the samples of a run that did not fail are nearer to the
    real images.
    """
    shape = images.shape[1:]
    pixels = Gaussian().fit(to_float(images).flatten(1)).sample(n, SAMPLE_SEED)
    return to_uint8(pixels.view(n, *shape))


SLOW = 1e-4
"""A learning rate below which training may not come far in the length that a run has."""


def summary(rows: Sequence[dict[str, Any]], bound: float) -> dict[str, float]:
    """The distribution of FID ÷ floor over one model's draws.

    Returns:
        "runs"; "failed", how many were not finite or above `bound`, and their "share"; "best",
        "lower" (a quarter of all runs is better), "median", "upper" and "worst", where a run that
        is not finite is worse than all others: infinite.
    """
    ratios = sorted(row.get("fid_over_floor", math.inf) for row in rows)
    failed = sum(value > bound for value in ratios)
    found = {"runs": len(ratios), "failed": failed, "share": failed / len(ratios)}
    places = {"best": 0.0, "lower": 0.25, "median": 0.5, "upper": 0.75, "worst": 1.0}
    return found | {name: _quantile(ratios, place) for name, place in places.items()}


def _quantile(ordered: Sequence[float], place: float) -> float:
    """Between two neighbours in proportion, as NumPy's, but with infinite ones allowed."""
    below, rest = divmod(place * (len(ordered) - 1), 1)
    low = ordered[int(below)]
    if rest == 0:
        return low
    high = ordered[int(below) + 1]
    return high if math.isinf(high) else low + rest * (high - low)  # ∞ − ∞ is no number


@dataclass(kw_only=True)
class Stability:
    """Which models, how many draws of each, and how long each is trained."""

    recipe: str = setting("digits", "whose images, networks and lengths are taken")
    models: list[str] = setting(
        ["glann", "ns-gan", "mm-gan", "wgan", "wgan-gp", "dragan", "r3gan", "vae"],
        "what is trained",
        choices=("glann", *MODELS),
    )
    draws: int = setting(12, "settings of each model", minimum=1)
    share: float = setting(0.5, "of the recipe's lengths", minimum=1e-6, maximum=1)
    samples: int = setting(10_000, "samples and real images in a score, at the most", minimum=50)
    bound: float = setting(
        0.0,
        "the FID ÷ floor above which a run failed; 0: that of one Gaussian on the images' pixels",
        minimum=0,
    )


def runs(settings: Stability) -> list[Run]:
    """One for each draw of each model, draw by draw; before them what runs are seen beside."""
    shared: dict[str, Any] = {"recipe": settings.recipe, "samples": settings.samples}
    found = [Run("one-gaussian", one_gaussian_row, dict(shared))]
    shared["share"] = settings.share
    for model in settings.models:
        found.append(Run(f"{model}-recipe", recipe_row, {**shared, "model": model}))
    for index in range(settings.draws):
        for model in settings.models:
            arguments = {**shared, "model": model, "index": index}
            found.append(Run(f"{model}-{index}", drawn_row, arguments))
    return found


def one_gaussian_row(place: Place, *, recipe: str, samples: int) -> Row:
    """The score of one Gaussian on the pixels, and the floor."""
    protocol = _protocol(recipe, samples, place.data, place.device)
    made = one_gaussian(protocol.train.images, protocol.n)
    return {
        "protocol": protocol.describe(),
        "floor": protocol.floor,
        **ratio(made, protocol),
    }


def drawn_row(
    place: Place, *, recipe: str, samples: int, share: float, model: str, index: int
) -> Row:
    """Draw settings, train and score."""
    seed = load_recipe(recipe).seed
    drawn = draw(model, index, seed)
    return {"drawn": drawn, **_trained(place, recipe, samples, share, model, drawn, seed + index)}


def recipe_row(place: Place, *, recipe: str, samples: int, share: float, model: str) -> Row:
    """Train with the recipe's settings, which for baselines are the published ones, and score."""
    seed = load_recipe(recipe).seed
    return _trained(place, recipe, samples, share, model, as_it_is(model), seed)


def _trained(
    place: Place,
    recipe: str,
    samples: int,
    share: float,
    model: str,
    settings: Settings,
    seed: int,
) -> Row:
    protocol = _protocol(recipe, samples, place.data, place.device)
    changed = drawn_recipe(load_recipe(recipe), model, settings, share, seed)
    began = time.process_time()
    found = score(changed, model, protocol, place.device)
    return {**found, "cpu_seconds": round(time.process_time() - began, 3)}


@functools.cache  # a process carries out many runs
def _protocol(recipe: str, samples: int, data: str | None, device: str) -> Protocol:
    section = load_recipe(recipe).data
    train, test = load(section, data), load_test(section, data)
    whole, quiet = load_whole(section, data), lambda text: None
    return make_protocol(train, test, whole, "auto", samples, device, False, None, quiet)


def section(settings: Stability, rows: Sequence[Row], folder: Path) -> Section:
    """The scores of all draws, and the share that failed."""
    gaussian = next(row for row in rows if row["key"] == "one-gaussian")
    bound = settings.bound or gaussian["fid_over_floor"]
    drawn = {
        model: [row for row in rows if row.get("model") == model and "index" in row]
        for model in settings.models
    }
    as_given = {
        row["model"]: row.get("fid_over_floor", math.inf)
        for row in rows
        if "model" in row and "index" not in row
    }
    found = {model: summary(these, bound) for model, these in drawn.items()}
    ranked = sorted(found, key=lambda model: (found[model]["share"], found[model]["median"]))
    strips_shown = [
        Strip(
            LABELS[model],
            [row.get("fid_over_floor", math.inf) for row in drawn[model]],
            found[model]["median"],
            ours=model == "glann",
        )
        for model in ranked
    ]
    what = "a bound that was set" if settings.bound else "that of one Gaussian on the pixels"
    return Section(
        finding=(
            f"With settings at random {_failures(ranked[0], found)} is best, "
            f"{_failures(ranked[-1], found)} worst. {_of_glann(found)}"
        ),
        paragraphs=[
            f"A run failed if it was not finite or its FID ÷ floor above {bound:.3g}, {what}.",
            _few(settings.draws),
            _RANGES,
        ],
        tables=[
            Table(
                [
                    "model",
                    "failed",
                    "share",
                    "best",
                    "median",
                    "worst",
                    "as given",
                    "CPU seconds",
                    "failed, rate ≥ 10⁻⁴",
                ],
                [
                    [
                        LABELS[model],
                        f"{found[model]['failed']} of {found[model]['runs']}",
                        f"{found[model]['share']:.0%}",
                        *(f"{found[model][name]:.3g}" for name in ("best", "median", "worst")),
                        f"{as_given[model]:.3g}",
                        f"{statistics.median(row['cpu_seconds'] for row in drawn[model]):.1f}",
                        _at_a_pace(drawn[model], bound),
                    ]
                    for model in ranked
                ],
                "FID ÷ floor over all draws; a run that was not finite counts as infinite. As "
                "given: with the recipe's settings, for baselines the published ones, and the same "
                "length. CPU seconds are the median of a training with its score. The last column: "
                "of the draws whose learning rate (GLANN's: its generator's) is at least 10⁻⁴; at "
                "lower ones a run may fail by not having come far.",
                ours={LABELS["glann"]},
            )
        ],
        charts=[
            Chart(
                "FID ÷ floor of each run",
                strips(strips_shown, "stability", "FID ÷ floor", bound),
                "A dot for each run, a bar at the median, crosses for runs that were not finite. "
                "Those right of the dashed line failed.",
            )
        ],
    )


_RANGES = (
    "GANs have Lucic et al.'s ranges: learning rate 10^U[−5, −2], β1 U[0, 1], 1 or 5 steps of the "
    "discriminator, its BatchNorm on or off (where no penalty forbids it), clip 10^U[−3, 0], "
    "penalty 1/100 to 10 times the published weight. GLANN's three learning rates are drawn "
    "independently from the same three decades, its BatchNorm is on or off, its mapper has 1 to 4 "
    "layers of 64 to 512 units, and 1 to 10 candidates are drawn for each code; its β1 is no "
    "setting. A run at a low learning rate may fail by not having come far: the length is the "
    "same for all, and none is stopped early."
)


def _at_a_pace(rows: Sequence[Row], bound: float) -> str:
    """How many failed of the runs that were not slow."""
    fast = [row for row in rows if learning_rate(row) >= SLOW]
    return f"{summary(fast, bound)['failed']} of {len(fast)}" if fast else "–"


def learning_rate(row: Row) -> float:
    """The one that was drawn, of GLANN its generator's."""
    drawn: Settings = row["drawn"]
    return float(drawn["glo"]["generator_lr"] if "glo" in drawn else drawn[row["model"]]["lr"])


def _few(draws: int) -> str:
    error = 0.5 / math.sqrt(draws)
    return f"With {draws} draws of each model the standard error of a share is up to {error:.0%}."


def _failures(model: str, found: dict[str, dict[str, float]]) -> str:
    n = found[model]
    return (
        f"{LABELS[model]} ({n['failed']} of {n['runs']} runs, median FID ÷ floor {n['median']:.3g})"
    )


def _of_glann(found: dict[str, dict[str, float]]) -> str:
    if "glann" not in found or len(found) < 2:
        return ""
    glann = found["glann"]
    others = [n for model, n in found.items() if model != "glann"]
    failed, total = (sum(int(n[key]) for n in others) for key in ("failed", "runs"))
    return (
        f"GLANN fails in {glann['failed']} of {glann['runs']}, best {glann['best']:.3g}, worst "
        f"{glann['worst']:.3g}; the others together in {failed} of {total}."
    )


STUDY = Study(
    name="stability",
    claim="training is stable: it does well without finding the right settings first",
    settings=Stability,
    runs=runs,
    section=section,
    version=3,
)
