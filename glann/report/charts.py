"""Charts of a comparison as inline SVG that takes the page's text colour, font and width.

Drawn by matplotlib at one point for a CSS pixel, in a width that a phone shows as it is.
"""

import contextlib
import html
import io
import itertools
import math
import re
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter

from glann.report.summary import GLANN, RATIO, REFERENCE, Format, Summary, contestants

ACCENT = "#d35400"
COLOURS = (
    ACCENT, "#2f7ebc", "#1f8a4c", "#b0489b", "#8a7400", "#00858a", "#7d68c0", "#c7456a",
    "#a0622d", "#5f7d1e", "#6f7a86", "#a33ecb",
)  # fmt: skip
"""GLANN's first.  Each has a contrast of 3 to white and to the dark page; as no twelve are told
apart by everybody, models differ in marker and dashes too."""
_MARKERS = "osD^vP<>XphH"
_DASHES = ("-", "--", "-.", (0, (1, 1.2)))

INK = "#010203"
"""Stands for the page's own text colour."""
_WIDTH = 344
NAME_STEP = 14.0
"""Points between two names at the right of a chart, at the least."""
_RC = {
    "font.size": 11.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "glann",
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
}


@contextlib.contextmanager
def page_style() -> Iterator[None]:
    """Matplotlib's own defaults, whatever the user's are, and ours."""
    with warnings.catch_warnings(), matplotlib.style.context(["default", _RC]):
        # A letter that matplotlib's font lacks is measured wrong, and drawn by the browser's.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


@dataclass(frozen=True)
class Look:
    """How one model is drawn in all charts."""

    colour: str
    marker: str
    dashes: Any


def looks(models: Iterable[Summary], order: Iterable[str]) -> dict[str, Look]:
    """A look for each model; `order`, of names, keeps them as they are when scores change."""
    groups = {summary.model: summary.group for summary in models}
    names = list(dict.fromkeys(order))
    first = [name for name in names if groups[name] == GLANN]
    others = [name for name in names if groups[name] not in (GLANN, REFERENCE)]
    found = {name: Look(INK, "*", "-") for name, group in groups.items() if group == REFERENCE}
    for i, name in enumerate(first):
        found[name] = Look(ACCENT, _MARKERS[0], _DASHES[i % len(_DASHES)])
    for i, name in enumerate(others, start=1):
        look = 1 + (i - 1) % (len(COLOURS) - 1)
        found[name] = Look(COLOURS[look], _MARKERS[look], _DASHES[i % len(_DASHES)])
    return found


