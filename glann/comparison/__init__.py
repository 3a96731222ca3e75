"""Every image sampler under equal conditions: same images, same seeds, same scores.

runs/NAME/
glo/  imle/  pipeline/  baselines/          the recipe's own seed; seeds/S/ the same for a seed S
compare/results.json                        a row for each model and seed, written as they come
compare/results-KEY.json                    those by another protocol, until it comes again
compare/results.csv  results.md  report.html  samples/  closest/
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy  # noqa: F401  # torch would swallow a Ctrl-C while it imports it
import torch

from glann import runner, storage
from glann.baselines import MODELS
from glann.comparison.budgets import with_budget
from glann.comparison.results import EVALUATED, Results, Row, digest_of, read_results
from glann.data import Data, Images, load, read_images
from glann.density import Gaussian
from glann.errors import GlannError, NotFinite
from glann.evaluation.features import make_features
from glann.evaluation.scores import FEWEST, Protocol
from glann.images import save_grid
from glann.imle import IMLE
from glann.pipeline import GLANN, sampler_name
from glann.recipes import Recipe
from glann.report.studies import sections_in
from glann.storage import fingerprint
from glann.training import SNAPSHOT, read_snapshots

Say = Callable[[str], object]

SAMPLE_SEED = 0
"""Of the samples that are scored and shown, the same for every model and every training seed."""

SHOWN = 64
"""Samples in a picture."""

LABELS = {
    "floor": "training images (the floor)",
    "copies": "copies of training images",
    "reconstructions": "reconstructions (stage one)",
    "gaussian": "one Gaussian on the codes",
    "mixture": "a mixture on the codes",
    "glann": "GLANN",
    "mm-gan": "minimax GAN",
    "ns-gan": "non-saturating GAN",
    "ls-gan": "least-squares GAN",
    "wgan": "WGAN, clipped",
    "wgan-gp": "WGAN-GP",
    "dragan": "DRAGAN",
    "began": "BEGAN",
    "sn-gan": "SN-GAN, hinge",
    "r3gan": "R3GAN's loss",
    "vae": "VAE",
    "pixel-imle": "IMLE on pixels",
    "fake": "the images given",
}
"""What people call a row's model."""


