"""The frame of the studies: rows, resuming, settings, report, command line."""

import dataclasses
import json
import multiprocessing
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from glann import cli, studies
from glann.errors import GlannError, NotFinite
from glann.recipes import load_recipe
from glann.report import write_report
from glann.report.studies import Chart, Picture, Section, Table, sections_in
from glann.settings import setting
from glann.studies import STUDIES, find_study
from glann.studies.study import Place, Run, Study, load_settings, to_toml
from glann.studies.work import carry_out
from glann.training import Interrupted


@dataclass(kw_only=True)
class Squares:
    numbers: list[int] = setting([1, 2, 3], "to be squared", minimum=-9, maximum=9)
    offset: float = setting(0.0, "added to each")


def square(place, number, offset):
    with (place.folder / "calls").open("a") as file:
        file.write(f"{place.key}\n")
    if number == 7:
        raise NotFinite("the loss is not finite: nan")
    if number == 8:
        raise GlannError("there is no data")
    if number == 9:
        raise KeyboardInterrupt
    return {"square": number**2 + offset}


def runs(settings):
    return [
        Run(f"square-{n}", square, {"number": n, "offset": settings.offset})
        for n in settings.numbers
    ]


def section(settings, rows, folder):
    if all("failed" in row for row in rows):
        return Section("")
    table = Table(["number", "square"], [[str(r["number"]), str(r.get("square"))] for r in rows])
    svg = (
        '<svg class="chart" viewBox="0 0 1 1" role="img" aria-label="x"><defs><path id="a-b"/>'
        '</defs><use xlink:href="#a-b"/><g clip-path="url(#a-b)"></g></svg>'
    )
    return Section(
        f"{len(rows)} squares <b>", ["Text & more."], [table], [Chart("A chart", svg)],
        [Picture("pictures/none.png", "none")],
    )  # fmt: skip


STUDY = Study("squares", "Squares are not negative.", Squares, runs, section)


def calls(folder):
    path = folder / "calls"
    return sorted(path.read_text().split()) if path.is_file() else []


def go(folder, jobs=1, said=None, **changes):
    settings = Squares(**changes)
    say = said.append if said is not None else (lambda text: None)
    return carry_out(STUDY, settings, folder, jobs=jobs, device="cpu", say=say)


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "study-squares"


def test_rows_come_in_the_order_of_the_runs_with_key_and_arguments(folder):
    go(folder, numbers=[3, 1])
    assert results(folder)["rows"] == [
        {"key": "square-3", "number": 3, "offset": 0.0, "square": 9.0},
        {"key": "square-1", "number": 1, "offset": 0.0, "square": 1.0},
    ]
    assert results(folder)["settings"] == {"numbers": [3, 1], "offset": 0.0}
    assert results(folder)["claim"] == STUDY.claim


def test_several_processes_give_the_rows_of_one(folder, tmp_path, monkeypatch):
    def terminate(process):  # what it holds, such as tqdm's lock, would be left to be warned of
        raise AssertionError(f"{process.name} was not let end by itself")

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "terminate", terminate)
    go(folder, jobs=2)
    assert multiprocessing.active_children() == []
    go(tmp_path / "runs" / "study-one", jobs=1)
    assert results(folder)["rows"] == results(tmp_path / "runs" / "study-one")["rows"]


@pytest.mark.parametrize("name", ["likelihood", "modes"])
def test_a_recipe_s_file_gives_rows_its_name_and_not_its_folders(name, tmp_path):
    study, path = find_study(name), tmp_path / "mine.toml"
    images = {
        "modes": {"mixtures": [], "birthday": ["glann"]},
        "likelihood": {"densities": [], "models": ["glann"]},
    }
    settings = study.settings(recipe=str(path), **images[name])
    assert "mine-glann-0" in [run.key for run in study.runs(settings)]


