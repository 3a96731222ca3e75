"""A chart of two quantities over training, each with its own axis."""

from collections.abc import Sequence
from dataclasses import dataclass

from glann.report.charts import ACCENT, COLOURS, INK, page_figure, page_style, page_svg, plain_ticks


@dataclass(frozen=True)
class Curve:
    """A quantity over training: points (x, y) for each run."""

    name: str
    runs: Sequence[Sequence[tuple[float, float]]]


@page_style()
def two_curves(left: Curve, right: Curve, name: str, x: str) -> str:
    """`left`, above 0, dashed on a log scale at the left; `right` at the right; x on a log scale.

    Args:
        left: what falls.
        right: what rises.
        name: of the chart, for the page.
        x: what the horizontal axis shows.
    """
    fig, axes = page_figure(250, bottom=42, left=74, top=8, right=58)
    other = axes.twinx()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for at, curve, colour, dashes in ((axes, left, COLOURS[1], "--"), (other, right, ACCENT, "-")):
        for run in curve.runs:
            at.plot(*zip(*run, strict=True), color=colour, lw=1.6, ls=dashes, marker="o", ms=3)
        at.set_ylabel(curve.name, color=colour)
    other.spines["right"].set_visible(True)
    axes.set_xlabel(x)
    axes.grid(color=INK, alpha=0.12, lw=0.8)
    plain_ticks(axes.xaxis, True)
    plain_ticks(axes.yaxis, True)
    ends = ", ".join(
        f"{curve.name} from {curve.runs[0][0][1]:.3g} to {curve.runs[0][-1][1]:.3g}"
        for curve in (left, right)
    )
    return page_svg(fig, name, f"Over training, in the first run: {ends}.")
