"""Commands that score: one sampler, or GLANN beside baselines."""

import json
from pathlib import Path

import click

from glann.cli.group import main
from glann.cli.options import (
    data_option,
    device_option,
    features_option,
    quiet_option,
    recipe_options,
    resolve,
    show,
    typed,
    weights_option,
)
from glann.places import run_of


@main.command()
@click.argument("pipeline", required=False)
@click.option("--fake", type=click.Path(path_type=Path), help="Score these images instead.")
@click.option(
    "--real",
    type=click.Path(path_type=Path),
    help="Against these.  [default: the test images that belong to PIPELINE's training images]",
)
@click.option(
    "--size",
    type=click.IntRange(8, 256),
    help="Scale and crop the images of --fake to squares of this side.  [default: as they are, all "
    "of one size]  Real images get the size of the others.",
)
@click.option(
    "-n",
    "n",
    default=10_000,
    show_default=True,
    type=click.IntRange(50),
    help="Samples and real images in a score, at the most.",
)
@features_option
@weights_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for results.json, results.csv, pictures and report.html.",
)
@data_option
@quiet_option
@device_option
def evaluate(
    pipeline: str | None,
    fake: Path | None,
    real: Path | None,
    size: int | None,
    n: int,
    features: str | None,
    weights: str | None,
    output: Path | None,
    data: str | None,
    quiet: bool,
    device: str,
) -> None:
    """Score samples: FID, KID, precision, recall and more.

    PIPELINE is a run's folder, a pipeline's, a baseline's, or the name of one that ships. Beside
    its samples stand the training images (the floor: what a perfect sampler would get), the
    reconstructions, and one Gaussian and a mixture on the codes, which stage two has to beat.

    \b
      glann evaluate runs/digits
      glann evaluate --real photos/ --fake somebodys-samples.npy
    """
    if (pipeline is None) == (fake is None):
        raise click.UsageError("give either a PIPELINE or --fake IMAGES")
    if size is not None and fake is None:
        raise click.UsageError("--size goes with --fake: a pipeline's samples have a size")
    if fake is not None and real is None:
        raise click.UsageError("--fake IMAGES needs --real IMAGES to be scored against")
    from glann import comparison, processes
    from glann.report import markdown_table

    rows = comparison.evaluate(
        pipeline,
        real=real,
        fake=fake,
        size=size,
        data=data,
        folder=output,
        samples=n,
        features=features or "auto",
        weights=weights,
        device=device,
        progress=not quiet,
        command=typed(),
        say=lambda text: click.echo(text, err=True) if processes.is_first() else None,
    )
    click.echo(markdown_table({"rows": rows}))
    if output is not None:
        click.echo(f"look at   {output / 'report.html'}")


@main.command("compare")
@click.argument("recipe")
@click.option("--models", help="Baselines, with commas.  [default: as in the recipe]")
@click.option("--seeds", type=click.IntRange(1), help="Runs of each.  [default: as in the recipe]")
@click.option(
    "--budget-seconds",
    type=click.FloatRange(1),
    help="Train each model for about so long, instead of the recipe's lengths in images seen; the "
    "run's folder is then runs/RECIPE-Ns.",
)
@features_option
@weights_option
@data_option
@recipe_options
def compare(
    recipe: str,
    models: str | None,
    seeds: int | None,
    budget_seconds: float | None,
    features: str | None,
    weights: str | None,
    run: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    restart: bool,
    quiet: bool,
    device: str,
    data: str | None,
) -> None:
    """GLANN beside GANs: same images, same seeds, same scores.

    RECIPE as in train-glo; its section [compare] says which models, and each model's own section
    how long it is trained. What is trained already is only scored; the same command goes on where
    it was stopped, and models and seeds can be added.

    \b
      glann compare digits
      glann compare mnist-short --models ns-gan,r3gan --seeds 3
    """
    extra = []
    if models is not None:
        extra.append(f"compare.models={json.dumps([name.strip() for name in models.split(',')])}")
    if seeds is not None:
        extra.append(f"compare.seeds={seeds}")
    if features is not None:
        extra.append(f"compare.features={features}")
    resolved = resolve(recipe, (*overrides, *extra))
    if dry_run:
        show(resolved, data)
        return
    from glann import comparison

    # Trained to other lengths, it is another run.
    usual = run_of(recipe)
    if budget_seconds is not None:
        usual = usual.with_name(f"{usual.name}-{budget_seconds:g}s")
    folder = run or usual
    report = comparison.compare(
        resolved,
        folder,
        command=typed(),
        data=data,
        device=device,
        progress=not quiet,
        restart=restart,
        budget_seconds=budget_seconds,
        weights=weights,
        say=click.echo,
    )
    click.echo(f"look at   {report}")
