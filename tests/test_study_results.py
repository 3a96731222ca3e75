"""The figures of studies in pipelines/studies/README.md are those of the results that ship."""

import json
from pathlib import Path

import pytest

from glann.recipes import section as checked
from glann.studies import find_study

RESULTS = Path(__file__).parents[1] / "pipelines" / "results"
README = (RESULTS.parent / "studies" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("study-*")), ids=lambda path: path.name)
def test_tables_are_those_of_the_results(folder):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    study = find_study(results["study"])
    settings = checked("", study.settings, results["settings"])
    tables = study.section(settings, results["rows"], folder).tables
    assert tables
    for table in tables:
        for row in (table.head, *table.rows):
            assert f"| {' | '.join(row)} |" in README
    assert results["command"].split(" --run ")[0].replace(" --jobs 1", "") in README
    assert (folder / "report.html").is_file()