def test_a_row_is_made_once_and_anew_only_for_what_changed(folder):
    go(folder)
    go(folder)
    assert calls(folder) == ["square-1", "square-2", "square-3"]
    go(folder, numbers=[3, 4])
    assert calls(folder) == ["square-1", "square-2", "square-3", "square-4"]
    go(folder, numbers=[4], offset=1.0)
    assert calls(folder).count("square-4") == 2
    assert results(folder)["rows"][0]["square"] == 17


def test_a_higher_version_makes_all_rows_anew(folder):
    go(folder)
    newer = dataclasses.replace(STUDY, version=2)
    carry_out(newer, Squares(), folder, jobs=1, device="cpu")
    assert len(calls(folder)) == 6


def cube(place, number, offset):
    return {"square": number**3 + offset}


def test_another_function_or_other_data_make_all_rows_anew(folder):
    go(folder)
    cubes = [Run(f"square-{n}", cube, {"number": n, "offset": 0.0}) for n in (1, 2, 3)]
    other = dataclasses.replace(STUDY, runs=lambda settings: cubes)
    carry_out(other, Squares(), folder, jobs=1, device="cpu")
    assert [row["square"] for row in results(folder)["rows"]] == [1, 8, 27]
    go(folder)
    carry_out(STUDY, Squares(), folder, jobs=1, device="cpu", data="elsewhere")
    assert len(calls(folder)) == 9


RECIPE = """
[data]
source = "digits"
[imle]
epochs = 3
[vae]
images_seen = 500
[compare]
models = ["vae"]
"""

OF_A_RECIPE = {
    "glann": {"model": "glann"},
    "vae": {"model": "vae"},
    "some": {"models": ["wgan", "vae"]},
    "none": {"samples": 10},
}


@pytest.mark.parametrize(
    ("before", "after", "anew"),
    [
        ("images_seen = 500", "images_seen = 600", {"vae", "some"}),
        ("epochs = 3", "epochs = 4", {"glann", "none"}),
        ("[data]", "seed = 7\n[data]", set(OF_A_RECIPE)),
        ('"digits"', '"mnist"', set(OF_A_RECIPE)),
        ('models = ["vae"]', "samples = 100", set()),
        ("[imle]", "# No setting.\n[imle]", set()),
    ],
)
def test_a_changed_recipe_makes_anew_the_rows_that_it_changes(tmp_path, before, after, anew):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE)

    def digests():
        shared = {"recipe": str(recipe)}
        return {
            key: Run(key, square, shared | arguments).digest(STUDY, None)
            for key, arguments in OF_A_RECIPE.items()
        }

    old = digests()
    recipe.write_text(RECIPE.replace(before, after))
    assert {key for key, digest in digests().items() if digest != old[key]} == anew


def test_a_recipe_s_changes_count_as_what_they_are_changes_of(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE)
    arguments = {"recipe": str(recipe), "changes": ["imle.epochs=9"], "model": "glann"}
    old = Run("glann", square, arguments).digest(STUDY, None)
    recipe.write_text(RECIPE.replace("epochs = 3", "epochs = 4"))
    assert Run("glann", square, arguments).digest(STUDY, None) == old
    recipe.write_text(RECIPE.replace("epochs = 3", "epochs = 3\npool = 2.0"))
    assert Run("glann", square, arguments).digest(STUDY, None) != old


def replaced(place, recipe):
    Path(recipe).write_text(RECIPE)
    return {}


def test_a_recipe_that_is_edited_while_a_run_goes_on_is_another_one_the_next_time(folder, tmp_path):
    recipe, said = tmp_path / "mine.toml", []
    recipe.write_text(RECIPE.replace("epochs = 3", "epochs = 4"))
    only = [Run("edited", replaced, {"recipe": str(recipe)})]
    study = dataclasses.replace(
        STUDY, runs=lambda settings: only, section=lambda *given: Section("")
    )
    for _ in range(3):
        carry_out(study, Squares(), folder, jobs=1, device="cpu", say=said.append)
    assert ["1 runs, 0 done" in line for line in said if line.startswith("run ")] == [1, 1, 0]


