"""Where things are: shipped recipes and pipelines, run folders, the cache."""

import os
from pathlib import Path

from glann.errors import GlannError
from glann.settings import nearest_name
from glann.storage import holds, is_saved

RUNS = Path("runs")
"""Runs are written to runs/NAME under the current folder."""


RECIPE = "recipe.toml"
"""What a run keeps the recipe in that it goes by."""


def cache_folder() -> Path:
    """Where is kept what can be made again: $GLANN_CACHE, or glann in the user's cache folder."""
    given, base = os.environ.get("GLANN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    # os.path's: Path.expanduser raises where there is no home.
    return Path(os.path.expanduser(given or os.path.join(base or "~/.cache", "glann")))


def shipped() -> Path:
    """The folder of shipped recipes and pipelines: inside an installed package, or the checkout."""
    package = Path(__file__).parent
    inside = package / "pipelines"
    return inside if inside.is_dir() else package.parent / "pipelines"


def shipped_recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted(shipped().glob("*.toml"))}


def study_recipe(name: str) -> Path:
    """The file of a study's settings."""
    return shipped() / "studies" / f"{name}.toml"


def shipped_pipelines() -> dict[str, Path]:
    """Shipped trained pipelines by name."""
    return {path.name: path for path in sorted(shipped().glob("*")) if is_saved(path)}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given by path, of a shipped one by name, or of a run by its folder."""
    path = Path(name)
    if str(name) not in shipped_recipes() and (path / RECIPE).is_file():
        return path / RECIPE
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise GlannError(f"there is no recipe file {path}")
        return path
    recipes = shipped_recipes()
    if path.is_dir() and str(name) not in recipes:
        raise GlannError(
            f"{path} is a folder, and no run's: it has no {RECIPE}. To learn from images in it: "
            f"`glann train folder --data {path}`"
        )
    if str(name) not in recipes:
        raise GlannError(
            f"there is no recipe '{name}'; {nearest_name(str(name), recipes)} (`glann recipes` "
            "lists them; a file of your own is given by its path, ending in .toml, and a run that "
            "is to go on by its folder)"
        )
    return recipes[str(name)]


def run_of(name: str | Path) -> Path:
    """Where a recipe is trained if nothing else is said: in the run that it is of, or runs/NAME."""
    path = find_recipe(name)
    if path.name == RECIPE and (path.parent / "environment.json").is_file():
        return path.parent
    return RUNS / path.stem


def find_pipeline(target: str | Path) -> Path:
    """The folder of a saved pipeline: a pipeline's, a run's, or a shipped one by name."""
    path = Path(target)
    saved = [folder for folder in (path, path / "pipeline") if is_saved(folder)]
    if saved:  # a baseline's folder holds its training too
        return next((folder for folder in saved if holds(folder, "pipeline")), saved[0])
    pipelines = shipped_pipelines()
    if str(target) in pipelines:
        return pipelines[str(target)]
    if path.is_dir():
        raise GlannError(
            f"{path} holds no saved pipeline (no manifest.json in it or in {path / 'pipeline'}); "
            "train both stages first: `glann train RECIPE`"
        )
    trained = is_saved(RUNS / path / "pipeline")
    hint = (
        f"did you mean your run {RUNS / path}?"
        if trained
        else f"wanted a folder with a saved pipeline or a run, or a shipped one: "
        f"{', '.join(pipelines) or 'none is installed'}"
    )
    raise GlannError(f"there is no pipeline '{target}'; {hint}")
