"""Sections of studies, and the page that holds all of those that were carried out."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from glann.report.charts import own_ids
from glann.report.page import as_toml, document, facts_list, picture, prose
from glann.storage import write_text

FRAGMENT = "section.html"
"""A study's part of a page, in its folder."""

_OURS = ' class="glann"'


@dataclass(frozen=True)
class Table:
    """A table of texts; `ours` are the first cells of the rows that stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    ours: Collection[str] = ()


@dataclass(frozen=True)
class Chart:
    """An `<svg>` as `glann.report.charts.page_svg` gives it, whose name no other chart has."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture file of the study's folder, by its path in there."""

    path: str
    caption: str
    ours: bool = False


@dataclass(frozen=True)
class Section:
    """What a study shows: what it found in a sentence or two, and whatever supports that."""

    finding: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    pictures: Sequence[Picture] = ()


def write_section(section: Section, results: dict[str, Any], folder: Path) -> Path:
    """Write a study's section and its own page into its folder, and the page of all studies.

    Args:
        section: what it shows.
        results: "study", "claim", "command", "time", "settings" and "environment".
        folder: of the study, in the folder of all runs.

    Returns:
        The page of all studies, `studies.html` beside the study's folder.
    """
    fragment = section_html(section, results, folder)
    write_text(folder / FRAGMENT, fragment)
    write_text(folder / "report.html", _page(f"Study: {results['study']}", [fragment]))
    path = folder.parent / "studies.html"
    write_text(path, _page("The claims as experiments", sections_in(folder.parent)))
    return path


def sections_in(runs: Path) -> list[str]:
    """The sections of all studies in a folder of runs; a quick one only where no other is."""
    found = {path.parent.name: path for path in sorted(runs.glob(f"study-*/{FRAGMENT}"))}
    return [
        path.read_text(encoding="utf-8")
        for name, path in found.items()
        if not (name.endswith("-quick") and name.removesuffix("-quick") in found)
    ]


def _page(title: str, sections: Sequence[str]) -> str:
    footer = "Written by glann. Every run's numbers: results.json in the study's folder."
    return document(
        title, f"<header><h1>{escape(title)}</h1></header>\n{''.join(sections)}", footer
    )


def section_html(section: Section, results: dict[str, Any], folder: Path) -> str:
    """The section as HTML; pictures are read from `folder`."""
    # A study may be in several folders, and all of them on one page.
    name = re.sub(r"\W+", "-", folder.absolute().name)
    environment = dict(results["environment"])
    versions = environment.pop("versions", {})
    facts = {"Time": results["time"]}
    facts |= {key.replace("_", " ").capitalize(): x for key, x in environment.items()}
    facts["Versions"] = ", ".join(f"{key} {version}" for key, version in versions.items())
    return f"""<section id="{name}">
<h2>{escape(str(results["study"]).capitalize())}</h2>
<p class="quiet">The claim: {prose(str(results["claim"]))}</p>
<p class="result">{prose(section.finding or "There are no numbers.")}</p>
<code class="command">{escape(str(results["command"]))}</code>
{"".join(f"<p>{prose(text)}</p>" for text in section.paragraphs)}
{"".join(map(_table, section.tables))}{_charts(section.charts, name)}
{_pictures(section.pictures, folder)}
<details><summary>Settings</summary>
<pre>{escape(as_toml(results["settings"]))}</pre></details>
<details><summary>Environment</summary>
{facts_list(facts)}</details>
</section>
"""


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.head)
    lines = []
    for first, *others in table.rows:
        kind = _OURS if first in table.ours else ""
        cells = "".join(f"<td>{prose(cell)}</td>" for cell in others)
        lines.append(f'<tr{kind}><th scope="row">{escape(first)}</th>{cells}</tr>\n')
    note = f'<p class="quiet">{prose(table.note)}</p>\n' if table.note else ""
    return f"""{note}<div class="scroll" tabindex="0">
<table class="scores"><thead><tr>{heads}</tr></thead>
<tbody>
{"".join(lines)}</tbody></table>
</div>
"""


def _charts(charts: Sequence[Chart], name: str) -> str:
    figures = "".join(
        f"<figure><h3>{escape(chart.title)}</h3>\n{own_ids(chart.svg, name)}\n"
        f'<figcaption class="quiet">{prose(chart.caption)}</figcaption></figure>\n'
        for chart in charts
    )
    return f'<div class="charts">\n{figures}</div>\n' if figures else ""


def _pictures(pictures: Sequence[Picture], folder: Path) -> str:
    figures = "".join(
        f"<figure{_OURS if shown.ours else ''}>"
        f"{picture(folder, shown.path, shown.caption)}"
        f"<figcaption>{escape(shown.caption)}</figcaption></figure>\n"
        for shown in pictures
    )
    return f'<div class="pictures">\n{figures}</div>\n' if figures else ""
