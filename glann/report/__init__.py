"""The report of a comparison: a CSV of every score, a Markdown table, and one self-contained page.

`results` is what `glann compare` found: plain JSON, described in `write_report`.
"""

import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glann.report.page import page
from glann.report.summary import (
    COLUMNS,
    NUMBERS,
    RATIO,
    REFERENCE,
    Format,
    Summary,
    caveats,
    heading,
    headline,
    protocol_line,
    summarise,
    value,
)
from glann.storage import write_text

__all__ = ["Summary", "markdown_table", "summarise", "write_report"]

_FIELDS = ("model", "label", "group", "seed", "n", *NUMBERS, "failed", "samples", "closest")


def write_report(results: dict[str, Any], folder: Path, studies: Sequence[str] = ()) -> Path:
    """Write results.csv, results.md and report.html into a folder.

    Args:
        results: "recipe", "command", "protocol" and "rows", one row for each model and seed; also
            "time", "environment" and "settings".  Scores may be missing or null; a row with
            "failed" says why it has none.
        folder: where the rows' pictures are, by the relative paths in "samples" and "closest".
        studies: sections of studies for the page's end, as `glann.report.studies.sections_in`
            finds them.

    Returns:
        The path of report.html, which holds the pictures and needs no other file.

    Raises:
        GlannError: if a file can't be written.
    """
    folder = Path(folder)
    write_text(folder / "results.csv", _csv(results["rows"]))
    write_text(folder / "results.md", _markdown(results))
    path = folder / "report.html"
    write_text(path, page(results, folder, studies))
    return path


def _csv(rows: list[dict[str, Any]]) -> str:
    """Every number of every row as it is; nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.replace(".", "_") for field in _FIELDS)
    writer.writerows([value(row, field) for field in _FIELDS] for row in rows)
    return text.getvalue()


def markdown_table(results: dict[str, Any]) -> str:
    """The table in Markdown, pipes aligned: reference rows in italics, the best in bold.

    Columns that no row has a number for are left out.
    """
    summaries = summarise(results["rows"])
    shown = Format(summaries)
    columns = [c for c in COLUMNS if c == RATIO or any(shown.both(c, s) for s in summaries)]
    lines = [["model", *(column.title for column in columns)]]
    for summary in summaries:
        name = _escaped(summary.label)
        cells = [f"*{name}*" if summary.group == REFERENCE else name]
        for column in columns:
            text = shown.both(column, summary) or "–"
            if column == RATIO and not summary.rows:
                text = "failed"
            cells.append(f"**{text}**" if shown.is_best(column, summary) else text)
        lines.append(cells)
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "".join(
        f"| {' | '.join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])} |\n"
        for cells in [lines[0], rules, *lines[1:]]
    )


def _escaped(text: object) -> str:
    """Text that neither ends a table's cell nor is taken for markup."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_|[]" else letter for letter in text)


def _markdown(results: dict[str, Any]) -> str:
    summaries = summarise(results["rows"])
    failed = [
        f"- {_escaped(summary.label)}, seed {row['seed']}: {_escaped(row['failed'])}"
        for summary in summaries
        for row in summary.failed
    ]
    notes = [f"- {_escaped(note)}" for note in results["protocol"].get("notes") or []]
    fence = "```"
    parts = [
        f"# {_escaped(heading(results))}",
        _escaped(" ".join([headline(summaries), *caveats(summaries)])),
        f"{fence}\n{' '.join(str(results['command']).split())}\n{fence}",
        _escaped(protocol_line(results)),
        markdown_table(results).rstrip("\n"),
        (
            "Mean ± standard deviation over seeds. In bold the best contestant, in italics the "
            "references."
        ),
        *(["Failed:\n\n" + "\n".join(failed)] if failed else []),
        *(["Notes:\n\n" + "\n".join(notes)] if notes else []),
    ]
    return "\n\n".join(parts) + "\n"
