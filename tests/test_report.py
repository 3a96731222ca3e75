import base64
import copy
import csv
import html.parser
import io
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from glann.errors import GlannError
from glann.report import markdown_table, summarise, write_report
from glann.report.charts import COLOURS
from glann.report.summary import caveats, heading, headline

HEADS = [
    "model", "FID ÷ floor", "FID", "KID × 1000", "precision", "recall", "density", "coverage",
    "F8", "F1/8", "memorisation ratio", "images seen", "steps", "seconds",
    "CPU seconds", "parameters",
]  # fmt: skip
SHOWN = {
    "FID ÷ floor": ("fid_over_floor", 1, 2), "FID": ("fid", 1, 1), "KID × 1000": ("kid", 1000, 2),
    "precision": ("precision", 1, 3), "recall": ("recall", 1, 3), "density": ("density", 1, 3),
    "coverage": ("coverage", 1, 3), "F8": ("f8", 1, 3), "F1/8": ("f1_8", 1, 3),
    "memorisation ratio": ("memorisation.ratio", 1, 3), "images seen": ("images_seen", 1, 0),
    "steps": ("steps", 1, 0), "seconds": ("seconds", 1, 0),
    "CPU seconds": ("cpu_seconds", 1, 0), "parameters": ("parameters", 1, 0),
}  # fmt: skip
"""For each column where its number is, what it is multiplied with, and its decimals here."""

FLOOR = 8.5
MODELS = [
    ("vae", "VAE", "baseline", 52.0, 3),
    ("ns-gan", "non-saturating GAN", "baseline", 28.0, 3),
    ("gaussian", "one Gaussian on the codes", "reference", 960.0, 1),
    ("floor", "training images (the floor)", "reference", FLOOR, 1),
    ("r3gan", "R3GAN", "baseline", 16.0, 1),
    ("glann", "GLANN (IMLE on the codes)", "glann", 13.9, 3),
]
"""Not in the table's order."""


def numbers_of(i, name, group, fid, seed):
    """A row whose numbers all differ, and get worse with the FID."""
    fid += 0.0 if name == "floor" else 0.37 * seed
    worse = fid / 2000
    row = {
        "fid": fid, "fid_over_floor": fid / FLOOR, "kid": (fid - FLOOR) * 1.31e-4, "kid_std": 1e-4,
        "precision": 0.9412 - worse, "recall": 0.9371 - worse + 0.001 * i, "density": 1.1 - worse,
        "coverage": 0.9551 - worse, "f8": 0.9812 - worse / 2, "f1_8": 0.9734 - worse / 3,
        "memorisation": {"ratio": 0.99 + 0.001 * i, "share_closer_to_train": 0.5 + 0.001 * seed},
        "samples": f"samples/{name}-{seed}.png",
    }  # fmt: skip
    if group != "reference":
        seconds = 700.0 + 31.7 * i + seed
        row |= {
            "images_seen": 720_000, "steps": 5_628 + i, "seconds": seconds,
            "cpu_seconds": 1.9 * seconds,
            "parameters": 6_600_000 + i, "closest": f"closest/{name}-{seed}.png",
            "curve": [{"seconds": seconds * k / 5, "fid": fid * (1 + 2 / k)} for k in range(1, 6)],
            "curve_samples": 1000,
        }  # fmt: skip
    return row


def make_results():
    rows = []
    for i, (name, label, group, fid, seeds) in enumerate(MODELS):
        for seed in reversed(range(seeds)):
            row = {"model": name, "label": label, "group": group, "seed": seed, "n": 10_000}
            rows.append(row | numbers_of(i, name, group, fid, seed))
    for row in rows:
        if row["model"] == "glann":
            row["codes_seen"] = 3_000_000
    dragan = {"model": "dragan", "label": "DRAGAN", "group": "baseline", "n": 10_000}
    rows.insert(1, dragan | {"seed": 0, "failed": "the loss is not finite", "seconds": 93.0})
    return {
        "recipe": "mnist-short",
        "command": "glann compare mnist-short --seeds 3",
        "time": "2026-11-22T20:00:00+0000",
        "environment": {"versions": {"glann": "0.1.0", "torch": "2.13.0"}, "cores": 2, "gpu": None},
        "settings": {"glo": {"epochs": 15, "betas": [0.5, 0.999]}, "imle": {"loss": "L2"}},
        "protocol": {
            "real": "10,000 test images of mnist",
            "n": 10_000,
            "split": "test",
            "fingerprint": "9f2c" * 16,
            "image_shape": [1, 28, 28],
            "features": {"name": "classifier", "dim": 128, "accuracy": 0.9942},
            "budget": "fixed in images seen, as the recipe says",
            "notes": ["GLANN's seconds are those of both stages."],
        },
        "rows": rows,
    }


