from pathlib import Path

import pytest
import torch

from glann import places, storage
from glann.errors import GlannError
from glann.places import find_pipeline, find_recipe, shipped_pipelines, shipped_recipes

WEIGHTS = {"weights": {"w": torch.ones(2)}}


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shipped: recipes digits and mnist, pipeline digits.  The current folder is another one."""
    folder = tmp_path / "installed" / "pipelines"
    folder.mkdir(parents=True)
    for name in ("mnist", "digits"):
        (folder / f"{name}.toml").write_text("seed = 1\n")
    storage.save(folder / "digits", "pipeline", {}, WEIGHTS)
    (folder / "results").mkdir()
    (folder / "README.md").write_text("# Pipelines\n")
    monkeypatch.setattr(places, "shipped", lambda: folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


# ---------------------------------------------------------------------- what ships


def test_recipes_and_pipelines_are_told_apart(shipped):
    assert shipped_recipes() == {n: shipped / f"{n}.toml" for n in ("digits", "mnist")}
    assert list(shipped_recipes()) == ["digits", "mnist"]
    assert shipped_pipelines() == {"digits": shipped / "digits"}


def test_nothing_that_ships_is_not_an_error(shipped, monkeypatch):
    monkeypatch.setattr(places, "shipped", lambda: shipped / "none")
    assert shipped_recipes() == {}
    assert shipped_pipelines() == {}
    with pytest.raises(GlannError, match=r"there is no recipe 'digits'"):
        find_recipe("digits")
    with pytest.raises(GlannError, match="none is installed"):
        find_pipeline("digits")


def test_an_installed_package_has_its_own(tmp_path, monkeypatch):
    monkeypatch.undo()
    checkout = Path(places.__file__).parents[1] / "pipelines"
    assert places.shipped().samefile(checkout)
    package = tmp_path / "site-packages" / "glann"
    (package / "pipelines").mkdir(parents=True)
    monkeypatch.setattr(places, "__file__", str(package / "places.py"))
    assert places.shipped() == package / "pipelines"


# ---------------------------------------------------------------------- recipes


def test_a_recipe_is_found_by_name_or_path(shipped):
    assert find_recipe("digits") == shipped / "digits.toml"
    assert find_recipe(shipped / "mnist.toml") == shipped / "mnist.toml"
    Path("mine.toml").write_text("seed = 2\n")
    assert find_recipe("mine.toml") == Path("mine.toml")
    Path("recipe").write_text("seed = 2\n")
    assert find_recipe("recipe") == Path("recipe")
    Path("digits").mkdir()  # a folder is no recipe and hides none
    assert find_recipe("digits") == shipped / "digits.toml"


def test_a_recipe_that_is_not_there():
    with pytest.raises(GlannError, match=r"there is no recipe 'digit'; did you mean 'digits'\?"):
        find_recipe("digit")
    with pytest.raises(GlannError, match="there is no recipe 'xyz'; valid: digits, mnist "):
        find_recipe("xyz")
    with pytest.raises(GlannError, match=r"there is no recipe file digits\.toml"):
        find_recipe("digits.toml")
    Path("photos").mkdir()
    with pytest.raises(GlannError, match="`glann train folder --data photos`"):
        find_recipe("photos")
    Path("folder.toml").mkdir()
    with pytest.raises(GlannError, match=r"there is no recipe file folder\.toml"):
        find_recipe("folder.toml")


# ---------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("kind", [str, Path])
def test_a_pipeline_is_found_by_its_folder_its_run_or_its_name(kind, shipped):
    storage.save(Path("runs/mine/pipeline"), "pipeline", {}, WEIGHTS)
    wanted = Path("runs/mine/pipeline")
    assert find_pipeline(kind("runs/mine")) == wanted
    assert find_pipeline(kind("runs/mine/pipeline")) == wanted
    assert find_pipeline(kind("digits")) == shipped / "digits"
    assert find_pipeline(kind(wanted.absolute())) == wanted.absolute()


def test_a_pipeline_here_comes_before_a_shipped_one():
    storage.save(Path("digits"), "pipeline", {}, WEIGHTS)
    assert find_pipeline("digits") == Path("digits")


def test_a_folder_without_a_pipeline_does_not_hide_a_shipped_one(shipped):
    Path("digits").mkdir()
    assert find_pipeline("digits") == shipped / "digits"


def test_a_run_without_a_pipeline():
    storage.save(Path("runs/mine/glo"), "glo", {}, WEIGHTS)
    with pytest.raises(GlannError, match=r"runs/mine holds no saved pipeline .* `glann train"):
        find_pipeline("runs/mine")


def test_a_runs_bare_name_is_recognised():
    storage.save(Path("runs/mine/pipeline"), "pipeline", {}, WEIGHTS)
    with pytest.raises(GlannError, match=r"no pipeline 'mine'; did you mean your run runs/mine\?"):
        find_pipeline("mine")


def test_a_pipeline_that_is_not_there():
    with pytest.raises(GlannError, match=r"there is no pipeline 'digit'; .* shipped one: digits"):
        find_pipeline("digit")