@page_style()
def ratio_bars(summaries: Sequence[Summary], look: dict[str, Look]) -> str:
    """Bars of FID ÷ floor, one above the other, with whiskers of a standard deviation."""
    shown = Format(summaries)
    scores = [summary.mean[RATIO.key] for summary in summaries if RATIO.key in summary.mean]
    if not scores:
        return ""
    log = min(scores) > 0 and max(scores) > 20 * min(scores)
    # On a log scale bars start at the floor: where else they did would be arbitrary.
    start = 1.0 if log else 0.0
    line = 32.0
    fig, axes = page_figure(30 + line * len(summaries), bottom=26, left=6, top=4, right=6)
    if log:
        axes.set_xscale("log", nonpositive="clip")
    ends = [
        summary.mean[RATIO.key] + (summary.spread[RATIO.key] or 0)
        for summary in summaries
        if RATIO.key in summary.mean
    ]
    low, high = min([start, *scores]), max([1.5, *ends])
    # A quarter of the width is left for the numbers at the bars' ends.
    axes.set_xlim(low, high * (high / low) ** 0.36 if log else high * 1.36)
    axes.set_ylim(len(summaries) - 0.5, -0.5)
    axes.axvline(1, color=INK, lw=1, alpha=0.6, ls=(0, (3, 2)))
    for y, summary in enumerate(summaries):
        contestant = summary.group != REFERENCE
        axes.annotate(
            _short(summary.label, 44),
            (0, y - 0.14),
            (4, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            weight="bold" if summary.group == GLANN else "normal",
            style="normal" if contestant else "italic",
        )
        mean, end = summary.mean.get(RATIO.key), start
        if mean is not None:
            colour, alpha = look[summary.model].colour, 1 if contestant else 0.4
            axes.barh(y + 0.26, mean - start, 0.28, left=start, color=colour, alpha=alpha, lw=0)
            spread = summary.spread[RATIO.key] or 0
            end = max(mean + spread, start)
            if spread:
                axes.plot([max(mean - spread, low), end], [y + 0.26] * 2, color=INK, lw=1.4)
                axes.plot([end] * 2, [y + 0.16, y + 0.36], color=INK, lw=1.4)
        text = shown.both(RATIO, summary) or ("no score" if summary.rows else "failed")
        axes.annotate(text, (end, y + 0.26), (5, 0), textcoords="offset points", va="center")
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    plain_ticks(axes.xaxis, log)
    listed = ", ".join(
        f"{s.label} {shown.both(RATIO, s)}" for s in summaries if RATIO.key in s.mean
    )
    return page_svg(fig, "bars", f"Bars of FID ÷ floor{' on a log scale' * log}: {listed}.")


@page_style()
def precision_recall_scatter(summaries: Sequence[Summary], look: dict[str, Look]) -> str:
    """Precision against recall, with the spread of each as a thin cross."""
    points = [s for s in summaries if "precision" in s.mean and "recall" in s.mean]
    if not points:
        return ""
    fig, axes = page_figure(290, bottom=42, left=58, top=8, right=18)
    for summary in points:
        x, y = summary.mean["recall"], summary.mean["precision"]
        style = look[summary.model]
        hollow = summary.group == REFERENCE
        axes.errorbar(
            x, y, xerr=summary.spread["recall"], yerr=summary.spread["precision"],
            color=style.colour, fmt=style.marker, ms=9 if hollow else 7, elinewidth=0.9,
            mfc="none" if hollow else style.colour, mew=1.1 if hollow else 0,
        )  # fmt: skip
    axes.margins(0.14)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.grid(color=INK, alpha=0.12, lw=0.8)
    axes.locator_params(nbins=5)
    names = [_short(summary.model) for summary in points]
    bold = [summary.group == GLANN for summary in points]
    place = [(s.mean["recall"], s.mean["precision"]) for s in points]
    _label_points(axes, place, names, bold)
    listed = ", ".join(
        f"{s.label} {s.mean['precision']:.3f} and {s.mean['recall']:.3f}" for s in points
    )
    return page_svg(fig, "scatter", f"Precision against recall: {listed}.")


@page_style()
def fid_over_time(summaries: Sequence[Summary], look: dict[str, Look]) -> str:
    """FID against training time, a line for each seed, named at its right."""
    curves = [
        (summary, [c for row in summary.rows + summary.failed if (c := _curve(row))])
        for summary in contestants(summaries)
    ]
    curves = [(summary, lines) for summary, lines in curves if lines]
    if not curves:
        return ""
    longest = max(seconds for _, lines in curves for line in lines for seconds, _ in line) or 1.0
    unit, divisor = next(
        (name, size)
        for name, size in (("hours", 3600), ("minutes", 60), ("seconds", 1))
        if longest >= 3 * size or size == 1
    )
    height = max(250, 60 + NAME_STEP * len(curves))
    names = [_short(summary.model) for summary, _ in curves]
    right = 22 + 7 * max(map(len, names))
    fig, axes = page_figure(height, bottom=42, left=44, top=8, right=right)
    axes.set_yscale("log")
    ends = []
    for summary, lines in curves:
        style, bold = look[summary.model], summary.group == GLANN
        for line in lines:
            axes.plot(
                [seconds / divisor for seconds, _ in line], [fid for _, fid in line],
                color=style.colour, ls=style.dashes, lw=2.2 if bold else 1.3,
                marker=style.marker, markevery=[-1], ms=5.5, mew=0, zorder=3 if bold else 2,
            )  # fmt: skip
        last = max(lines, key=lambda line: line[-1][0])[-1]
        ends.append((last[0] / divisor, last[1]))
    axes.set_xlim(0, longest / divisor * 1.02)
    axes.set_xlabel(f"training time, {unit}")
    axes.set_ylabel("FID", labelpad=2)
    axes.grid(color=INK, alpha=0.12, lw=0.8)
    plain_ticks(axes.yaxis, True)
    name_ends(
        axes, ends, names, [look[summary.model].colour for summary, _ in curves],
        [summary.group == GLANN for summary, _ in curves],
    )  # fmt: skip
    listed = ", ".join(
        f"{summary.label} {statistics.fmean(line[-1][1] for line in lines):.3g}"
        for summary, lines in curves
    )
    return page_svg(
        fig, "time", f"FID against training time, on a log scale. At the end: {listed}."
    )


def name_ends(
    axes: Axes,
    ends: Sequence[tuple[float, float]],
    names: Sequence[str],
    colours: Sequence[str],
    bold: Sequence[bool],
) -> None:
    """Write the names of curves at their right, each joined to its curve's end by a thin line."""
    axes.autoscale_view()
    box = axes.get_window_extent()
    heights = [axes.transData.transform(end)[1] for end in ends]
    for i, y in _spread_out(heights, NAME_STEP, box.y0, box.y1).items():
        x, end = box.x1 + 14, axes.transData.transform(ends[i])
        axes.plot(
            [end[0], x - 3], [end[1], y], transform=None, clip_on=False, color=colours[i], lw=0.8,
            alpha=0.7,
        )  # fmt: skip
        axes.text(
            x, y, names[i], transform=None, va="center_baseline",
            weight="bold" if bold[i] else "normal",
        )  # fmt: skip


def _curve(row: dict[str, Any]) -> list[tuple[float, float]]:
    points = [(point.get("seconds"), point.get("fid")) for point in row.get("curve") or []]
    return [
        (float(x), float(y))
        for x, y in points
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y) and y > 0
    ]


