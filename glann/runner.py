"""Carries out a recipe's stages in a run folder.  The same call resumes what was interrupted.

runs/NAME/
recipe.toml  environment.json  data.json    what ran, on what, on which images
glo/  imle/  finetune/  baselines/NAME/     checkpoint or result, log.jsonl, pictures
pipeline/                                   the saved pipeline; each baseline has its own
mixture/                                    of Gaussians on glo's codes, once there were scores
samples.png  side-by-side.png               what came out
"""

import contextlib
import copy
import os
import platform
import shutil
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy  # noqa: F401  # torch would swallow a Ctrl-C while it imports it
import torch

from glann import processes, storage
from glann.baselines import MODELS
from glann.codes import as_codes
from glann.contrastive import load_features
from glann.data import Data, Images, load
from glann.density import Gaussian, Mixture
from glann.devices import pick_device, pick_precision
from glann.errors import GlannError
from glann.formats import mapped_array
from glann.glo import FEATURES, GLO, PLACES
from glann.images import save_grid, side_by_side, write_png
from glann.imle import IMLE
from glann.losses import load_vgg16
from glann.networks import Generator
from glann.pipeline import GLANN, sampler_name, save_sampler, versions
from glann.places import RECIPE, find_pipeline
from glann.recipes import Recipe, make_recipe
from glann.settings import as_dict, nearest_name

Say = Callable[[str], object]

PICTURES = ("samples.png", "side-by-side.png")
"""What a pipeline shows of itself in its run's folder."""


def train_glo(
    recipe: Recipe,
    folder: Path,
    *,
    data: str | None = None,
    device: str = "auto",
    progress: bool = True,
    restart: bool = False,
    say: Say = lambda text: None,
) -> GLO:
    """Stage one: learn generator and codes from the recipe's images, in `folder`/glo.

    Args:
        recipe: what to learn.
        folder: the run folder.
        data: where the images are, if not where the recipe says, this run had them before, or the
            defaults say.
        device: "auto", "cpu", "cuda", …
        progress: show progress on standard error.
        restart: begin anew; what this run had learned is deleted.
        say: called with a line of news for the user.
    """
    device = str(pick_device(device))
    images = load(recipe.data, data or known_place(recipe, folder))
    with storage.alone(folder, "training"):
        if restart:
            if recipe.glo.loss == "vgg":
                load_vgg16(recipe.glo.vgg_weights)  # before anything is deleted
            stale = ("glo", "imle", "finetune", "pipeline", RECIPE, *PICTURES)
            _delete(*(folder / part for part in stale))
        _claim(folder, recipe, images.fingerprint)
        n, channels, height, width = images.images.shape
        say(f"images    {n:,} of {channels}×{height}×{width}, {images.source} from {images.place}")
        if images.note:
            say(f"note      {images.note}")
        precision = str(pick_precision(recipe.glo.precision, torch.device(device)))
        note = "" if precision == "torch.float32" else f" in {precision.removeprefix('torch.')}"
        say(f"run       {folder} on {device}{note}{_together()}, seed {recipe.seed}")
        storage.write_json(folder / "data.json", {**about(images), "place": images.place})
        _note_environment(folder, device)
        glo = recipe.glo.fit(
            images.images, seed=recipe.seed, device=device, folder=folder / "glo", progress=progress
        )
        pictures = sorted((folder / "glo").glob("reconstructions-*.png"))
        say(f"stage one {glo.seconds_:.0f} s of training; codes {tuple(glo.codes_.shape)}")
        if pictures:
            say(f"look at   {pictures[-1]} (each row of images above its reconstructions)")
        return glo


