"""The figures of studies in pipelines/README.md are those of the results that ship."""

import json
from pathlib import Path

import pytest

from glann.recipes import section as checked
from glann.studies import find_study

RESULTS = Path(__file__).parents[1] / "pipelines" / "results"
README = (RESULTS.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["gradients", "stability", "blur", "likelihood"])
def test_tables_are_those_of_the_results(name):
    folder = RESULTS / f"study-{name}"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    study = find_study(name)
    settings = checked("", study.settings, results["settings"])
    tables = study.section(settings, results["rows"], folder).tables
    assert tables
    for table in tables:
        for row in (table.head, *table.rows):
            assert f"| {' | '.join(row)} |" in README