def page_figure(
    height: float, *, bottom: float, left: float, top: float, right: float
) -> tuple[Figure, Axes]:
    """A figure with margins in points."""
    fig = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
    FigureCanvasAgg(fig)  # measures texts
    axes = fig.add_axes(
        (
            left / _WIDTH,
            bottom / height,
            1 - (left + right) / _WIDTH,
            1 - (bottom + top) / height,
        )
    )
    return fig, axes


def _short(text: str, letters: int = 16) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def plain_ticks(axis: Axis, log: bool) -> None:
    """Ticks at few round numbers, written in full."""
    if log:
        low, high = sorted(axis.get_view_interval())
        subs = (1, 2, 5) if high < 60 * low else (1, 3) if high < 1000 * low else (1,)
        locator: Locator = LogLocator(subs=subs)
        if sum(low <= tick <= high for tick in locator.tick_values(low, high)) < 2:
            locator = MaxNLocator(6)  # by one number nothing can be read
        axis.set_major_locator(locator)
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))


def _spread_out(heights: Sequence[float], step: float, low: float, high: float) -> dict[int, float]:
    """Heights moved apart to `step` or more, in their order, between `low` and `high`."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(heights[i], low, placed[-1] + step if placed else low))
    for k in reversed(range(len(placed))):
        above = placed[k + 1] - step if k + 1 < len(placed) else high
        placed[k] = min(placed[k], above)
    return dict(zip(order, placed, strict=True))


def _label_points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    bold: Sequence[bool],
) -> None:
    """Write a name beside each point, where it covers least of the other names and points."""
    axes.autoscale_view()
    edges = axes.get_window_extent().extents
    inside: _Box = (edges[0], edges[1], edges[2], edges[3])
    pixels = axes.transData.transform(points)
    taken = [_box(x, y, 12, 12) for x, y in pixels]
    for (x, y), point, name, heavy in zip(pixels, points, names, bold, strict=True):
        text = axes.annotate(
            name, point, textcoords="offset points", xytext=(0, 0), ha="center", va="center",
            weight="bold" if heavy else "normal",
        )  # fmt: skip
        width, height = text.get_window_extent().size
        places = []
        for reach, turn in itertools.product((5, 13, 24, 38, 54), range(16)):
            dx = math.cos(math.pi * turn / 8) * (reach + width / 2)
            dy = math.sin(math.pi * turn / 8) * (reach + height / 2)
            box = _box(x + dx, y + dy, width, height)
            covered = sum(_overlap(box, other) for other in taken)
            outside = width * height - _overlap(box, inside)
            # Rounded, so that equal places are so on every machine, and the first is taken.
            places.append((round(covered + outside + 0.6 * reach, 6), reach, turn, dx, dy, box))
        _, reach, _, dx, dy, box = min(places)
        text.set_position((dx, dy))
        taken.append(box)
        if reach > 13:  # else it is plain whose name it is
            nearest = [
                min(max(0.0, d - size / 2), d + size / 2) for d, size in ((dx, width), (dy, height))
            ]
            axes.annotate(
                "", point, xytext=(nearest[0], nearest[1]), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "lw": 0.6, "color": INK, "alpha": 0.5},
            )  # fmt: skip


_Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


def _box(x: float, y: float, width: float, height: float) -> _Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: _Box, b: _Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def page_svg(fig: Figure, name: str, alt: str) -> str:
    """The figure as an `<svg>` for a page: the page's font and colour, its own ids."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    fig.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = own_ids(text, name)  # of all figures they are alike
    text = text.replace(INK, "currentColor")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    # It would hold for the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    open_tag, _, rest = text.partition(">")
    box = re.search(r'viewBox="([^"]+)"', open_tag)
    assert box is not None
    return (
        f'<svg class="chart" viewBox="{box[1]}" role="img" aria-label="{html.escape(alt)}">{rest}'
    )


def own_ids(svg: str, name: str) -> str:
    """The same, its ids beginning with `name`: a page may hold each one once."""
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