def train_imle(
    recipe: Recipe,
    folder: Path,
    *,
    data: str | None = None,
    device: str = "auto",
    progress: bool = True,
    restart: bool = False,
    with_codes: bool = False,
    half: bool = False,
    details: int | None = None,
    say: Say = lambda text: None,
) -> GLANN:
    """Stage two: learn to sample the codes of `folder`/glo, and save `folder`/pipeline.

    Where the recipe says so, the generator is fine-tuned in between, on the images again.

    Args as in `train_glo`, but that images are looked for first where stage one had them;
    `with_codes`, `half` and `details` as in `GLANN.save`.
    """
    device = str(pick_device(device))
    generator, codes, stage_one = load_stage_one(folder, recipe.given)
    images = features = None
    if recipe.finetune is not None:  # looked for before anything is deleted or learned
        images = load(recipe.data, data or _place_in(folder))
        _check_images(folder, images.fingerprint)
        features = load_features(folder / "glo" / FEATURES, generator.image_shape)
    with storage.alone(folder, "training"):
        if restart:
            _compare(folder, recipe, ["data", "glo"])  # stage one stays
            stale = ("imle", "finetune", "pipeline", *PICTURES)
            _delete(*(folder / part for part in stale))
        _claim(folder, recipe)
        name = sampler_name(recipe.imle)
        say(f"codes     {len(codes):,} of {codes.shape[1]} numbers, from {folder / 'glo'}")
        _note_environment(folder, device)
        sampler = recipe.imle.fit(
            codes,
            generator=generator,
            seed=recipe.seed,
            device=device,
            folder=folder / "imle",
            progress=progress,
        )
        seconds = {"imle": round(getattr(sampler, "seconds_", 0.0), 3)}
        say(f"stage two {seconds['imle']:.0f} s of training ({name})")
        by_itself = GLANN(generator, Gaussian().fit(codes), codes)
        if details is not None and isinstance(sampler, IMLE):
            # What is learned from and shown is what will be saved.
            sampler = sampler.with_fewer_details(details)
        if recipe.finetune is not None:
            assert images is not None
            if not storage.is_saved(folder / "finetune"):
                _delete(folder / "pipeline")  # of before: from here on it is another
            codes = sampler.reached(codes)
            looks = recipe.finetune.distance > 0
            drawn = sampler.fresh(len(codes), recipe.seed) if looks else None
            tuned = recipe.finetune.fit(
                images.images,
                codes,
                generator,
                samples=drawn,
                like=recipe.glo,
                features=features,
                seed=recipe.seed,
                device=device,
                folder=folder / "finetune",
                progress=progress,
            )
            generator = tuned.generator_
            seconds["finetune"] = round(tuned.seconds_, 3)
            say(f"finetune  {tuned.seconds_:.0f} s of training")
        about_images = _data_of_run(folder)
        sections, parts = recipe.sections(), ("seed", "data", "glo", "imle", "finetune")
        kept = {key: sections[key] for key in parts if key in sections}
        info = {
            "recipe": {"name": recipe.name} | kept,
            # Without the place: a pipeline goes to other machines.
            "data": {key: value for key, value in about_images.items() if key != "place"},
            "seconds": {"glo": stage_one["seconds"], **seconds},
        }
        pipeline = GLANN(generator, sampler, codes, info)
        pipeline.save(folder / "pipeline", with_codes=with_codes, half=half)

        chosen = torch.arange(min(64, len(codes)))
        samples = pipeline.sample(64, recipe.seed)
        save_grid(samples, folder / "samples.png", columns=8)
        columns = {
            "reconstructions": by_itself.reconstruct(chosen),
            "one Gaussian on the codes": by_itself.sample(64, recipe.seed),
            f"{name} samples": samples,
        }
        write_png(side_by_side(columns), folder / "side-by-side.png")
        say(f"pipeline  {folder / 'pipeline'}")
        say(f"look at   {folder / 'samples.png'} and {folder / 'side-by-side.png'}")
        return pipeline


def trained(
    recipe: Recipe,
    folder: Path,
    *,
    data: str | None = None,
    device: str = "auto",
    progress: bool = True,
    say: Say = lambda text: None,
) -> GLANN:
    """A run's pipeline with its codes: trained if it isn't yet.  Args as in `train_glo`."""
    as_asked = storage.is_saved(folder / "finetune") == (recipe.finetune is not None)
    if storage.is_saved(folder / "pipeline") and as_asked:
        _claim(folder, recipe, load(recipe.data, data).fingerprint)
    else:
        train_glo(recipe, folder, data=data, device=device, progress=progress, say=say)
        train_imle(recipe, folder, data=data, device=device, progress=progress, say=say)
    return load_with_codes(folder, device)