def make_pictures(folder, results, size=(242, 242)):
    """Noise for the pictures of seed 0."""
    random = np.random.default_rng(0)
    for row in results["rows"]:
        for key in ("samples", "closest"):
            if row["seed"] == 0 and key in row:
                path = folder / row[key]
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def results():
    """Don't change them."""
    return make_results()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, results):
    folder = tmp_path_factory.mktemp("report")
    make_pictures(folder, results)
    assert write_report(results, folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


VOID = {"meta", "img", "br", "hr", "input", "link", "base"}


class Page(html.parser.HTMLParser):
    """What a page holds; fails if an element isn't closed, or closed that wasn't opened."""

    def __init__(self, text):
        super().__init__()
        self.source, self.open, self.tags, self.text, self.rows = text, [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append({"text": "", "best": False, **dict(attrs)})

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
            if "table" in self.open and {"th", "td"} & set(self.open):
                cell = self.rows[-1][-1]
                cell["text"] += data
                cell["best"] |= "strong" in self.open

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def table(self):
        """label → column's head → cell, without the heads."""
        heads, *rows = [row for row in self.rows if len(row) > 1]
        assert [cell["text"] for cell in heads] == HEADS
        return {
            row[0]["data-value"]: dict(zip(HEADS, row, strict=True))
            for row in rows
            if len(row) == len(HEADS)
        }


def squeezed(text):
    return " ".join(text.split())


def number(row, key):
    for part in key.split("."):
        row = (row or {}).get(part)
    return row


def expected(results, label, head):
    """The text of a cell, worked out from the rows."""
    key, factor, decimals = SHOWN[head]
    found = [number(row, key) for row in results["rows"] if row["label"] == label]
    if None in found:
        return "–"
    text = f"{statistics.fmean(found) * factor:,.{decimals}f}"
    if len(found) > 1 and (statistics.stdev(found) or head in HEADS[:11]):
        text += f" ± {statistics.stdev(found) * factor:,.{decimals}f}"
    return text


# --- the numbers -----------------------------------------------------------------------------


def test_means_and_spreads_over_seeds(results):
    by_name = {summary.model: summary for summary in summarise(results["rows"])}
    assert len(by_name) == 7
    assert by_name["glann"].mean["fid"] == pytest.approx((13.9 + 14.27 + 14.64) / 3)
    assert by_name["glann"].spread["fid"] == pytest.approx(0.37)  # over n − 1: not .302
    assert by_name["glann"].mean["memorisation.share_closer_to_train"] == pytest.approx(0.501)
    assert by_name["r3gan"].mean["fid"] == 16
    assert by_name["r3gan"].spread["fid"] is None
    assert [row["seed"] for row in by_name["vae"].rows] == [0, 1, 2]
    assert by_name["dragan"].mean == {"seconds": 93}
    assert (by_name["dragan"].trainings, by_name["dragan"].rows) == (1, ())


def test_references_first_then_by_fid_over_floor_and_failed_ones_last(results, page):
    wanted = ["floor", "gaussian", "glann", "r3gan", "ns-gan", "vae", "dragan"]
    assert [summary.model for summary in summarise(results["rows"])] == wanted
    labels = {row["model"]: row["label"] for row in results["rows"]}
    shown = [row[0].get("data-value") for row in page.rows[1:]]
    assert [label for label in shown if label] == [labels[name] for name in wanted]


def test_numbers_that_are_missing_or_not_finite_are_left_out():
    rows = [
        {"model": "a", "label": "A", "group": "baseline", "seed": seed, "n": 9, "fid": fid}
        for seed, fid in enumerate([None, 4.0, math.nan, 8.0, math.inf])
    ]
    (summary,) = summarise(rows)
    assert summary.mean == {"fid": 6}
    assert summary.spread == {"fid": pytest.approx(math.sqrt(8))}


def test_a_failed_seed_counts_in_no_mean_and_is_told_of(results, tmp_path):
    changed = copy.deepcopy(results)
    row = next(row for row in changed["rows"] if row["model"] == "vae" and row["seed"] == 1)
    row |= {"failed": "out of luck", "fid": 1e9, "seconds": 1.0}
    (summary,) = [s for s in summarise(changed["rows"]) if s.model == "vae"]
    assert summary.mean["fid"] == pytest.approx(52.37)
    assert summary.mean["seconds"] == pytest.approx(701)
    assert summary.trainings == 3
    shown = Page(write_report(changed, tmp_path).read_text())
    assert shown.table["VAE"]["model"]["text"] == "VAE1 of 3 seeds failed"
    assert "2 of 11 trainings failed: VAE with seed 1; DRAGAN with seed 0." in shown.text
    assert "- VAE, seed 1: out of luck\n" in (tmp_path / "results.md").read_text()


def test_every_number_of_the_table_is_that_of_the_rows(results, page):
    assert len(page.table) == len(MODELS)
    for label, cells in page.table.items():
        for head in HEADS[1:]:
            wanted = expected(results, label, head)
            if (label, head) == ("GLANN (IMLE on the codes)", "images seen"):
                wanted += " + 3,000,000 codes"
            assert squeezed(cells[head]["text"]) == wanted, (label, head)
            if wanted != "–":
                found = [number(row, SHOWN[head][0]) for row in results["rows"]
                         if row["label"] == label]  # fmt: skip
                assert float(cells[head]["data-value"]) == pytest.approx(statistics.fmean(found))


def test_the_table_knows_one_number_by_heart(page):
    glann = page.table["GLANN (IMLE on the codes)"]
    assert squeezed(glann["FID"]["text"]) == "14.3 ± 0.4"
    assert squeezed(glann["FID ÷ floor"]["text"]) == "1.68 ± 0.04"
    assert squeezed(page.table["R3GAN"]["KID × 1000"]["text"]) == "0.98"
    assert squeezed(glann["parameters"]["text"]) == "6,600,005"


def test_the_best_contestant_is_marked_by_each_columns_direction(results, tmp_path):
    rows = copy.deepcopy(results["rows"])
    rows = [row for row in rows if row["model"] in ("floor", "glann", "ns-gan", "vae")]
    for row in rows:
        if row["model"] == "floor":
            row |= {"fid": 14.27, "coverage": 0.99}  # as good as the best, but no contestant
        if row["model"] == "vae":
            row |= {"precision": 0.99, "density": 9.0, "memorisation": {"ratio": 1.0}, "steps": 1}
        if row["model"] == "ns-gan":
            row |= {"coverage": 0.99, "kid": -1e-5}
        if row["model"] in ("glann", "ns-gan"):
            row["f8"] = 0.9701 if row["model"] == "glann" else 0.9702  # both are 0.970
    shown = Page(write_report(results | {"rows": rows}, tmp_path).read_text())
    best = {
        head: [label for label, cells in shown.table.items() if cells[head]["best"]]
        for head in HEADS[1:]
    }
    glann, ns_gan, vae = "GLANN (IMLE on the codes)", "non-saturating GAN", "VAE"
    assert {head: labels for head, labels in best.items() if labels} == {
        "FID ÷ floor": [glann], "FID": [glann], "KID × 1000": [ns_gan], "precision": [vae],
        "recall": [glann], "coverage": [ns_gan], "F8": [glann, ns_gan], "F1/8": [glann],
    }  # fmt: skip
    assert squeezed(shown.table[ns_gan]["KID × 1000"]["text"]) == "−0.01 ± 0.00"


def test_a_lone_contestant_is_best_at_nothing(results):
    rows = [row for row in results["rows"] if row["model"] in ("floor", "glann")]
    assert "**" not in markdown_table(results | {"rows": rows})


def scored(name, group, ratios):
    return [
        {"model": name, "label": name.upper(), "group": group, "seed": seed, "n": 9,
         "fid_over_floor": ratio}
        for seed, ratio in enumerate(ratios)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "sentence", "doubts"),
    [
        (
            scored("glann", "glann", [1.5, 1.6, 1.7]) + scored("gan", "baseline", [2, 2.2]),
            (
                "GLANN has the lowest FID of 2 contestants, 1.60 ± 0.10 times the floor; the best "
                "baseline, GAN, has 2.10 ± 0.14."
            ),
            [],
        ),
        (
            scored("glann", "glann", [1.6, 1.8]) + scored("gan", "baseline", [1.5, 1.7]),
            (
                "A baseline wins: GAN has the lowest FID of 2 contestants, 1.60 ± 0.14 times the "
                "floor; GLANN has 1.70 ± 0.14."
            ),
            ["GAN and GLANN differ by less than their spreads."],
        ),
        (
            scored("gan", "baseline", [1.5]) + scored("vae", "baseline", [3]),
            (
                "GAN has the lowest FID of 2 contestants, 1.50 times the floor; the next, VAE, has "
                "3.00."
            ),
            ["One seed each: how much the scores vary by chance is not known."],
        ),
        (
            scored("gan", "baseline", [1.5]) + scored("glann", "glann", [3, 4]),
            (
                "A baseline wins: GAN has the lowest FID of 2 contestants, 1.50 times the floor; "
                "GLANN has 3.50 ± 0.71."
            ),
            ["Of the first two, GAN and GLANN, one has one seed."],
        ),
        (
            scored("floor", "reference", [1]) + scored("glann", "glann", [1.5]),
            "The FID of GLANN is 1.50 times the floor.",
            ["One seed: how much the scores vary by chance is not known."],
        ),
        (scored("floor", "reference", [1]), "No contestant has an FID.", []),
        (scored("glann", "glann", [math.nan]), "No contestant has an FID.", []),
        ([], "No contestant has an FID.", []),
    ],
)
def test_the_headline_says_who_won(rows, sentence, doubts):
    assert headline(summarise(rows)) == sentence
    assert caveats(summarise(rows)) == doubts


@pytest.mark.parametrize(
    ("models", "title"),
    [
        ({"glann": "glann", "vae": "baseline", "ns-gan": "baseline"}, "GLANN against 2 baselines"),
        ({"floor": "reference", "glann": "glann", "vae": "baseline"}, "GLANN against a baseline"),
        ({"fake": "glann"}, "FAKE"),
        ({"vae": "baseline", "ns-gan": "baseline"}, "2 models"),
        ({"floor": "reference"}, "Scores"),
    ],
)
def test_the_heading_says_what_was_compared(models, title):
    rows = [row for name, group in models.items() for row in scored(name, group, [2, 3])]
    assert heading({"recipe": "digits", "rows": rows}) == f"{title} on digits"


# --- files -----------------------------------------------------------------------------------


def test_the_csv_holds_every_row_unrounded(folder, results):
    read = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text(encoding="utf-8"))))
    assert len(read) == len(results["rows"])
    keys = [key for key, _, _ in SHOWN.values()]
    keys += ["kid_std", "codes_seen", "memorisation.share_closer_to_train", "seed", "n"]
    for found, row in zip(read, results["rows"], strict=True):
        for key in keys:
            wanted = number(row, key)
            text = found[key.replace(".", "_")]
            assert text == "" if wanted is None else float(text) == wanted, key
        for key in ("model", "label", "group", "failed", "samples", "closest"):
            assert found[key] == row.get(key, "")


