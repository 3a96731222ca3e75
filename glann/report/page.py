"""The report as one HTML page that needs no other file and no network."""

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from glann.report.charts import fid_over_time, looks, precision_recall_scatter, ratio_bars
from glann.report.summary import (
    COLUMNS,
    COSTS,
    RATIO,
    REFERENCE,
    SCORES,
    Format,
    Summary,
    caveats,
    contestants,
    heading,
    headline,
    protocol_line,
    summarise,
)

SMALL = 320
"""Pictures no wider are magnified on the page, and keep their pixels sharp."""

MEANINGS = (
    (
        "FID ÷ floor",
        (
            "The FID divided by the floor, the mean FID of several draws of training images "
            "against the same test images. At 1 the samples are as near to the test images as "
            "training images are."
        ),
        None,
    ),
    (
        "FID",
        (
            "The distance between the Gaussians that fit the features of the samples and of the "
            "real images best; 0 if they are the same."
        ),
        ("Heusel et al. 2017", "1706.08500"),
    ),
    (
        "KID",
        (
            "How far apart the features of both are by a polynomial kernel, without assuming "
            "Gaussians; about 0, or just below, if they are the same."
        ),
        ("Bińkowski et al. 2018", "1801.01401"),
    ),
    (
        "Precision, recall",
        (
            "The share of samples that lie among real images, and the share of real "
            "images that lie among samples."
        ),
        ("Kynkäänniemi et al. 2019", "1904.06991"),
    ),
    (
        "Density, coverage",
        (
            "How many real images' neighbourhoods a sample lies in, near 1 for real "
            "ones, and the share of these neighbourhoods that hold a sample."
        ),
        ("Naeem et al. 2020", "2002.09797"),
    ),
    (
        "F8, F1/8",
        (
            "Two points on the curve of precision and recall over clusters of features: F8 is "
            "low if modes are missing, F1/8 if samples look wrong."
        ),
        ("Sajjadi et al. 2018", "1806.00035"),
    ),
    (
        "Memorisation ratio",
        (
            "How much nearer samples are to training than to test images, against "
            "the same for test images: 1 if nothing is copied, 0 if all is."
        ),
        ("after Meehan et al. 2020", "2004.05675"),
    ),
)
"""Each score in a sentence, with the paper and its number on arXiv."""


def page(results: dict[str, Any], folder: Path, studies: Sequence[str] = ()) -> str:
    """The whole page; pictures are read from `folder`, `studies` are sections of HTML."""
    summaries = summarise(results["rows"])
    parts = [
        _header(results, summaries),
        _table(summaries, results["protocol"]["n"]),
        *_samples(summaries, folder),
        *_charts(results, summaries),
        *_closest(summaries, folder),
        _protocol(results),
        _setting(results),
        *studies,
    ]
    version = ((results.get("environment") or {}).get("versions") or {}).get("glann")
    footer = f"""Written by glann{f" {escape(str(version))}" if version else ""}. The numbers
unrounded, one row for each training: results.csv and results.json beside this page."""
    return document(heading(results), "".join(parts), footer, _resource("sort.js"))


def document(title: str, body: str, footer: str, script: str = "") -> str:
    """A page in the report's look; title is text, body and footer are HTML."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page itself forbids what it promises not to do: to load anything, or run other scripts.
    scripts = f"script-src 'sha256-{digest}'; " if script else ""
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"{scripts}base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{_resource("style.css")}</style>
</head>
<body>
{body}<footer>
<p>{footer}</p>
</footer>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def _resource(name: str) -> str:
    return resources.files("glann.report").joinpath(name).read_text(encoding="utf-8")


def _header(results: dict[str, Any], summaries: Sequence[Summary]) -> str:
    doubts = " ".join(caveats(summaries))
    return f"""<header>
