"""Commands that train: both stages together and each by itself, and baselines."""

import json
import shlex
from pathlib import Path
from typing import Any

import click

from glann.cli.group import main
from glann.cli.options import (
    codes_on_option,
    data_option,
    imle_options,
    precision_option,
    recipe_options,
    resolve,
    show,
    vgg_option,
)
from glann.places import run_of


@main.command("train")
@click.argument("recipe")
@data_option
@vgg_option
@codes_on_option
@imle_options
@precision_option
@recipe_options
def train(
    recipe: str,
    run: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    restart: bool,
    quiet: bool,
    device: str,
    data: str | None,
    vgg_weights: str | None,
    codes_on: str | None,
    search: str | None,
    precision: str | None,
    with_codes: bool,
    half: bool,
    details: int | None,
) -> None:
    """Both stages: from images to a saved pipeline.

    Where the recipe has a section [finetune], the generator learns on after stage two, from the
    codes that samples have. RECIPE is a shipped recipe's name (`glann recipes`), a TOML file of
    your own, or the folder of a run that is to go on. The same command resumes a run that was
    interrupted.
    """
    changes = {"glo.vgg_weights": vgg_weights, "glo.codes_on": codes_on, "imle.search": search}
    changes |= {"glo.precision": precision, "imle.precision": precision}
    resolved = resolve(recipe, overrides, changes)
    if dry_run:
        show(resolved, data)
        return
    from glann import runner

    folder = run or run_of(recipe)
    how: dict[str, Any] = {"device": device, "progress": not quiet, "say": click.echo}
    runner.train_glo(resolved, folder, data=data, restart=restart, **how)
    saved: dict[str, Any] = {"with_codes": with_codes, "half": half, "details": details}
    runner.train_imle(resolved, folder, data=data, **saved, **how)
    say_next("sample", str(folder))


@main.command("train-glo")
@click.argument("recipe")
@data_option
@vgg_option
@precision_option
@codes_on_option
@recipe_options
def train_glo(
    recipe: str,
    run: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    restart: bool,
    quiet: bool,
    device: str,
    data: str | None,
    vgg_weights: str | None,
    precision: str | None,
    codes_on: str | None,
) -> None:
    """Stage one: learn a generator and one code for each image.

    RECIPE is a shipped recipe's name (`glann recipes`), a TOML file of your own, or the folder of a
    run that is to go on. The same command resumes a run that was interrupted.
    """
    changes = {"glo.vgg_weights": vgg_weights, "glo.codes_on": codes_on, "glo.precision": precision}
    resolved = resolve(recipe, overrides, changes)
    if dry_run:
        show(resolved, data)
        return
    from glann import runner

    folder = run or run_of(recipe)
    runner.train_glo(
        resolved,
        folder,
        data=data,
        device=device,
        progress=not quiet,
        restart=restart,
        say=click.echo,
    )
    say_next("train-imle", str(folder))


@main.command("train-imle")
@click.argument("recipe", required=False)
@click.option(
    "--codes",
    type=click.Path(path_type=Path),
    help="Stage two by itself: learn from this .npy file, float (n, code_dim), of any model.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="With --codes: the folder for what was learned.",
)
@data_option
@imle_options
@precision_option
@recipe_options
def train_imle(
    recipe: str | None,
    codes: Path | None,
    output: Path | None,
    run: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    restart: bool,
    quiet: bool,
    device: str,
    data: str | None,
    search: str | None,
    precision: str | None,
    with_codes: bool,
    half: bool,
    details: int | None,
) -> None:
    """Stage two: learn to sample the codes; save the pipeline.

    RECIPE as in train-glo, whose run it goes on with. Where it has a section [finetune], the
    generator then learns on, from the images again. Or, for codes from any other model:

    \b
      glann train-imle --codes codes.npy -o mapper/
      glann sample mapper/ -n 1000 -o new-codes.npy
    """
    if (recipe is None) == (codes is None):
        raise click.UsageError("give either a RECIPE or --codes FILE")
    if (codes is None) != (output is None):
        raise click.UsageError("--codes FILE and -o FOLDER go together")
    others = {"--run": run, "--data": data, "--with-codes": with_codes, "--half": half}
    others["--details"] = details is not None
    for option, given in others.items():
        if codes is not None and given:
            raise click.UsageError(f"{option} goes with a RECIPE, not with --codes")
    changes = {"imle.search": search, "imle.precision": precision}
    resolved = resolve(recipe, overrides, changes)
    if dry_run:
        show(resolved, data)
        return
    from glann import runner

    how: dict[str, Any] = {
        "device": device,
        "progress": not quiet,
        "restart": restart,
        "say": click.echo,
    }
    if codes is not None and output is not None:
        runner.train_on_codes(resolved, codes, output, **how)
        say_next("sample", str(output), "-n", "1000", "-o", "new-codes.npy")
        return
    assert recipe is not None
    folder = run or run_of(recipe)
    saved: dict[str, Any] = {"with_codes": with_codes, "half": half, "details": details}
    runner.train_imle(resolved, folder, data=data, **saved, **how)
    say_next("sample", str(folder))


@main.command("train-baseline")
@click.argument("recipe")
@click.option("--model", required=True, help="Such as ns-gan, wgan-gp, r3gan, vae, pixel-imle.")
@data_option
@recipe_options
def train_baseline(
    recipe: str,
    model: str,
    run: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    restart: bool,
    quiet: bool,
    device: str,
    data: str | None,
) -> None:
    """Train a GAN, a VAE or IMLE on pixels, as a baseline.

    RECIPE as in train-glo, whose images and generator it has. The model's settings,
    published ones unless the recipe says otherwise, are those of the section with its name:

    \b
      glann train-baseline mnist --model wgan-gp --set wgan-gp.images_seen=500000
      glann sample runs/mnist/baselines/wgan-gp
    """
    resolved = resolve(recipe, (f"compare.models={json.dumps([model])}", *overrides))
    if dry_run:
        show(resolved, data)
        return
    from glann import runner

    folder = run or run_of(recipe)
    runner.train_baseline(
        resolve(recipe, overrides),
        model,
        folder,
        data=data,
        device=device,
        progress=not quiet,
        restart=restart,
        say=click.echo,
    )
    say_next("sample", str(folder / "baselines" / model))


def say_next(*words: str) -> None:
    """What to do next, as it can be pasted."""
    click.echo(f"next      {shlex.join(['glann', *words])}")