def cells_of(line):
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_markdown_table_is_one(results, page):
    lines = markdown_table(results).splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    heads, rule, *rows = map(cells_of, lines)
    assert heads == HEADS
    assert all(re.fullmatch(r"-+" if i == 0 else r"-+:", cell) for i, cell in enumerate(rule))
    assert {len(row) for row in rows} == {len(HEADS)}
    assert [row[0] for row in rows[:3]] == [
        "*training images (the floor)*", "*one Gaussian on the codes*", "GLANN (IMLE on the codes)",
    ]  # fmt: skip
    assert rows[-1][:3] == ["DRAGAN", "failed", "–"]
    for row in rows[:-1]:
        for head, text in list(zip(HEADS, row, strict=True))[1:]:
            label = row[0].strip("*")
            assert text.strip("*") == expected(results, label, head)
            assert text.startswith("**") == page.table[label][head]["best"]


def test_results_md_says_what_the_page_says(folder, results):
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert text.startswith("# GLANN against 4 baselines on mnist-short\n")
    for part in (
        headline(summarise(results["rows"])),
        "1 of 11 trainings failed: DRAGAN with seed 0.",
        "\n```\nglann compare mnist-short --seeds 3\n```\n",
        (
            "10,000 samples of each against 10,000 test images of mnist on 128 classifier features "
            "(99.42% accurate); budget fixed in images seen, as the recipe says; seeds 0, 1, 2."
        ),
        markdown_table(results),
        "- DRAGAN, seed 0: the loss is not finite\n",
        "- GLANN's seconds are those of both stages.\n",
    ):
        assert part in text


