"""The rows of a comparison on the disk: what they depend on, and which are kept."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glann import runner, storage
from glann.errors import GlannError
from glann.evaluation.scores import Protocol
from glann.glo import PLACES
from glann.recipes import Recipe
from glann.report import write_report

Row = dict[str, Any]

FORMAT = 2
"""Version of the rows: of their names and of how their numbers come about."""

TOGETHER = {
    "floor": ("floor", "copies"),
    "glann": ("reconstructions", "gaussian", "mixture", "glann"),
}
"""Rows that come and go together, by whose they are."""

EVALUATED = "evaluate"
"""The identity of rows that `glann evaluate` wrote."""


def settings_of(recipe: Recipe, model: str) -> dict[str, Any]:
    """The sections that a model's training depends on, without what is nothing to it."""
    sections = recipe.sections()
    wanted = ("data", "glo", "imle", "finetune") if model == "glann" else ("data", model)
    settings = {key: sections[key] for key in wanted if key in sections}
    if "glo" in settings:
        settings["glo"] = {k: v for k, v in settings["glo"].items() if k not in PLACES}
    return settings


def identity_of(recipe: Recipe, model: str) -> str:
    """What a model's rows depend on besides the protocol: its settings and its seed."""
    if model == "floor":
        return model
    return digest_of({"model": model, "seed": recipe.seed, **settings_of(recipe, model)})


def digest_of(content: object) -> str:
    """A short name of what is in a JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def keys_of(protocol: Protocol) -> list[str]:
    """What rows by this protocol are known by; then what earlier versions called it, if anything.

    These did not say which the test images are.  A classifier does, by its accuracy on them, as
    its weights do of the images that it has learned: only with one their rows are trusted.
    """
    described = protocol.describe()
    keys = [digest_of({"format": FORMAT, **described})]
    if protocol.features.accuracy is not None:
        del described["test_fingerprint"], described["whole_fingerprint"]
        keys.append(digest_of({"format": FORMAT, **described}))
    return keys


def read_results(folder: Path, name: str = "results.json") -> Any:
    """What a folder's results.json holds, None if there is none; GlannError if it isn't ours."""
    path = folder / name
    if folder.exists() and not folder.is_dir():
        raise GlannError(f"{folder} is a file; wanted a folder for the results")
    there = storage.read_json(path) if path.is_file() else None
    try:
        if there is not None:
            (there["protocol"]["key"], [row["identity"] for row in there["rows"]])
    except (KeyError, TypeError) as error:
        raise GlannError(
            f"{path} is not what glann wrote; choose another folder, or move it away"
        ) from error
    return there


class Results:
    """The rows of a comparison, kept in `folder`/results.json; the report follows each change.

    There are none at first: see `resume`.
    """

    def __init__(
        self,
        folder: Path,
        recipe: str,
        settings: dict[str, Any],
        protocol: Protocol,
        command: str,
        budget: str,
    ) -> None:
        self.folder, self.protocol = folder, protocol
        self.rows: list[Row] = []
        self._keys = keys_of(protocol)
        self._about = {
            "recipe": recipe,
            "command": command,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "environment": runner.environment(str(protocol.features.device)),
            "settings": settings,
            "protocol": {**protocol.describe(), "key": self._keys[0], "budget": budget},
        }

    def resume(self) -> None:
        """Go on with the rows that were scored by this protocol.

        Others don't compare with them, but cost work: they are put aside, as results-KEY.json,
        until somebody scores by theirs again.
        """
        there = read_results(self.folder)
        if there is not None and there["protocol"]["key"] not in self._keys:
            storage.write_json(self.folder / f"results-{there['protocol']['key']}.json", there)
            aside = (read_results(self.folder, f"results-{key}.json") for key in self._keys)
            there = next(filter(None, aside), None)
        if there is not None:
            self.rows = there["rows"]

    def of(self, recipe: Recipe, model: str) -> list[Row]:
        """The rows of a model by a recipe, of its seed."""
        identity = identity_of(recipe, model)
        return [row for row in self.rows if row["identity"] == identity]

    def add(self, recipe: Recipe, model: str, rows: list[Row]) -> None:
        """Put a model's rows by a recipe in, of its seed, and write all.

        They take the place of all that came with the model before, of this seed, and of other
        seeds with other settings: a mean over seeds is of one model.
        """
        own = TOGETHER.get(model, (model,))

        def stays(row: Row) -> bool:
            seeded = dataclasses.replace(recipe, seed=row["seed"])
            same = row["identity"] == identity_of(seeded, model)
            return row["model"] not in own or (same and row["seed"] != recipe.seed)

        identity = identity_of(recipe, model)
        self.rows = [*filter(stays, self.rows), *(row | {"identity": identity} for row in rows)]
        self.write()

    def write(self, studies: Sequence[str] = ()) -> None:
        """Write results.json and the report, with sections of studies at its end."""
        content = {**self._about, "rows": self.rows}
        storage.write_json(self.folder / "results.json", content)
        write_report(content, self.folder, studies)