<h1>{escape(heading(results))}</h1>
<p class="result">{prose(headline(summaries))}</p>
{f"<p>{escape(doubts)}</p>" if doubts else ""}
<code class="command">{escape(str(results["command"]))}</code>
<p class="quiet">{prose(protocol_line(results))}</p>
</header>
"""


def prose(text: str) -> str:
    """Text whose numbers stay on one line."""
    return escape(text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"))


def _table(summaries: Sequence[Summary], n: int) -> str:
    shown = Format(summaries)
    heads = ['<th scope="col">model</th>']
    for column in COLUMNS:
        order = ' aria-sort="ascending"' if column == RATIO else ""
        better = f' data-better="{column.better}"' if column.better else ""
        heads.append(f'<th scope="col"{order}{better}>{escape(column.title)}</th>')
    references = [summary for summary in summaries if summary.group == REFERENCE]
    bodies = []
    for title, part in (
        ("References: what each stage of GLANN keeps", references),
        ("Contestants", contestants(summaries)),
    ):
        if part:
            rows = "".join(_row(summary, shown, n) for summary in part)
            bodies.append(
                f'<tbody>\n<tr class="part"><th scope="rowgroup" colspan="{len(COLUMNS) + 1}">'
                f"<span>{title}</span></th></tr>\n{rows}</tbody>\n"
            )
    return f"""<section>
<h2 id="scores">Scores</h2>
<p class="quiet">Mean ± standard deviation over seeds, of the floor over its draws. In colour the
best contestant of a column. Lower is better for FID and KID, higher for precision, recall,
coverage, F8 and F1/8. Density and the memorisation ratio should be near 1.</p>
<div class="scroll" role="region" aria-labelledby="scores" tabindex="0">
<table class="scores">
<caption class="unseen">Scores and costs of each model, by FID ÷ floor</caption>
<thead><tr>{"".join(heads)}</tr></thead>
{"".join(bodies)}</table>
</div>
</section>
"""


def _row(summary: Summary, shown: Format, n: int) -> str:
    name = escape(summary.label)
    seeds = summary.trainings
    details = [f"{seeds} {'draws' if summary.model == 'floor' else 'seeds'}"] if seeds > 1 else []
    if summary.rows and summary.failed:
        details = [f"{len(summary.failed)} of {seeds} seeds failed"]
    others = sorted({row["n"] for row in summary.rows} - {n})
    details += [f"{other:,} samples" for other in others]
    small = f"<small>{escape(', '.join(details))}</small>" if details else ""
    cells = [f'<th scope="row" data-column="0" data-value="{name}">{name}{small}</th>']
    columns: Sequence[Any] = COLUMNS
    if not summary.rows:
        cells.append(f'<td class="failed" colspan="{len(SCORES)}">{_failures(summary)}</td>')
        columns = COSTS
    for column in columns:
        mean, spread = shown.mean(column, summary), shown.spread(column, summary)
        text = f"<strong>{mean}</strong>" if shown.is_best(column, summary) else mean or "–"
        more = f"<small>± {spread}</small>" if spread else ""
        if column.key == "images_seen" and "codes_seen" in summary.mean:
            more += f"<small>+ {summary.mean['codes_seen']:,.0f} codes</small>"
        raw = repr(summary.mean[column.key]) if mean else ""
        number = COLUMNS.index(column) + 1
        cells.append(f'<td data-column="{number}" data-value="{raw}">{text} {more}</td>')
    return f'<tr class="{escape(summary.group)}" data-row>{"".join(cells)}</tr>\n'


def _failures(summary: Summary) -> str:
    messages = {str(row["failed"]): None for row in summary.failed}
    return f"failed: {escape('; '.join(messages))}"


def _samples(summaries: Sequence[Summary], folder: Path) -> Iterator[str]:
    figures, seed = _figures(summaries, "samples", folder)
    if figures:
        yield f"""<section>
<h2>Samples</h2>
<p class="quiet">Of seed {seed}, where nothing else is said.</p>
<div class="pictures">
{figures}</div>
</section>
"""


def _closest(summaries: Sequence[Summary], folder: Path) -> Iterator[str]:
    figures, seed = _figures(contestants(summaries), "closest", folder)
    if figures:
        yield f"""<section>