def train_baseline(
    recipe: Recipe,
    model: str,
    folder: Path,
    *,
    data: str | None = None,
    device: str = "auto",
    progress: bool = True,
    restart: bool = False,
    say: Say = lambda text: None,
) -> GLANN:
    """Learn the recipe's images with one of its baselines, in `folder`/baselines/`model`.

    Args as in `train_glo`; `model` is one of `glann.baselines.MODELS`.
    """
    if model not in MODELS:
        raise GlannError(f"there is no model '{model}'; {nearest_name(model, MODELS)}")
    device = str(pick_device(device))
    images = load(recipe.data, data or known_place(recipe, folder))
    part = folder / "baselines" / model
    with storage.alone(folder, model):
        if restart:
            _delete(part)
        _claim(folder, recipe, images.fingerprint)
        n, channels, height, width = images.images.shape
        say(f"images    {n:,} of {channels}×{height}×{width}, {images.source} from {images.place}")
        if images.note:
            say(f"note      {images.note}")
        say(f"run       {part} on {device}, seed {recipe.seed}")
        storage.write_json(folder / "data.json", {**about(images), "place": images.place})
        _note_environment(folder, device)
        sampler = copy.copy(recipe.baselines[model]).fit(
            images.images, seed=recipe.seed, device=device, folder=part, progress=progress
        )
        pipeline = sampler.pipeline_
        pipeline.info = {
            "model": model,
            "settings": {"seed": recipe.seed, **as_dict(sampler)},
            "recipe": {key: recipe.sections()[key] for key in ("seed", "data")},
            "data": about(images),
            "seconds": {model: round(sampler.seconds_, 3)},
        }
        pipeline.save(part / "pipeline")
        save_grid(pipeline.sample(64, recipe.seed), part / "samples.png", columns=8)
        say(f"{model:9} {sampler.seconds_:.0f} s of training, {sampler.images_seen:,} images seen")
        say(f"pipeline  {part / 'pipeline'}")
        say(f"look at   {part / 'samples.png'}")
        return pipeline


def about(images: Images) -> dict[str, Any]:
    """What a pipeline's manifest says of its training images (JSON)."""
    return {
        "source": images.source,
        "shape": list(images.images.shape),
        "labels": images.labels is not None,
        "fingerprint": images.fingerprint,
    }


def train_on_codes(
    recipe: Recipe,
    codes: Path,
    folder: Path,
    *,
    device: str = "auto",
    progress: bool = True,
    restart: bool = False,
    say: Say = lambda text: None,
) -> None:
    """Stage two by itself, on codes from any model.

    Args:
        recipe: its `[imle]` section and its seed are used.
        codes: a `.npy` file, float `(n, code_dim)`.
        folder: what was learned is saved here, its training under `folder`/training.
        device: "auto", "cpu", "cuda", …
        progress: show progress on standard error.
        restart: begin anew.
        say: called with a line of news for the user.
    """
    device = str(pick_device(device))
    array = read_codes(codes)
    with storage.alone(folder, "training"):
        if restart:
            _delete(folder / "training")
        say(f"codes     {len(array):,} of {array.shape[1]} numbers, from {codes}")
        sampler = recipe.imle.fit(
            array, seed=recipe.seed, device=device, folder=folder / "training", progress=progress
        )
        save_sampler(sampler, folder)
        say(f"mapper    {folder}")


def read_codes(path: Path) -> torch.Tensor:
    """Codes from a `.npy` file: float32 `(n, code_dim)`."""
    try:
        return as_codes(mapped_array(path))
    except (OSError, ValueError, EOFError) as error:
        raise GlannError(
            f"--codes {path} can't be read: {error}; wanted a .npy file, float (n, code_dim)"
        ) from error


def load_with_codes(target: str | Path, device: str) -> GLANN:
    """A pipeline with its training images' codes: its own, or those its run's generator learned."""
    pipeline = GLANN.load(target, device)
    run = find_pipeline(target).parent
    for stage in ("finetune", "glo"):
        if pipeline.codes is None and storage.is_saved(run / stage):
            _, parts = storage.load(run / stage, stage)
            pipeline.codes = parts["codes"]["codes"]
    if pipeline.codes is None:
        raise GlannError(
            f"{target} was saved without codes; give a run's folder, or save the pipeline with "
            "codes (glann train-imle --with-codes)"
        )
    return pipeline


def stage_one_of(target: str | Path) -> GLANN | None:
    """What stage one of a pipeline gives by itself: its generator, a Gaussian on its codes.

    None where it is not at hand: neither in the pipeline's run nor, with codes, in the pipeline.
    """
    run = find_pipeline(target).parent
    if storage.is_saved(run / "glo"):
        generator, codes, _ = load_stage_one(run)
    else:
        pipeline = GLANN.load(target)
        tuned = "finetune" in pipeline.info.get("recipe", {})  # another generator, other codes
        if pipeline.codes is None or tuned:
            return None
        generator, codes = pipeline.generator, pipeline.codes
    return GLANN(generator, Gaussian().fit(codes), codes)