def test_training_of_something_else_or_on_other_data_is_elsewhere(tmp_path):
    place = Place(tmp_path, tmp_path.parent, key="x")
    elsewhere = dataclasses.replace(place, data="elsewhere")
    folders = {p.training(what) for p in (place, elsewhere) for what in ({"a": 1}, {"a": 2})}
    assert len(folders) == 4
    assert place.training({"a": 1}) in folders


def test_restart_makes_all_rows_anew(folder):
    go(folder)
    carry_out(STUDY, Squares(), folder, jobs=1, device="cpu", restart=True)
    assert len(calls(folder)) == 6


def test_a_stopped_study_goes_on_where_it_was(folder):
    with pytest.raises(Interrupted, match="goes on from there"):
        go(folder, numbers=[1, 9, 2])
    assert calls(folder) == ["square-1", "square-9"]
    assert not (folder / "results.json").exists()
    go(folder, numbers=[1, 2, 3])
    assert calls(folder) == ["square-1", "square-2", "square-3", "square-9"]


def test_a_loss_that_is_not_finite_is_a_row_and_other_errors_end_the_study(folder):
    said = []
    go(folder, said=said, numbers=[7, 2])
    failed, good = results(folder)["rows"]
    assert (failed["number"], "not finite" in failed["failed"]) == (7, True)
    assert good["square"] == 4
    assert any("square-7" in line and "failed" in line for line in said)
    with pytest.raises(GlannError, match="there is no data"):
        go(folder, numbers=[8, 1])


def test_the_report_escapes_text_and_loads_nothing(folder):
    page = go(folder).read_text()
    assert "3 squares &lt;b&gt;" in page
    assert "Text &amp; more." in page
    assert "pictures/none.png is missing" in page
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    assert (folder / "report.html").is_file()


def test_a_study_in_two_folders_has_no_id_twice(folder):
    go(folder)
    page = go(folder.with_name("study-squares and more")).read_text()
    found = re.findall(r' id="([^"]*)"', page)
    assert len(found) == len(set(found)) == 4
    assert not any(" " in name for name in found)
    for start in ("href=", "url("):
        used = re.findall(re.escape(start) + '"?#([^")]+)', page)
        assert len(set(used)) == 2
        assert set(used) <= set(found)


def test_a_finding_of_nothing_says_so(folder):
    assert '<p class="result">There are no numbers.</p>' in go(folder, numbers=[7]).read_text()


def test_a_quick_section_gives_way_to_the_other(folder):
    go(folder.with_name("study-squares-quick"), numbers=[1])
    (quick,) = sections_in(folder.parent)
    assert "1 squares" in quick
    go(folder)
    (shown,) = sections_in(folder.parent)
    assert "3 squares" in shown


def test_a_comparison_s_page_ends_with_the_studies_beside_its_run(folder, tmp_path):
    go(folder)
    results = {
        "recipe": "tiny",
        "command": "glann compare tiny",
        "protocol": {"real": "test images", "n": 100},
        "rows": [{"model": "glann", "label": "GLANN", "group": "glann", "seed": 0, "n": 100}],
    }
    sections = sections_in(folder.parent)
    page = write_report(results, tmp_path / "runs" / "tiny" / "compare", sections).read_text()
    assert page.count('id="study-squares"') == 1


# --- settings -----------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A file of settings in the place of the shipped ones."""
    path = tmp_path / "squares.toml"
    path.write_text("# Squares.\nnumbers = [2]\n[quick]\nnumbers = [1]\n")
    monkeypatch.setattr("glann.places.study_recipe", lambda name: path)
    return path


def test_settings_are_those_of_the_file_then_quick_then_overridden(recipe):
    assert load_settings(STUDY) == Squares(numbers=[2])
    assert load_settings(STUDY, quick=True) == Squares(numbers=[1])
    given = load_settings(STUDY, ["numbers=[5, 6]", "offset=2"], quick=True)
    assert given == Squares(numbers=[5, 6], offset=2.0)
    assert to_toml(given) == "numbers = [5, 6]\noffset = 2.0\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("number=[1]", "did you mean 'numbers'"),
        ("numbers=1", "wanted list of int"),
        ("numbers=[10]", "out of range"),
        ("offset=text", "wanted float"),
        ("offset", "wanted KEY=VALUE"),
    ],
)
def test_a_bad_setting_is_named(recipe, override, message):
    with pytest.raises(GlannError, match=message.replace("'", ".")):
        load_settings(STUDY, [override])