<h2>Closest training images</h2>
<p class="quiet">Each row of samples stands above the training images that are closest to them:
pairs that look the same would be copies. Of seed {seed}, where nothing else is said.</p>
<div class="pictures wide">
{figures}</div>
</section>
"""


def _figures(summaries: Sequence[Summary], key: str, folder: Path) -> tuple[str, int]:
    """One figure for each model that names a picture, of one seed if it can be; and that seed."""
    named = [[row for row in summary.rows if row.get(key)] for summary in summaries]
    seeds = [{row["seed"] for row in rows} for rows in named if rows]
    if not seeds:
        return "", 0
    # The seed that most models have, the lowest of these.
    common = min(set.union(*seeds), key=lambda seed: (-sum(seed in one for one in seeds), seed))
    shown, figures = Format(summaries), []
    for summary, rows in zip(summaries, named, strict=True):
        if not rows:
            continue
        row = min(rows, key=lambda row: (row["seed"] != common, row["seed"]))
        facts = f"{shown.mean(RATIO, summary)}×" if RATIO.key in summary.mean else ""
        if row["seed"] != common:
            facts += f"{', ' if facts else ''}seed {row['seed']}"
        what = "Samples of" if key == "samples" else "Samples and closest training images of"
        alt = f"{what} {summary.label}, seed {row['seed']}"
        figures.append(
            f'<figure class="{escape(summary.group)}">{picture(folder, row[key], alt)}'
            f"<figcaption>{escape(summary.label)} <small>{escape(facts)}</small></figcaption>"
            "</figure>\n"
        )
    return "".join(figures), common


def picture(folder: Path, name: object, alt: str) -> str:
    """An `<img>` that holds the picture, or a line that says why it can't."""
    path = (folder / str(name)).resolve()
    problem = "is missing"
    if not path.is_relative_to(folder.resolve()):
        problem = "is outside of the report's folder"
    else:
        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                kind, (width, height) = Image.MIME[image.format or ""], image.size
                image.load()
            small = ' class="small"' if width <= SMALL else ""
            return (
                f'<img{small} alt="{escape(alt)}" width="{width}" height="{height}" '
                f'src="data:{kind};base64,{base64.b64encode(data).decode()}">'
            )
        except FileNotFoundError:
            pass
        except (OSError, KeyError, ValueError, SyntaxError, Image.DecompressionBombError):
            problem = "can't be read as a picture"
    return f'<p class="missing">{escape(str(name))} {problem}</p>'


def _charts(results: dict[str, Any], summaries: Sequence[Summary]) -> Iterator[str]:
    look = looks(summaries, (row["model"] for row in results["rows"]))
    counts = sorted({row["curve_samples"] for row in results["rows"] if row.get("curve_samples")})
    of = f" of {' or '.join(f'{count:,}' for count in counts)} samples" if counts else ""
    figures = [
        f"<figure><h3>{title}</h3>\n{svg}\n"
        f'<figcaption class="quiet">{escape(caption)}</figcaption></figure>\n'
        for title, svg, caption in (
            (
                "FID ÷ floor",
                ratio_bars(summaries, look),
                (
                    "Shorter is better. The dashed line is the floor; whiskers are standard "
                    "deviations over seeds."
                ),
            ),
            (
                "Precision against recall",
                precision_recall_scatter(summaries, look),
                (
                    "Up: better-looking samples. Right: fewer modes missing. Stars are references, "
                    "lines standard deviations over seeds."
                ),
            ),
            (
                "FID against training time",
                fid_over_time(summaries, look),
                (
                    f"A line for each seed. The FID{of} differs from the table's: these "
                    "compare only with one another."
                ),
            ),
        )
        if svg
    ]
    if figures:
        yield f"""<section>
<h2>Charts</h2>
<div class="charts">
{"".join(figures)}</div>
</section>
"""


