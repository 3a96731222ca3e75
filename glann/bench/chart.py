"""A picture of matching as the number of codes grows: its time and its memory."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from glann.errors import GlannError
from glann.report.charts import COLOURS
from glann.storage import write_atomically

SUFFIXES = (".png", ".svg")

_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def check_plot(path: Path, only: Sequence[str]) -> None:
    """Refuse what can't be drawn, before anything is measured."""
    if path.suffix not in SUFFIXES:
        raise GlannError(f"--plot {path}: wanted a name that ends in {' or '.join(SUFFIXES)}")
    if only and "growth" not in only:
        raise GlannError(f"--plot {path} shows 'growth', which --only leaves out; add it")


def plot_growth(found: dict[str, Any], path: Path) -> None:
    """Write the picture of the rows called "growth" of what `bench` found, as PNG or SVG.

    Raises:
        GlannError: there are none, as they could not be measured.
    """
    rows = [row for row in found["rows"] if row["name"] == "growth"]
    if not rows:
        raise GlannError(f"{path}: nothing to draw, as 'growth' could not be measured")
    with matplotlib.style.context(["default", _STYLE]):
        fig = Figure(figsize=(7.6, 3.2), dpi=150, layout="constrained")
        FigureCanvasAgg(fig)
        time, memory = fig.subplots(1, 2)
        for way, colour, marker in (("ours", COLOURS[0], "o"), ("plain", COLOURS[1], "s")):
            shown = [(row["n"], row["ways"][way]) for row in rows if way in row["ways"]]
            n = [count for count, _ in shown]
            name = "glann" if way == "ours" else way
            seconds = [statistics.median(r["seconds"] for r in one["rounds"]) for _, one in shown]
            held = [one["memory_bytes"] / 2**20 for _, one in shown]
            time.plot(n, seconds, color=colour, marker=marker, label=name)
            memory.plot(n, held, color=colour, marker=marker, label=name)
        n = [row["n"] for row in rows]
        whole = [4 * row["n"] * row["points"] / 2**20 for row in rows]
        memory.plot(n, whole, color=COLOURS[10], ls="--", label="all scores at once, 4·n·m")
        _finish(time, "seconds")
        _finish(memory, "peak memory, MB")
        about = found["environment"]
        fig.suptitle(
            f"Exact matching of n codes to m = {rows[0]['points']:,} candidates "
            f"({about['device']}, {about['threads']} threads)",
            fontsize=9,
        )
        metadata = dict.fromkeys(("Date", "Creator")) if path.suffix == ".svg" else None
        kind = path.suffix.removeprefix(".")
        write_atomically(path, lambda file: fig.savefig(file, format=kind, metadata=metadata))


def _finish(axes: Axes, label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("n")
    axes.set_ylabel(label)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.9g}"))
        axis.set_minor_formatter(NullFormatter())