def mixture_of(target: str | Path, codes: torch.Tensor, seed: int) -> Mixture:
    """The mixture of Gaussians on stage one's codes, which stage two has to beat.

    EM takes minutes, so it is kept in the pipeline's run, where there is one, for the next time.
    """
    run, mixture = find_pipeline(target).parent, Mixture()
    kept = run / "mixture"
    identity = {"settings": as_dict(mixture), "seed": seed, "codes": storage.fingerprint(codes)}
    with contextlib.suppress(GlannError):  # damaged: fitted anew
        if storage.is_saved(kept):
            manifest, parts = storage.load(kept, "mixture")
            if manifest["identity"] == identity:
                found: Mixture = Mixture.from_state(manifest["state"], parts["mixture"])
                return found
    mixture.fit(codes, seed=seed)
    if storage.is_saved(run / "glo"):
        state, tensors = mixture.state()
        content = {"identity": identity, "state": state}
        with contextlib.suppress(GlannError):  # a run that can't be written to
            storage.save(kept, "mixture", content, {"mixture": tensors})
    return mixture


def place_of(target: str | Path) -> str | None:
    """Where the images of a run were, if its source has no other place or they still are there.

    None for a pipeline without its run.
    """
    for folder in find_pipeline(target).parents[:3]:  # a baseline's lies three deep
        if (folder / "data.json").is_file():
            return _place_in(folder)
    return None


def known_place(recipe: Recipe, run: Path) -> str | None:
    """Where a run that goes on had the images of this recipe, if it doesn't say where they are.

    Or says it as the run's does, of a place that is near where that was begun, but not here.
    """
    path = recipe.data.path
    if path is not None and (os.path.isabs(os.path.expanduser(path)) or os.path.exists(path)):
        return None
    if (run / "data.json").is_file():
        with contextlib.suppress(GlannError):  # damaged: said where it matters
            same = path is None or _recipe_of(run / RECIPE, ["data"]).data.path == path
            if same and _data_of_run(run).get("source") == recipe.data.source:
                return _place_in(run)
    return None


def _place_in(run: Path) -> str | None:
    """Where the images of a run folder were, if they still are, or can be nowhere by default."""
    described = _data_of_run(run)
    place = str(described.get("place"))
    own = described.get("source") in ("folder", "array")  # the error then says where they were
    # "scikit-learn" is no place, even where a folder has that name.
    return place if own or (os.path.isabs(place) and os.path.exists(place)) else None


def training_images(pipeline: GLANN, data: str | None = None) -> Images:
    """The images that a pipeline was trained on, found again by its recipe.

    Refused with a GlannError if they are not the same in the same order: codes belong to them.
    """
    section = data_of(pipeline)
    wanted = pipeline.info["data"]["fingerprint"]
    images = load(section, data)
    if images.fingerprint != wanted:
        raise GlannError(
            f"the images from {images.place} are not those that this pipeline was trained on, or "
            f"in another order (fingerprint {images.fingerprint[:12]}, wanted {wanted[:12]}); say "
            "where they are with --data, or use --no-originals"
        )
    return images


def data_of(pipeline: GLANN) -> Data:
    """The [data] section of the recipe that a pipeline was trained by."""
    try:
        str(pipeline.info["data"]["fingerprint"])
        return Data(**pipeline.info["recipe"]["data"])
    except (KeyError, TypeError) as error:
        raise GlannError(
            "this pipeline doesn't say which images it was trained on; give them with --real "
            "(glann evaluate), or use --no-originals (glann reconstruct)"
        ) from error


def load_stage_one(
    folder: Path, recipe_name: str = "RECIPE"
) -> tuple[Generator, torch.Tensor, dict[str, Any]]:
    """What stage one left in a run folder: generator, codes float32 `(n, code_dim)`, manifest."""
    stage = folder / "glo"
    command = f"glann train-glo {recipe_name} --run {folder}"
    if not storage.is_saved(stage):
        raise GlannError(f"{folder} has no trained stage one; train it first: `{command}`")
    manifest, parts = storage.load(stage, "glo")
    if not manifest["done"]:
        raise GlannError(
            f"stage one of {folder} stopped at step {manifest['step']} of {manifest['steps']}; "
            f"finish it first: `{command}`"
        )
    generator = Generator(**manifest["generator"])
    generator.load_state_dict(parts["generator"])
    return generator, parts["codes"]["codes"], manifest


