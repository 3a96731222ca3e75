"""What the README says is so."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from glann import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks("python"):  # the second one's images are those of the first
        exec(compile(code, "README.md", "exec"), names)
    assert Path("samples.png").is_file()
    assert Path("my-pipeline/manifest.json").is_file()


def test_commands_and_options_exist():
    said = re.findall(r"\bglann ([a-z-]+)([^\n`;#]*)", "\n".join(blocks("")))
    assert len(said) > 8
    for command, rest in said:
        assert command in cli.COMMANDS
        usage = CliRunner().invoke(cli.main, [command, "--help"]).output
        for option in re.findall(r"(?<=\s)(--?[a-z][a-z-]*)", rest):
            assert re.search(rf"(^|[\s,]){option}\b", usage, flags=re.M), (command, option)


def test_make_targets_and_variables_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", README, flags=re.M):
        assert re.search(rf"^{target}\b.*:", makefile, flags=re.M), target
    for variable in re.findall(r"\b([A-Z_]{6,})=", README):
        assert variable in makefile, variable


PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("pipelines/**/*.md"),
]


def anchors(page):
    """GitHub's anchors of a page: letters, digits, hyphens and spaces of its headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_linked_exists(page):
    for path, title in re.findall(
        r"\]\((?!http)([^)#\s]*)#?([^)]*)\)", page.read_text(encoding="utf-8")
    ):
        there = page.parent / path if path else page
        assert there.exists(), path
        assert not title or title in anchors(there), f"{path}#{title}"


def test_modules_exist():
    for path in re.findall(r"`((?:glann|tests)/[a-z_]+\.py)`", README):
        assert (ROOT / path).is_file(), path


def test_floors_are_those_that_are_tested():
    from test_floors import FLOORS

    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", README, flags=re.M)
    assert len(rows) == len(FLOORS)
    for number, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert name in FLOORS[int(number)], name


@pytest.mark.parametrize("name", ["README.md", "Makefile", "CHANGELOG.md"])
def test_text_is_not_left_unfinished(name):
    assert not re.search(r"TODO|XXX|FIXME|DEMO_OUTPUT", (ROOT / name).read_text(encoding="utf-8"))


RESULTS = sorted((ROOT / "pipelines/results").glob("*/results.json"))
COMPARED = [path for path in RESULTS if not path.parent.name.startswith("study-")]


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.parent.name)
def test_tables_of_results_are_those_of_the_files(path):
    from glann.report import markdown_table

    results = json.loads(path.read_text(encoding="utf-8"))
    told = (ROOT / "pipelines/README.md").read_text(encoding="utf-8")
    assert markdown_table(results).strip() in told
    assert results["recipe"] == path.parent.name
    assert f"glann compare {path.parent.name}" in told
    assert (path.parent / "report.html").is_file()
