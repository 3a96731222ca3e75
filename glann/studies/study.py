"""What a study is: a claim, settings, the runs that test it, and what a report shows of them."""

import dataclasses
import hashlib
import json
import statistics
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glann import places
from glann.baselines import MODELS
from glann.errors import GlannError
from glann.glo import PLACES
from glann.recipes import Compare, Recipe, load_recipe, parse_override, section, toml_value
from glann.report.studies import Section
from glann.settings import as_dict

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a run works, and with what."""

    folder: Path
    """The study's: pictures of a run go to `pictures/` in there, their names begin with its key."""
    runs: Path
    """The folder of all runs: what `glann train` and `glann compare` trained is there."""
    data: str | None = None
    """Where the images are, if not where a recipe or the defaults say."""
    device: str = "cpu"
    key: str = ""
    """The run's."""

    def training(self, what: Any) -> Path:
        """Where the run may keep checkpoints: one that was stopped goes on there.

        `what` is trained, as JSON: something else is another training, in another folder.
        """
        return self.folder / "training" / self.key / _digest([what, self.data])


@dataclass(frozen=True)
class Run:
    """One piece of a study: a call `function(place, **arguments)`, which gives a row or several.

    `NotFinite` makes a row with "failed".
    """

    key: str
    """Its name, and its row's file's: ring-imle-0."""
    function: Callable[..., Row | list[Row]]
    """Of a module, so that another process finds it; the row is JSON."""
    arguments: dict[str, Any]
    """JSON: a row belongs to them, and is made anew when they change."""

    def digest(self, study: "Study", data: str | None) -> str:
        """What a row belongs to, as 16 letters.

        Of a recipe it is what it says now: a file may be another tomorrow under the same name.
        """
        name = f"{self.function.__module__}.{self.function.__qualname__}"
        content = [study.version, name, self.arguments, data]
        if "recipe" in self.arguments:
            changes = self.arguments.get("changes", [])
            recipe = load_recipe(self.arguments["recipe"], changes)
            content.append(settings_of(recipe, _named(self.arguments)))
        return _digest(content)


@dataclass(frozen=True)
class Study:
    """A claim as an experiment."""

    name: str
    claim: str
    """In one sentence."""
    settings: type[Any]
    """A dataclass of `glann.settings.setting`s; pipelines/studies/NAME.toml has their values."""
    runs: Callable[[Any], list[Run]]
    """The runs that settings ask for, each with its own key."""
    section: Callable[[Any, Sequence[Row], Path], Section]
    """What the report shows of settings and rows; pictures are in the folder.

    A row has "key", its run's arguments and what the run gave, or "failed" instead.
    """
    version: int = 1
    """Raised when rows come about in another way: old ones are then made anew."""


def _named(arguments: dict[str, Any]) -> set[Any]:
    """The values of arguments, and those in lists: names of models are among them."""
    lists = (value if isinstance(value, list) else [value] for value in arguments.values())
    return {value for values in lists for value in values}


def settings_of(recipe: Recipe, models: Collection[Any]) -> dict[str, Any]:
    """What a recipe says of some models: of the baselines among them, or of GLANN if none is."""
    baselines = [name for name in MODELS if name in models]
    parts = ("seed", "data", *(baselines or ("glo", "imle", "finetune")))
    # Those that are compared are written out, with all defaults.
    sections = dataclasses.replace(recipe, compare=Compare(models=baselines)).sections()
    found = {name: sections[name] for name in parts if name in sections}
    if "glo" in found:  # where its files are is nothing to what is learned
        found["glo"] = {key: value for key, value in found["glo"].items() if key not in PLACES}
    return found


def _digest(content: Any) -> str:
    """JSON as 16 letters."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def load_settings(study: Study, overrides: Sequence[str] = (), quick: bool = False) -> Any:
    """The settings of a study's recipe, with its table [quick] if asked, and with `overrides`.

    `overrides` are texts `key=value`, the value as in TOML; text needs no quotes.

    Raises:
        GlannError: an unknown key, a wrong type, a value out of range.
    """
    path = places.study_recipe(study.name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GlannError(f"{path} can't be read as a study's settings: {error}") from error
    quickly = content.pop("quick", {})
    if quick:
        content |= quickly
    for override in overrides:
        field = dataclasses.fields(study.settings)[0].name
        key, value = parse_override(override, f"KEY=VALUE, such as {field}=…")
        content[key] = value
    return section("", study.settings, content)


def looks_for_images(settings: Any) -> bool:
    """Whether a study's images are in files: the digits come with scikit-learn, and some have none.

    Raises:
        GlannError: there is no such recipe, or it is wrong.
    """
    recipe = getattr(settings, "recipe", "none")
    return recipe != "none" and load_recipe(recipe).data.source != "digits"


def to_toml(settings: Any) -> str:
    """The settings, every default written out."""
    known = {key: value for key, value in as_dict(settings).items() if value is not None}
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in known.items())


def failures(rows: Sequence[Row], label: Callable[[Row], str]) -> str:
    """How many runs failed, of those that have a label: a sentence for the end of a table's note.

    Nothing if none did.
    """
    runs = Counter(map(label, rows))
    failed = Counter(label(row) for row in rows if "failed" in row)
    listed = ", ".join(f"{name} {number} of {runs[name]}" for name, number in failed.items())
    return listed and f" Runs that were not finite and are left out: {listed}."


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation of a model's runs; a dash for nothing."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