def test_equal_results_give_equal_bytes(folder, results, monkeypatch, tmp_path):
    pages = [(folder / "report.html").read_bytes()]
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 30)
    monkeypatch.setitem(matplotlib.rcParams, "xtick.major.size", 30)
    write_report(results, folder)
    pages.append((folder / "report.html").read_bytes())
    (tmp_path / "results.json").write_text(json.dumps(results))
    code = "import json, sys; from pathlib import Path; from glann.report import write_report\n"
    code += "write_report(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))"
    arguments = [sys.executable, "-c", code, tmp_path / "results.json", folder]
    subprocess.run(arguments, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""})
    pages.append((folder / "report.html").read_bytes())
    assert len(set(pages)) == 1
    assert matplotlib.rcParams["lines.linewidth"] == 30  # and the user's settings are left alone


def test_a_folder_that_cannot_be_written_is_an_error_for_the_user(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GlannError, match="can't be written"):
        write_report(results, tmp_path / "file" / "report")


# --- the page --------------------------------------------------------------------------------


def test_the_page_says_it_all_in_order(page, results):
    text = squeezed(page.text)
    parts = [
        "GLANN against 4 baselines on mnist-short",
        headline(summarise(results["rows"])),
        "1 of 11 trainings failed: DRAGAN with seed 0.",
        "glann compare mnist-short --seeds 3",
        "10,000 samples of each against",
        "Scores", "FID ÷ floor", "training images (the floor)", "failed: the loss is not finite",
        "Samples", "Charts", "Closest training images", "Protocol",
        "9f2c9f2c", "GLANN's seconds are those of both stages.", "Kynkäänniemi et al. 2019",
        "2026-11-22 20:00 UTC", "glann 0.1.0, torch 2.13.0",
        "[glo] epochs = 15 betas = [0.5, 0.999] [imle] loss = \"L2\"",
    ]  # fmt: skip
    start = 0
    for part in parts:
        assert part in text[start:], part
        start = text.index(part, start) + len(part)
    assert "Gpu" not in text  # null: not known