@pytest.mark.parametrize("text", ["numbers = ", "nonsense = 1", "[quick]\nnonsense = 1"])
def test_a_bad_file_is_named(recipe, text):
    recipe.write_text(text)
    with pytest.raises(GlannError):
        load_settings(STUDY, quick=True)


@pytest.mark.parametrize("name", STUDIES)
def test_a_shipped_study_can_be_carried_out(name):
    study = find_study(name)
    assert study.name == name
    header = Path(__file__).parents[1] / "pipelines" / "studies" / f"{name}.toml"
    lines = header.read_text().splitlines()
    assert any(f"glann study {name}" in line for line in lines if line.startswith("#"))
    full, quick = (load_settings(study, quick=quick) for quick in (False, True))
    for settings in (full, quick):
        keys = [run.key for run in study.runs(settings)]
        assert keys
        assert len(set(keys)) == len(keys)
        for run in study.runs(settings):
            assert json.loads(json.dumps(run.arguments)) == run.arguments
        if getattr(settings, "recipe", "none") != "none":
            load_recipe(settings.recipe, getattr(settings, "changes", []))
    assert full != quick


# --- command line -------------------------------------------------------------------------------


@pytest.fixture
def shell(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(studies, "find_study", lambda name: STUDY)
    monkeypatch.chdir(tmp_path)
    name = next(iter(STUDIES))
    return lambda *args: CliRunner().invoke(cli.main, ["study", name, *args])


def test_the_command_writes_rows_and_a_report(shell, tmp_path):
    name = next(iter(STUDIES))
    done = shell("--jobs", "1", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "runs/studies.html" in done.output
    assert len(results(tmp_path / "runs" / f"study-{name}")["rows"]) == 1
    done = shell("--quick", "--quiet", "--jobs", "1", "--run", "runs/study-mine")
    assert done.exit_code == 0, done.output
    assert results(tmp_path / "runs" / "study-mine")["rows"][0]["number"] == 1


def test_of_several_studies_the_digits_one_is_not_given_the_others_images(monkeypatch):
    """`glann study blur likelihood --data mnist/`: the digits would refuse the folder."""
    given = {}
    monkeypatch.setattr(
        "glann.studies.work.carry_out",
        lambda study, settings, folder, **how: given.update({study.name: how["data"]}),
    )
    runner = CliRunner()
    args = ["study", "blur", "likelihood", "modes", "--data", "here", "--quiet"]
    done = runner.invoke(cli.main, args)
    assert done.exit_code == 0, done.output
    assert given == {"blur": None, "likelihood": "here", "modes": "here"}
    assert runner.invoke(cli.main, ["study", "blur", "--data", "here", "-q"]).exit_code == 0
    assert given["blur"] == "here"  # and is refused where images are read


def test_a_dry_run_writes_nothing(shell, tmp_path):
    done = shell("--dry-run", "--set", "numbers=[4]")
    assert done.output.splitlines() == ["numbers = [4]", "offset = 0.0", "# runs: square-4"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "number=1"], "did you mean 'numbers'"),
        (["--jobs", "0"], "0 is not in the range"),
        (["--device", "abacus"], "is not on this machine"),
        (["mode"], "Invalid value for 'NAME…'"),
    ],
)
def test_bad_input_is_an_error_and_no_traceback(shell, args, message):
    done = shell(*args)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_ctrl_c_between_processes_stops_them_and_what_is_done_is_kept(folder, monkeypatch):
    def say(text):
        if "square-" in text:  # the first row is written
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="goes on from there"):
        carry_out(STUDY, Squares(), folder, jobs=2, device="cpu", say=say)
    assert len(list((folder / "rows").glob("*.json"))) == 1
    assert multiprocessing.active_children() == []