def compare(
    recipe: Recipe,
    folder: Path,
    *,
    command: str,
    data: str | None = None,
    device: str = "auto",
    progress: bool = True,
    restart: bool = False,
    budget_seconds: float | None = None,
    weights: str | None = None,
    say: Say = lambda text: None,
) -> Path:
    """Train what is missing, score everything, write the report; returns its path.

    Rows that are in results.json already, of the same settings, images and features, are kept, so
    that the same call goes on where it was stopped, and models and seeds can be added.  Those of
    other models are kept, too; those of other settings until the model has new ones.

    Args:
        recipe: what to compare, in its [compare] section, and how each model is trained.
        folder: the run folder.
        command: what the user typed, for the report.
        data: where the images are, if not where the recipe says, this run had them before, or the
            defaults say.
        device: "auto", "cpu", "cuda", …
        progress: show progress on standard error.
        restart: score all anew; what was scored is deleted, and what was trained stays.
        budget_seconds: train each model for about so long, instead of the recipe's lengths.
        weights: file with Inception's weights, for those features.
        say: called with a line of news for the user.
    """
    data = data or runner.known_place(recipe, folder)
    train, test = load(recipe.data, data), load_test(recipe.data, data)
    whole = load_whole(recipe.data, data)
    with storage.alone(folder, "compare"):
        if restart:
            for path in (folder / "compare").glob("*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif not path.name.startswith("lengths-"):  # those are of what was trained
                    path.unlink()
        kind, samples = recipe.compare.features, recipe.compare.samples
        protocol = make_protocol(train, test, whole, kind, samples, device, progress, weights, say)
        budget = "fixed in images seen, as the recipe says"
        if budget_seconds is not None:
            lengths = folder / "compare"
            recipe = with_budget(recipe, budget_seconds, lengths, protocol.train, device, say)
            budget = f"about {budget_seconds:g} s of training for each model"
        how: dict[str, Any] = {"data": data, "device": device, "progress": progress, "say": say}
        settings = recipe.sections()
        results = Results(folder / "compare", recipe.name, settings, protocol, command, budget)
        results.resume()
        if not results.of(recipe, "floor"):
            results.add(recipe, "floor", real_rows(protocol, results.folder))
        for seed in range(recipe.seed, recipe.seed + recipe.compare.seeds):
            seeded = dataclasses.replace(recipe, seed=seed)
            run = folder if seed == recipe.seed else folder / "seeds" / str(seed)
            for model in ("glann", *recipe.compare.models):
                if not _up_to_date(results.of(seeded, model), model, run):
                    results.add(seeded, model, _trained_rows(seeded, model, run, results, how))
                for row in results.of(seeded, model):
                    say(sentence(row))
        results.write(sections_in(folder.parent))
    return results.folder / "report.html"


def make_protocol(
    train: Images,
    test: Images | None,
    whole: Images | None,
    kind: str,
    samples: int,
    device: str,
    progress: bool,
    weights: str | None,
    say: Say,
) -> Protocol:
    """The protocol of these images, with features of a kind; says what they are.

    `whole` are all training images, where `train` are only some of them.
    """
    features = make_features(
        kind,
        train=train if whole is None else whole,
        test=test,
        device=device,
        weights=weights,
        progress=progress,
        say=say,
    )
    accuracy = "" if features.accuracy is None else f", accuracy {features.accuracy:.2%}"
    say(f"features  {features.name}, {features.dim} numbers{accuracy}")
    return Protocol(train, test, features, samples, whole)


def evaluate(
    target: str | None,
    *,
    real: Path | None = None,
    fake: Path | None = None,
    size: int | None = None,
    data: str | None = None,
    folder: Path | None = None,
    samples: int = 10_000,
    features: str = "auto",
    weights: str | None = None,
    device: str = "auto",
    progress: bool = True,
    command: str = "",
    say: Say = lambda text: None,
) -> list[Row]:
    """Score a pipeline, or anybody's images, with the floor beside it: one row each.

    Args:
        target: a saved pipeline, or None for the images of `fake`.
        real: an image folder or array to score against instead of the pipeline's own test images.
        fake: an image folder or array.
        size: of these, scaled and cropped to squares; None: as they are.  The real ones follow.
        data: where the pipeline's images are, if not where they were in training, or where its
            recipe or the defaults say.
        folder: where results.json, pictures and the report go; None writes nothing.
        samples: samples and real images in a score, at the most.
        features: kind of features, as in `make_features`.
        weights: file with Inception's weights, for those features.
        device: "auto", "cpu", "cuda", …
        progress: show progress on standard error.
        command: what the user typed, for the report.
        say: called with a line of news for the user.
    """
    pipeline = given = None
    if folder is not None:
        _refuse_comparison(folder)
    if target is not None:
        pipeline = GLANN.load(target, device)
        shape = pipeline.image_shape
    else:
        assert fake is not None
        given = read_images(fake, size=size)
        shape = (int(given.shape[1]), int(given.shape[2]), int(given.shape[3]))
    if real is not None:
        found = read_images(real, size=shape[1:], channels=shape[0])
        if len(found) < 2 * FEWEST:
            raise GlannError(
                f"--real {real} has {len(found)} images; wanted at least {2 * FEWEST}: one half is "
                "to score against, the other for the floor"
            )
        say(f"images    scored at {shape[1]}×{shape[2]}, against half of the real ones")
        train = Images(found, None, "array", fingerprint(found), str(real), ())
        test = whole = None
    else:
        assert pipeline is not None
        assert target is not None
        data = data or runner.place_of(target)
        train, section = runner.training_images(pipeline, data), runner.data_of(pipeline)
        test, whole = load_test(section, data), load_whole(section, data)
        if test is None:
            say(
                "note      there are no test images: scores are against half of the training "
                "images, by which copies are best. Hold some out before training "
                "(--set data.test_fraction=0.2)"
            )
    if given is not None:  # no more real images than there are others to score
        samples = min(samples, len(given))
    protocol = make_protocol(train, test, whole, features, samples, device, progress, weights, say)
    rows = real_rows(protocol, folder)
    if pipeline is not None:
        model = pipeline.info.get("model", "glann")
        seed = pipeline.info.get("settings", pipeline.info.get("recipe", {})).get("seed", 0)
        # Its reconstructions are of its own training images, not of others.
        place = target if real is None else None
        rows += pipeline_rows(pipeline, seed, protocol, folder, model, place)
    else:
        assert given is not None
        rows.append(_scored(_row("fake", 0, protocol), given, protocol, folder))
    if folder is not None:
        results = Results(folder, train.source, {}, protocol, command, "")
        results.rows = [row | {"identity": EVALUATED} for row in rows]
        results.write()
    return rows


def _refuse_comparison(folder: Path) -> None:
    """GlannError if a folder's rows are not `evaluate`'s, which it would throw away."""
    there = read_results(folder) or {"rows": []}
    if any(row["identity"] != EVALUATED for row in there["rows"]):
        raise GlannError(
            f"{folder} holds the rows of a comparison, whose place these would take; choose "
            "another folder"
        )


def load_test(data: Data, path: str | None = None) -> Images | None:
    """The test images that belong to `data`; None if its source has none and none are held out."""
    try:
        return load(data, path, "test")
    except GlannError as error:
        if "has no test images" in str(error):
            return None
        raise


def load_whole(data: Data, path: str | None = None) -> Images | None:
    """All training images, where models learn from only some of them (`data.train_limit`)."""
    if data.train_limit is None:
        return None
    return load(dataclasses.replace(data, train_limit=None), path)


# ---------------------------------------------------------------------- rows


def real_rows(protocol: Protocol, folder: Path | None = None) -> list[Row]:
    """The rows of real images: the floor's draws, and what copying would give of few images."""
    rows = []
    for draw, scores in enumerate(protocol.floors()):
        row = _row("floor", draw, protocol) | scores
        if folder is not None and draw == 0:
            row |= _pictures(row, folder, protocol.whole.images[protocol.draws[0][:SHOWN]])
        rows.append(row)
    if protocol.few:
        copies = protocol.train.images[protocol.rows]
        rows.append(_scored(_row("copies", 0, protocol), copies, protocol, folder))
    return rows


def pipeline_rows(
    pipeline: GLANN,
    seed: int,
    protocol: Protocol,
    folder: Path | None = None,
    model: str = "glann",
    place: str | Path | None = None,
) -> list[Row]:
    """The rows of a pipeline; before GLANN's, if stage one is at hand, what that is good for.

    Reconstructions show what stage one loses, one Gaussian and a mixture on the same codes what
    stage two has to beat.  `place` is where the pipeline lies with its run: there stage one is.
    """
    rows = []
    stage_one = None if place is None else runner.stage_one_of(place)
    if place is not None and stage_one is not None:
        assert stage_one.codes is not None
        stage_one.to(str(pipeline.device))
        fitted = runner.mixture_of(place, stage_one.codes, seed)
        mixture = GLANN(stage_one.generator, fitted).to(str(pipeline.device))
        references = {
            "reconstructions": stage_one.reconstruct(protocol.rows),
            "gaussian": stage_one.sample(protocol.n, SAMPLE_SEED),
            "mixture": mixture.sample(protocol.n, SAMPLE_SEED),
        }
        for name, images in references.items():
            rows.append(_scored(_row(name, seed, protocol), images, protocol, folder))
    row = _row(model, seed, protocol) | {"parameters": _parameters(pipeline)}
    if model == "glann" and sampler_name(pipeline.sampler) != "imle":
        row["label"] += f" with a {sampler_name(pipeline.sampler)}"
    samples = pipeline.sample(protocol.n, SAMPLE_SEED)
    return [*rows, _scored(row, samples, protocol, folder)]


def sentence(row: Row) -> str:
    """A row in one line."""
    start = f"{row['label']:28} seed {row['seed']}  "
    if "failed" in row:
        return start + f"failed: {row['failed']}"
    return start + (
        f"FID {row['fid']:8.2f} = {row['fid_over_floor']:7.2f} × floor   "
        f"precision {row['precision']:.3f}  recall {row['recall']:.3f}"
    )


def _row(model: str, seed: int, protocol: Protocol) -> Row:
    group = {"glann": "glann", "fake": "glann"} | dict.fromkeys(MODELS, "baseline")
    others = model == "floor" and (protocol.few or protocol.split == "train")
    return {
        "model": model,
        "label": "other real images (the floor)" if others else LABELS[model],
        "group": group.get(model, "reference"),
        "seed": seed,
        "n": protocol.n,
        "split": protocol.split,
        "features": protocol.features.name,
        "accuracy": protocol.features.accuracy,
    }


def _scored(row: Row, images: torch.Tensor, protocol: Protocol, folder: Path | None) -> Row:
    row = row | protocol.score(images)
    closest = None
    if protocol.split == "test":
        row["memorisation"], closest = protocol.memorisation(images)
    return row if folder is None else row | _pictures(row, folder, images, closest)


def _pictures(
    row: Row, folder: Path, images: torch.Tensor, closest: torch.Tensor | None = None
) -> dict[str, str]:
    name = f"{row['model']}-{row['seed']}.png"
    save_grid(images[:SHOWN], folder / "samples" / name, columns=8)
    if closest is None:
        return {"samples": f"samples/{name}"}
    near = f"closest/{row['features']}/{name}"  # other features find others
    save_grid(closest, folder / near, columns=8)
    return {"samples": f"samples/{name}", "closest": near}


def _parameters(pipeline: GLANN) -> int:
    """Numbers in what has to be kept to sample."""
    tensors: list[torch.Tensor] = [*pipeline.generator.parameters()]
    if isinstance(pipeline.sampler, IMLE):
        tensors += [*pipeline.sampler.mapper_.parameters(), *pipeline.sampler.details_]
    elif not isinstance(pipeline.sampler, Gaussian):
        tensors += pipeline.sampler.state()[1].values()
    return sum(tensor.numel() for tensor in tensors)


def _trained_rows(
    recipe: Recipe, model: str, run: Path, results: Results, how: dict[str, Any]
) -> list[Row]:
    """Train a model if it isn't yet, and score it."""
    protocol = results.protocol
    try:
        if model == "glann":
            pipeline = runner.trained(recipe, run, **how)
            parts = [run / "glo", run / "imle"]
            parts += [] if recipe.finetune is None else [run / "finetune"]
        else:
            pipeline = runner.train_baseline(recipe, model, run, **how)
            parts = [run / "baselines" / model]
    except NotFinite as error:
        return [_row(model, recipe.seed, protocol) | {"failed": str(error)}]
    place = run if model == "glann" else None
    rows = pipeline_rows(pipeline, recipe.seed, protocol, results.folder, model, place)
    curve = _curve(pipeline, parts, protocol)
    rows[-1] |= _effort(parts) | {"curve": curve, "curve_samples": SNAPSHOT}
    if model == "glann":
        rows[-1]["pipeline"] = _saved(run)
    return rows


def _up_to_date(rows: list[Row], model: str, run: Path) -> bool:
    """Whether there are rows, of what is in the run now if it still has anything.

    The same training may be saved anew with fewer details, or in half precision.
    """
    now = _saved(run) if model == "glann" else None
    return bool(rows) and (now is None or now == rows[-1].get("pipeline"))


def _saved(run: Path) -> str | None:
    """A short name of what is in the files of a run's pipeline; None if there is none."""
    if not storage.is_saved(run / "pipeline"):
        return None
    files = storage.read_manifest(run / "pipeline", "pipeline")["files"]
    return digest_of({part: files[part]["sha256"] for part in ("generator", "sampler")})


def _effort(parts: Iterable[Path]) -> dict[str, Any]:
    """What training took, from its manifests."""
    found = {part.name: storage.read_manifest(part) for part in parts if storage.is_saved(part)}
    codes = {"codes_seen": found["imle"]["items"]} if "imle" in found else {}
    return {
        "steps": sum(manifest["steps"] for manifest in found.values()),
        "seconds": sum(manifest["seconds"] for manifest in found.values()),
        "cpu_seconds": sum(manifest["cpu_seconds"] for manifest in found.values()),
        "images_seen": sum(manifest["items"] for name, manifest in found.items() if name != "imle"),
        **codes,
    }


def _curve(pipeline: GLANN, parts: list[Path], protocol: Protocol) -> list[dict[str, float]]:
    """The FID against seconds of training: of the snapshots that stage two or a baseline left.

    `parts` are (glo, imle), (glo, imle, finetune) or a baseline's.
    """
    *earlier, part = parts[:2]
    seconds = sum(storage.read_manifest(stage)["seconds"] for stage in earlier)
    tuned, generate = parts[2:], pipeline.generate
    if tuned:  # the generator that there was at the time
        stage_one = runner.stage_one_of(part.parent)
        assert stage_one is not None
        generate = stage_one.to(str(pipeline.device)).generate
    points = []
    for shot in read_snapshots(part):
        images = shot.samples if shot.samples.ndim == 4 else generate(shot.samples)
        points.append({"seconds": seconds + shot.seconds, "fid": protocol.distance(images)})
    if tuned and points:
        fid = protocol.distance(pipeline.generate(shot.samples))
        seconds = sum(storage.read_manifest(stage)["seconds"] for stage in parts)
        points.append({"seconds": seconds, "fid": fid})
    return points
