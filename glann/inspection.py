"""What a folder holds, told from its manifests alone: no torch, no weights."""

import json
from pathlib import Path
from typing import Any

from glann.errors import GlannError
from glann.places import find_pipeline
from glann.storage import is_saved, read_json, read_manifest

Rows = list[tuple[str, str]]


def describe(target: str | Path) -> Rows:
    """Rows (name, value) about a run, a pipeline (folder or shipped name) or a mapper."""
    folder = Path(target)
    try:
        if (folder / "recipe.toml").is_file():
            if (folder / "rows").is_dir():
                raise GlannError(f"{folder} is a study's: look at {folder / 'report.html'}")
            return _run(folder)
        if (folder / "pipeline").is_dir() and is_saved(folder):
            return [("training", _progress(folder)), *_pipeline(folder / "pipeline")]
        if is_saved(folder) and read_manifest(folder)["glann"] != "pipeline":
            return _other(folder)
        return _pipeline(find_pipeline(target))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise GlannError(f"what {target} says of itself is damaged: {error!r}") from error


def _run(folder: Path) -> Rows:
    rows = [("run", str(folder))]
    if (folder / "data.json").is_file():
        data = read_json(folder / "data.json")
        n, *shape = data["shape"]
        rows.append(("images", f"{n:,} of {_by(shape)}, {data['source']} from {data['place']}"))
    rows.append(("stage one", _progress(folder / "glo")))
    stage_two = _progress(folder / "imle")
    if is_saved(folder / "pipeline"):
        # A Gaussian or a mixture has no training to keep.
        stage_two = stage_two if (folder / "imle").is_dir() else "done"
    rows.append(("stage two", stage_two))
    if (folder / "finetune").is_dir():
        rows.append(("fine-tuning", _progress(folder / "finetune")))
    if is_saved(folder / "pipeline"):
        rows += _pipeline(folder / "pipeline")
    else:
        rows.append(("pipeline", "not saved yet"))
    for baseline in sorted((folder / "baselines").glob("*/")):
        rows.append((baseline.name, _progress(baseline)))
    pictures = sorted(folder.glob("*.png")) + sorted(folder.glob("*/*.png"))[-1:]
    rows += [("picture", str(path)) for path in pictures]
    return rows


def _progress(stage: Path) -> str:
    if not is_saved(stage):
        return "not begun" if not stage.is_dir() else "begun, no checkpoint yet"
    manifest = read_manifest(stage)
    state = "done" if manifest["done"] else f"stopped at {manifest['step'] / manifest['steps']:.0%}"
    loss = _last_loss(stage / "log.jsonl")
    return f"{state}, {manifest['seconds']:.0f} s of training" + (
        f", loss {loss:.4f}" if loss is not None else ""
    )


def _last_loss(log: Path) -> float | None:
    try:
        return float(json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["loss"])
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return None


def _pipeline(folder: Path) -> Rows:
    manifest = read_manifest(folder, "pipeline")
    info = manifest["info"]
    generator = manifest["generator"]
    rows = [
        ("pipeline", str(folder)),
        ("makes", f"images of {_by(manifest['image_shape'])} (channels × height × width)"),
        ("generator", _settings(generator, skip=("image_shape",))),
        ("code sampler", manifest["sampler"]["name"]),
        ("  settings", _settings(manifest["sampler"]["settings"])),
    ]
    if "model" in info:
        rows.append(("model", info["model"]))
        rows.append(("  settings", _settings(info["settings"])))
    elif "recipe" in info:
        recipe = info["recipe"]
        rows.append(("recipe", f"{recipe['name']}, seed {recipe['seed']}"))
        rows.append(("  glo", _settings(recipe["glo"])))
        if "finetune" in recipe:
            rows.append(("  finetune", _settings(recipe["finetune"])))
    if "data" in info:
        data = info["data"]
        rows.append(("trained on", f"{data['shape'][0]:,} images of {data['source']}"))
        rows.append(("  fingerprint", data["fingerprint"]))
    if "seconds" in info:
        rows.append(("training", _settings({k: f"{v:.0f} s" for k, v in info["seconds"].items()})))
    rows += [
        ("codes", "saved too" if "codes" in manifest["files"] else "not saved"),
        ("files", _sizes(manifest)),
        ("versions", _settings(manifest["versions"])),
    ]
    return rows


def _other(folder: Path) -> Rows:
    manifest = read_manifest(folder)
    rows = [(str(manifest["glann"]), str(folder)), ("files", _sizes(manifest))]
    if "steps" in manifest:
        rows.append(("training", _progress(folder)))
    if "sampler" in manifest:
        rows.append(("code sampler", str(manifest["sampler"].get("name"))))
        rows.append(("  settings", _settings(manifest["sampler"].get("settings", {}))))
    return rows


def _by(shape: list[int]) -> str:
    return "×".join(str(side) for side in shape)


def _settings(values: dict[str, Any], skip: tuple[str, ...] = ()) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if key not in skip)


def _sizes(manifest: dict[str, Any]) -> str:
    return ", ".join(f"{e['file']} ({e['bytes'] / 1e6:.2f} MB)" for e in manifest["files"].values())