def _claim(folder: Path, recipe: Recipe, fingerprint: str | None = None) -> None:
    """Write the recipe into the run folder; refuse if what is trained there used another.

    `fingerprint` is that of the images that stage one is to learn from.
    """
    # A stage's settings are free until it has something to lose.
    sections = ["data", "glo"] if storage.is_saved(folder / "glo") else []
    if any(storage.is_saved(folder / part) for part in ("imle", "pipeline")):
        sections.append("imle")
    if storage.is_saved(folder / "finetune"):
        sections.append("finetune")
    if sections:
        _compare(folder, recipe, sections)
    if sections and fingerprint is not None:
        _check_images(folder, fingerprint)
    storage.write_text(folder / RECIPE, recipe.to_toml())


def _compare(folder: Path, recipe: Recipe, sections: list[str]) -> None:
    """Refuse a recipe of which these sections, or the seed, are not those of the run."""
    path = folder / RECIPE
    if not path.is_file():
        return
    there, wanted = _recipe_of(path, sections).sections(), recipe.sections()
    for section in sections:
        before, asked = there.get(section, {}), wanted.get(section, {})
        for key in {**before, **asked}:
            then, now = before.get(key), asked.get(key)
            if then != now and not (section == "glo" and key in PLACES):
                _refuse(folder, recipe, f"{section}.{key} = {then!r}, now {now!r}", section)
    if there["seed"] != wanted["seed"]:
        _refuse(folder, recipe, f"seed = {there['seed']}, now {wanted['seed']}", "seed")


def _recipe_of(path: Path, sections: list[str]) -> Recipe:
    """What a run's recipe says in these sections: an earlier version's may have others."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in content.items() if key in (*sections, "seed")}
        return make_recipe(path.stem, kept)
    except (OSError, ValueError, GlannError) as error:
        raise GlannError(
            f"{path} can't be read as a recipe of this version: {error}. Use --run FOLDER for a "
            "run of its own, or --restart to begin this stage anew"
        ) from error


def _data_of_run(folder: Path) -> dict[str, Any]:
    """What a run says of the images that it learns from."""
    path = folder / "data.json"
    try:
        content: dict[str, Any] = storage.read_json(path)
        str(content["fingerprint"])
    except (GlannError, KeyError, TypeError) as error:
        raise GlannError(
            f"{path} is missing or damaged, so that nobody knows which images this run has learned "
            "from; put it back, or use --run FOLDER for a run of its own"
        ) from error
    return content


def _check_images(folder: Path, fingerprint: str) -> None:
    """Refuse images that a run's stage one did not learn from."""
    then = str(_data_of_run(folder)["fingerprint"])
    if then != fingerprint:
        raise GlannError(
            f"{folder} was trained on other images, or on these in another order (fingerprint "
            f"{then[:12]}, now {fingerprint[:12]}), and its codes belong to them; say with "
            "--data where they are, or use --run FOLDER for a run of its own"
        )


def _delete(*paths: Path) -> None:
    """Delete files and folders of this run; with several processes, before any goes on."""
    if processes.is_first():
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    processes.wait()


def _together() -> str:
    return "" if processes.count() == 1 else f", {processes.count()} processes"


def _refuse(folder: Path, recipe: Recipe, difference: str, section: str) -> None:
    ways = [] if Path(recipe.given) == folder else [f"{folder} itself to go on with its settings"]
    # Not `glann train --restart`, which would begin with stage one.
    anew = "`glann train-glo`, these options and --restart to begin stage one anew"
    if section in ("imle", "finetune"):
        anew = "`glann train-imle`, these options and --restart to begin stage two anew"
    ways += ["--run FOLDER for a run of its own", anew]
    raise GlannError(
        f"{folder} is a run of another recipe: it has {difference}. Give {', or '.join(ways)}"
    )


def environment(device: str) -> dict[str, Any]:
    """What a result may depend on: versions, machine, threads (JSON)."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def _note_environment(folder: Path, device: str) -> None:
    content = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **environment(device),
    }
    storage.write_json(folder / "environment.json", content)
