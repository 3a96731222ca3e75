"""The rows of a comparison on the disk: what they depend on, and which are kept."""

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


def identity_of(recipe: Recipe, model: str) -> str:
    """What a model's rows depend on besides the protocol: its settings and its seed."""
    sections = recipe.sections()
    wanted = ("data", "glo", "imle", "finetune") if model == "glann" else ("data", model)
    settings = {key: sections[key] for key in wanted if key in sections}
    if "glo" in settings:
        settings["glo"] = {k: v for k, v in settings["glo"].items() if k not in PLACES}
    return digest_of({"model": model, "seed": recipe.seed, **settings})


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


def read_results(folder: Path) -> Any:
    """What a folder's results.json holds, None if there is none; GlannError if it isn't ours."""
    path = folder / "results.json"
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
    """The rows of a comparison, kept in `folder`/results.json; the report follows each change."""

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
        keys = keys_of(protocol)
        self._content: dict[str, Any] = {
            "recipe": recipe,
            "command": command,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "environment": runner.environment(str(protocol.features.device)),
            "settings": settings,
            "protocol": {**protocol.describe(), "key": keys[0], "budget": budget},
            "rows": [],
        }
        path = folder / "results.json"
        if path.is_file():
            there = read_results(folder)
            if there["protocol"]["key"] in keys:
                self._content["rows"] = there["rows"]
            else:  # numbers of other images or features don't compare with these, but cost work
                storage.write_json(folder / f"results-{there['protocol']['key']}.json", there)

    def of(self, identity: str) -> list[Row]:
        """The rows of one model with one seed."""
        return [row for row in self._content["rows"] if row["identity"] == identity]

    def has(self, identity: str) -> bool:
        """Whether there are any."""
        return bool(self.of(identity))

    def add(self, identity: str, rows: list[Row]) -> None:
        """Put rows in, in the place of older ones of these models and seeds, and write all."""
        marked = [row | {"identity": identity} for row in rows]
        replaced = {(row["model"], row["seed"]) for row in marked}
        kept = [r for r in self._content["rows"] if (r["model"], r["seed"]) not in replaced]
        self._content["rows"] = [*kept, *marked]
        self.write()

    def write(self, studies: Sequence[str] = ()) -> None:
        """Write results.json and the report, with sections of studies at its end."""
        storage.write_json(self.folder / "results.json", self._content)
        write_report(self._content, self.folder, studies)
