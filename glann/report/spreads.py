"""Charts of studies: bundles of curves, and scores of many runs, on log scales."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from glann.report.charts import (
    ACCENT,
    COLOURS,
    INK,
    NAME_STEP,
    name_ends,
    page_figure,
    page_style,
    page_svg,
    plain_ticks,
)

DASHES = ("-", "--", "-.", (0, (1, 1.2)))


@dataclass(frozen=True)
class Bundle:
    """Curves of one kind: points (x, y), both above 0, with the same x in all curves."""

    name: str
    curves: Sequence[Sequence[tuple[float, float]]]
    ours: bool = False

    def mean(self) -> list[tuple[float, float]]:
        """The geometric mean of the curves."""
        return [
            (points[0][0], math.exp(math.fsum(math.log(y) for _, y in points) / len(points)))
            for points in zip(*self.curves, strict=True)
        ]


@page_style()
def bundles(shown: Sequence[Bundle], name: str, x: str, y: str) -> str:
    """Each bundle's geometric mean as a thick line, named at its right, over its thin curves.

    Args:
        shown: the bundles.
        name: of the chart, for the page.
        x: what the horizontal axis shows, with its unit.
        y: what the vertical axis shows.
    """
    right = 22 + 7 * max(len(bundle.name) for bundle in shown)
    fig, axes = page_figure(
        max(280, 60 + NAME_STEP * len(shown)), bottom=42, left=64, top=8, right=right
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    others = iter(COLOURS[1:] * len(shown))
    colours = [ACCENT if bundle.ours else next(others) for bundle in shown]
    ends = []
    for i, (bundle, colour) in enumerate(zip(shown, colours, strict=True)):
        for curve in bundle.curves:
            axes.plot(*zip(*curve, strict=True), color=colour, lw=0.6, alpha=0.35)
        mean = bundle.mean()
        dashes = DASHES[i % len(DASHES)]
        axes.plot(*zip(*mean, strict=True), color=colour, lw=2, ls=dashes, zorder=3)
        ends.append(mean[-1])
    axes.set_xlabel(x)
    axes.set_ylabel(y, labelpad=2)
    axes.grid(color=INK, alpha=0.12, lw=0.8)
    plain_ticks(axes.xaxis, True)
    plain_ticks(axes.yaxis, True)
    name_ends(axes, ends, [b.name for b in shown], colours, [b.ours for b in shown])
    listed = ", ".join(
        f"{bundle.name} from {bundle.mean()[0][1]:.2g} to {bundle.mean()[-1][1]:.2g}"
        for bundle in shown
    )
    return page_svg(fig, name, f"{y} against {x}, both on log scales: {listed}.")


@dataclass(frozen=True)
class Strip:
    """The scores of one kind of runs, each above 0; infinite ones are shown at the right edge."""

    name: str
    scores: Sequence[float]
    median: float
    ours: bool = False


@page_style()
def strips(shown: Sequence[Strip], name: str, x: str, bound: float) -> str:
    """A dot for each run on a log scale, one line for each kind; a bar marks the median.

    Args:
        shown: the strips, from the top.
        name: of the chart, for the page.
        x: what the axis shows.
        bound: where a dashed line stands.
    """
    fig, axes = page_figure(42 + 34 * len(shown), bottom=42, left=6, top=4, right=10)
    axes.set_xscale("log")
    finite = [score for strip in shown for score in strip.scores if math.isfinite(score)]
    low, high = min([1.0, *finite]), max([bound, *finite]) * 1.4
    axes.set_xlim(low / 1.1, high * 1.15)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.axvline(bound, color=INK, lw=1, alpha=0.6, ls=(0, (3, 2)))
    others = iter(COLOURS[1:] * len(shown))
    for i, strip in enumerate(shown):
        colour = ACCENT if strip.ours else next(others)
        weight = "bold" if strip.ours else "normal"
        axes.annotate(
            strip.name, (0, i - 0.2), (4, 0), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", va="center", weight=weight,
        )  # fmt: skip
        inside = [score for score in strip.scores if math.isfinite(score)]
        outside = len(strip.scores) - len(inside)
        axes.plot(inside, [i + 0.2] * len(inside), "o", color=colour, alpha=0.55, ms=6, mew=0)
        axes.plot([high] * outside, [i + 0.2] * outside, "x", color=colour, ms=6)
        if math.isfinite(strip.median):
            axes.plot([strip.median] * 2, [i + 0.02, i + 0.38], color=INK, lw=2)
    axes.set_xlabel(x)
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    plain_ticks(axes.xaxis, True)
    listed = ", ".join(f"{strip.name} {strip.median:.3g}" for strip in shown)
    return page_svg(fig, name, f"{x} of each run, on a log scale. Medians: {listed}.")