def _protocol(results: dict[str, Any]) -> str:
    protocol = results["protocol"]
    facts = {"Real images": protocol["real"], "Samples": f"{protocol['n']:,} of each model"}
    if protocol.get("image_shape"):
        facts["Image shape"] = "×".join(map(str, protocol["image_shape"]))
    features = dict(protocol.get("features") or {})
    if features:
        facts["Features"] = _features(features)
    facts["Budget"] = protocol.get("budget")
    facts["Split"] = protocol.get("split")
    facts["Fingerprint"] = protocol.get("fingerprint")
    notes = "".join(f"<li>{escape(str(note))}</li>\n" for note in protocol.get("notes") or [])
    meanings = "".join(
        f"<dt>{title}</dt>\n<dd>{escape(text)}{_cited(source)}</dd>\n"
        for title, text, source in MEANINGS
    )
    return f"""<section>
<h2>Protocol</h2>
{facts_list(facts)}{f"<h3>Notes</h3><ul>{notes}</ul>" if notes else ""}
<h3>What the scores mean</h3>
<dl>
{meanings}</dl>
</section>
"""


def _features(features: dict[str, Any]) -> str:
    name, dim, accuracy, n = (
        features.pop(key, None) for key in ("name", "dim", "accuracy", "test_images")
    )
    parts = [str(name or "unnamed"), f"{dim:,} numbers" if dim is not None else ""]
    if accuracy is not None:
        parts.append(f"accuracy {accuracy:.2%}")
        parts[-1] += f" on {n:,} test images" if n is not None else ""
    parts += [f"{key.replace('_', ' ')} {_said(x)}" for key, x in features.items() if x is not None]
    return ", ".join(filter(None, parts))


def _cited(source: tuple[str, str] | None) -> str:
    if source is None:
        return ""
    name, number = source
    return f' (<a href="https://arxiv.org/abs/{number}">{escape(name)}</a>)'


def _setting(results: dict[str, Any]) -> str:
    environment = dict(results.get("environment") or {})
    versions = environment.pop("versions", None) or {}
    facts = {"Time": _time(results.get("time"))}
    facts |= {key.replace("_", " ").capitalize(): x for key, x in environment.items()}
    if "Gpu" in facts:
        facts["GPU"] = facts.pop("Gpu")
    facts["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    settings = results.get("settings") or {}
    recipe = f"<pre>{escape(as_toml(settings))}</pre>" if settings else ""
    shown = [("Environment", facts_list(facts)), ("Settings of the recipe", recipe)]
    parts = "".join(
        f"<details><summary>{title}</summary>\n{content}</details>\n"
        for title, content in shown
        if content
    )
    return f"<section>\n<h2>How it was made</h2>\n{parts}</section>\n" if parts else ""


def facts_list(facts: dict[str, Any]) -> str:
    """A definition list of what is known."""
    known = {title: x for title, x in facts.items() if x not in (None, "", {}, [])}
    terms = "".join(
        f"<dt>{escape(str(title))}</dt>\n<dd>{escape(_said(x))}</dd>\n"
        for title, x in known.items()
    )
    return f"<dl>\n{terms}</dl>\n" if terms else ""


def _said(x: object) -> str:
    return x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)


def _time(text: object) -> object:
    """A time as people write it; what isn't one, as it is."""
    try:
        return datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M %Z") if text else None
    except ValueError:
        return text


def as_toml(settings: dict[str, Any], section: str = "") -> str:
    """Settings as a recipe would have them; what is unset is left out."""
    lines, tables = [], []
    for key, x in settings.items():
        if isinstance(x, dict):
            tables.append(as_toml(x, f"{section}.{key}" if section else key))
        elif x is not None:
            lines.append(f"{key} = {json.dumps(x, ensure_ascii=False)}")
    own = "\n".join([f"[{section}]"] * bool(section) + lines) if lines else ""
    return "\n\n".join(filter(None, [own, *tables]))