def test_the_page_needs_nothing_else(page):
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name, text in attrs.items():
            if name == "href" and tag == "a":
                assert text.startswith("https://arxiv.org/abs/")
            elif name in ("href", "xlink:href"):
                assert text.startswith("#")
            elif name == "src":
                assert tag == "img"
                assert text.startswith("data:image/png;base64,")
            elif name not in ("content",):
                assert "://" not in (text or "")
            assert name not in ("srcset", "background", "poster", "action", "ping")
            assert not name.startswith("on")
    assert "@import" not in page.source
    assert {match[:2] for match in re.findall(r"url\((..)", page.source)} <= {"#b", "#s", "#t"}
    (script,) = page.attributes("script")
    assert script == {}
    policy = next(a["content"] for a in page.attributes("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_page_can_be_read_by_everybody(page):
    assert page.attributes("html") == [{"lang": "en"}]
    assert len(page.attributes("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert {attrs["scope"] for attrs in page.attributes("th")} == {"col", "row", "rowgroup"}
    assert len(page.attributes("caption")) == 1
    assert all(attrs["alt"] for attrs in page.attributes("img"))
    charts = page.attributes("svg")
    assert [attrs["role"] for attrs in charts] == ["img"] * 3
    assert all("R3GAN" in attrs["aria-label"] for attrs in charts)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 30
    used = {a["xlink:href"][1:] for a in page.attributes("use")}
    used |= set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert used <= set(ids)


def test_charts_follow_the_pages_colour_and_font(page):
    for svg in re.findall(r"<svg.*?</svg>", page.source, re.DOTALL):
        assert "currentColor" in svg
        assert "#000000" not in svg
        assert "#ffffff" not in svg
        assert "DejaVu" not in svg
        assert "<style" not in svg  # it would be the page's
        assert "GLANN (IMLE on the codes)</text>" in svg or ">glann</text>" in svg


@pytest.mark.parametrize("above", [15, 25])
def test_bars_are_on_a_log_scale_when_they_differ_by_more_than_20(tmp_path, results, above):
    rows = scored("floor", "reference", [1]) + scored("gan", "baseline", [above])
    labels = [
        svg["aria-label"]
        for svg in Page(write_report(results | {"rows": rows}, tmp_path).read_text()).attributes(
            "svg"
        )
    ]
    assert len(labels) == 1
    assert ("log scale" in labels[0]) is (above > 20)


def test_pictures_of_one_seed_are_inside(folder, page, results):
    pictures = page.attributes("img")
    assert len(pictures) == len(MODELS) + 4
    assert pictures[0] == {
        "class": "small", "alt": "Samples of training images (the floor), seed 0",
        "width": "242", "height": "242", "src": pictures[0]["src"],
    }  # fmt: skip
    data = {attrs["src"].partition(",")[2] for attrs in pictures}
    files = {base64.b64encode(path.read_bytes()).decode() for path in folder.rglob("*-0.png")}
    assert data == files


def test_pictures_that_are_missing_damaged_or_elsewhere_are_told_of(results, tmp_path):
    rows = [row | {"seed": 0} for row in copy.deepcopy(results["rows"][-4:])]
    for i, row in enumerate(rows):
        row |= {"model": f"m{i}", "label": f"M{i}", "closest": None}
    folder = tmp_path / "report"
    folder.mkdir()
    Image.new("L", (500, 400)).save(tmp_path / "elsewhere.png")
    Image.new("L", (500, 400)).save(folder / "good.jpg")
    (folder / "text.png").write_text("no picture")
    for row, name in zip(
        rows, ["gone.png", "text.png", "../elsewhere.png", "good.jpg"], strict=True
    ):
        row["samples"] = name
    shown = Page(write_report(results | {"rows": rows}, folder).read_text())
    assert "gone.png is missing" in shown.text
    assert "text.png can't be read as a picture" in shown.text
    assert "../elsewhere.png is outside of the report's folder" in shown.text
    (picture,) = shown.attributes("img")
    assert picture["src"].startswith("data:image/jpeg;base64,")
    assert "class" not in picture  # large: not magnified
    assert "Closest training images" not in shown.text


def test_a_model_without_the_seed_of_the_others_says_so(results, tmp_path):
    changed = copy.deepcopy(results)
    for row in changed["rows"]:
        if row["model"] == "r3gan":
            row |= {"seed": 5, "samples": "samples/r3gan-5.png"}
    shown = Page(write_report(changed, tmp_path).read_text())
    assert "R3GAN 1.88×, seed 5" in shown.text
    assert "Of seed 0, where nothing else is said." in shown.text


HOSTILE = "$a_b$字\"'><evil onx=1>&amp;<script>bad()</script>|`\n\\ é"


def hostile(x, key=""):
    """The same results with hostile text in place of all text that may be any."""
    if isinstance(x, dict):
        return {
            f"{k}{HOSTILE}" if key in ("environment", "versions", "settings", "glo") else k:
            v if k in ("group", "versions") and isinstance(v, str) else hostile(v, k)
            for k, v in x.items()
        }  # fmt: skip
    if isinstance(x, list):
        return [hostile(v, key) for v in x]
    return f"{x}{HOSTILE}" if isinstance(x, str) else x


def test_text_of_results_is_never_markup(results, tmp_path, page):
    changed = hostile(results)
    Image.new("L", (30, 30)).save(tmp_path / "picture.png")
    next(row for row in changed["rows"] if row["group"] == "glann" and row["seed"] == 0).update(
        samples="picture.png"
    )
    changed["environment"]["versions"] = {f"torch{HOSTILE}": HOSTILE}
    shown = Page(write_report(changed, tmp_path).read_text())
    assert "evil" not in {tag for tag, _ in shown.tags}
    assert not [attrs for _, attrs in shown.tags if "onx" in attrs]
    assert [attrs for tag, attrs in shown.tags if tag == "script"] == [{}]
    assert {tag for tag, _ in shown.tags} <= {tag for tag, _ in page.tags} | {"p"}
    text = squeezed(shown.text)
    for start in (
        "mnist-short",
        "R3GAN",
        "--seeds 3",
        "of mnist",
        "not finite",
        "both stages.",
        "9f2c",
        "as the recipe says",
        "classifier",
        "torch",
        "samples/vae-0.png",
    ):
        assert start + squeezed(HOSTILE) in text, start
    lines = markdown_table(changed).splitlines()
    assert {len(cells_of(line)) for line in lines} == {len(HEADS)}
    assert (
        "<"
        not in (tmp_path / "results.md").read_text().replace(changed["command"], "").split("```")[2]
    )
    read = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert read[0]["label"] == f"VAE{HOSTILE}"


BARE = {"recipe": "r", "command": "c", "protocol": {"real": "images", "n": 9}}
NOTHING = {"model": "m", "label": "M", "group": "baseline", "seed": 0, "n": 9}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [NOTHING],
        [NOTHING | dict.fromkeys(["fid", "kid", "memorisation", "curve", "samples", "label"])],
        [NOTHING | {"fid": math.nan, "fid_over_floor": math.inf, "precision": 0.5}],
        [NOTHING | {"failed": "x", "curve": [{"seconds": 0, "fid": 3}, {"seconds": None}]}],
        [NOTHING | {"fid": 0.0, "fid_over_floor": 0.0, "kid": 0.0, "precision": 1, "recall": 1}],
        [NOTHING | {"fid_over_floor": 1e-9, "curve": [{"seconds": 1e5, "fid": 1e9}], "n": 5}],
        [NOTHING | {"group": "reference", "fid_over_floor": 1.0, "precision": 0, "recall": 0}],
        [NOTHING | {"seed": i, "fid_over_floor": 10.0**i, "precision": i} for i in range(4)],
        [NOTHING | {"model": f"m{i}", "label": "long " * 30, "fid_over_floor": 1 + i / 9,
                    "precision": 0.5, "recall": 0.5, "curve": [{"seconds": 9, "fid": 9}]}
         for i in range(30)],
    ],
)  # fmt: skip
def test_little_or_odd_is_shown_too(rows, tmp_path):
    shown = Page(write_report(BARE | {"rows": rows}, tmp_path).read_text())
    assert not re.search(r"\b(nan|inf|None|null)\b", shown.text)
    heads, rule, *cells = map(cells_of, markdown_table(BARE | {"rows": rows}).splitlines())
    assert {len(row) for row in [rule, *cells]} == {len(heads)}
    assert heads == [head for head in HEADS if head in heads]
    for number, head in enumerate(heads[2:], 2):  # columns that nobody has are left out
        assert {row[number] for row in cells} != {"–"}, head


def test_texts_of_charts_are_not_cut_off(tmp_path):
    """Of points close together, whose ticks have many digits."""
    rows = [NOTHING | {"precision": 0.9, "recall": 0.8, "curve": [{"seconds": 9, "fid": 9}]}]
    source = write_report(BARE | {"rows": rows}, tmp_path).read_text()
    scatter = next(svg for svg in source.split("<svg")[1:] if "recall" in svg)
    width = float(re.search(r'viewBox="0 0 (\S+)', scatter)[1])
    middle = re.findall(r'text-anchor: middle[^>]* x="([^"]+)"', scatter)
    assert len(middle) > 3
    for x in middle:
        assert 10 <= float(x) <= width - 15


@pytest.mark.parametrize(("low", "high"), [(1, 1.2), (52, 98), (3, 3), (0.04, 700)])
def test_a_log_axis_has_two_numbers_or_more(low, high, tmp_path):
    curve = [{"seconds": 1, "fid": high}, {"seconds": 2, "fid": low}]
    source = write_report(BARE | {"rows": [NOTHING | {"curve": curve}]}, tmp_path).read_text()
    axis = source[source.index('id="time-matplotlib.axis_2"') :]
    axis = axis[: axis.index("FID</text>")]
    assert len(re.findall(r">[\d.,]+</text>", axis)) >= 2


def test_another_number_of_samples_is_told_of(tmp_path):
    rows = [NOTHING, NOTHING | {"model": "o", "label": "O", "n": 5000}]
    shown = Page(write_report(BARE | {"rows": rows}, tmp_path).read_text())
    assert shown.table["O"]["model"]["text"] == "O5,000 samples"
    assert shown.table["M"]["model"]["text"] == "M"


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted(luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_seen_on_light_and_dark_pages(page):
    pages = re.findall(r"--page: (#\w{6})", page.source)
    assert len(pages) == 2
    for colour in COLOURS:
        for behind in pages:
            assert contrast(matplotlib.colors.to_rgb(colour), matplotlib.colors.to_rgb(behind)) >= 3


# --- in a browser ----------------------------------------------------------------------------

BROWSER = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)

FACTS = """
addEventListener("load", () => {
  const style = (selector) => getComputedStyle(document.querySelector(selector));
  const rows = () => [...document.querySelectorAll("table.scores tbody:last-of-type [data-row] th")]
    .map((cell) => cell.dataset.value);
  const before = rows();
  const heads = document.querySelectorAll("thead button");
  heads[13].click();  // by seconds: the failed one was the quickest
  const first = rows()[0];
  heads[4].click();
  const once = rows();
  heads[4].click();
  const charts = [...document.querySelectorAll("svg.chart")];
  const scale = (svg) => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  parent.postMessage({
    width: innerWidth,
    scrolls: document.documentElement.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    pictures: [...document.images].map((image) => image.naturalWidth),
    page: style("body").backgroundColor,
    inks: ["body", ".quiet", "td strong", "tr.reference td", "a", "tr.glann small", "h1", "summary"]
      .map((selector) => style(selector).color),
    mark: style("tr.glann td").backgroundColor,
    chart: style("svg.chart text").fill,
    letters: Math.min(...charts.flatMap((svg) => [...svg.querySelectorAll("text")]
      .map((text) => parseFloat(getComputedStyle(text).fontSize) * scale(svg)))),
    sorts: [before, first, once, rows()],
  }, "*");
});
"""
HOST = """<!DOCTYPE html><title>host</title>
<iframe src="copy.html" width="360" height="800" style="border: 0"></iframe>
<iframe src="copy.html" width="1280" height="900" style="border: 0"></iframe>
<script>
const facts = [];
addEventListener("message", (event) => {
  facts.push(event.data);
  document.body.dataset.facts = JSON.stringify(facts);
});
</script>
"""


def rgb(text):
    return [float(number) / 255 for number in re.findall(r"[\d.]+", text)[:3]]


def in_browser(page, folder, *options):
    """What a browser makes of a page, as a process that ran."""
    return subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr", "--v=0", "--hide-scrollbars", "--window-size=1700,1000",
            "--virtual-time-budget=4000", "--dump-dom", *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_only_scores_have_buttons_to_sort_by(results, tmp_path):
    table = "<table class='scores'><thead><tr><th>x</th></tr></thead></table>"
    path = write_report(results, tmp_path, [f"<section>{table}</section>"])
    assert in_browser(path, tmp_path).stdout.count("<button") == len(HEADS)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser_on_a_phone_and_on_a_desk(page, tmp_path, dark):
    # The page's own policy stays in force: only the script of this test is let in.
    source = page.source.replace("script-src ", "script-src 'nonce-facts' ")
    source = source.replace("</body>", f'<script nonce="facts">{FACTS}</script></body>')
    (tmp_path / "copy.html").write_text(source, encoding="utf-8")
    (tmp_path / "host.html").write_text(HOST, encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    done = in_browser(tmp_path / "host.html", tmp_path, scheme)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-facts="([^"]*)"', done.stdout)
    assert found, done.stderr
    facts = json.loads(html.unescape(found[1]))
    assert sorted(fact["width"] for fact in facts) == [360, 1280]
    for fact in facts:
        assert fact["scrolls"] <= fact["width"]
        assert fact["dark"] is dark
        assert len(fact["pictures"]) == len(page.attributes("img"))
        assert min(fact["pictures"]) > 0
        assert (luminance(rgb(fact["page"])) < 0.05) is dark
        for ink in fact["inks"]:
            assert contrast(rgb(ink), rgb(fact["page"])) >= 4.5
            assert contrast(rgb(ink), rgb(fact["mark"])) >= 4.5
        assert fact["chart"] == fact["inks"][0]
        assert fact["letters"] >= 11
        before, first, once, twice = fact["sorts"]
        assert (before[0], first) == ("GLANN (IMLE on the codes)", "DRAGAN")
        # By precision: the highest first, then the lowest; one that failed is last in both.
        assert once == before
        assert twice == [*before[-2::-1], "DRAGAN"]
