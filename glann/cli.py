"""The command line: parse, call, print.

Commands import what they need when they run: `glann --help` doesn't wait for torch.
"""

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from glann import __version__
from glann.errors import GlannError
from glann.places import RUNS
from glann.studies import STUDIES

if TYPE_CHECKING:
    from glann.recipes import Recipe

COMMANDS = (
    "recipes",
    "train",
    "train-glo",
    "train-imle",
    "sample",
    "reconstruct",
    "project",
    "interpolate",
    "inspect",
    "evaluate",
    "train-baseline",
    "compare",
    "study",
    "bench",
)
TOGETHER = ("train", "train-glo", "train-imle", "sample", "evaluate")
"""Commands that torchrun can start in several processes."""


class Glann(click.Group):
    """Lists commands in the order in which one needs them and prints errors without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of COMMANDS."""
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, and the other processes if torchrun started several."""
        found = super().resolve_command(ctx, args)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            _meet(ctx, str(found[0]))
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what a user can mend becomes a message and exit code 2."""
        try:
            return super().invoke(ctx)
        except GlannError as error:
            click.echo(f"Error: {error}", err=True)
            # 130 is what a shell reports for a command that Ctrl-C ended.
            ctx.exit(130 if type(error).__name__ == "Interrupted" else 2)
        except MemoryError as error:
            _out_of_memory(ctx, error)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError" and "allocate memory" not in str(error):
                raise
            _out_of_memory(ctx, error)


def _meet(ctx: click.Context, command: str) -> None:
    """Work with the other processes until the end; only the first one prints."""
    if command not in TOGETHER:
        raise GlannError(
            f"`glann {command}` works in one process, and torchrun started "
            f"{os.environ['WORLD_SIZE']}; wanted one of {', '.join(TOGETHER)}. Call it without "
            "torchrun"
        )
    from glann import processes

    processes.start()
    ctx.call_on_close(processes.stop)
    if not processes.is_first():
        ctx.with_resource(contextlib.redirect_stdout(io.StringIO()))


def _out_of_memory(ctx: click.Context, error: Exception) -> NoReturn:
    click.echo(
        f"Error: out of memory ({str(error).splitlines()[0] if str(error) else 'no details'}); "
        "try a smaller batch_size, fewer images (data.limit) or smaller ones (data.size), or keep "
        "codes on disk (glo.codes_on). What was saved is kept",
        err=True,
    )
    ctx.exit(2)


@click.group(
    cls=Glann, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="glann")
def main() -> None:
    r"""Train image generators without an adversary, in two stages.

    \b
    Stage one (GLO) learns a generator and a code for each image.
    Stage two (IMLE) learns to turn noise into such codes.

    \b
      glann sample digits -o out.png      sample a pipeline that ships with glann
      glann train digits                  train both stages of a recipe (seconds)
      glann sample runs/digits -n 100     sample what was trained
      glann train folder --data photos/   your own images
    """


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."
)
seed_option = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the samples."
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress.")
data_option = click.option(
    "--data",
    type=click.Path(),
    help="Where the images are: a folder or a file.  [default: of a trained run where they "
    "were then, else $GLANN_DATA/SOURCE or data/SOURCE, else fetched]",
)
recipe_options = _options(
    click.option(
        "--run", type=click.Path(path_type=Path), help="Run folder.  [default: runs/RECIPE]"
    ),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Change a setting, such as glo.epochs=5; may be repeated. `glann recipes --settings` "
        "lists them all.",
    ),
    click.option("--dry-run", is_flag=True, help="Print the resolved recipe and stop."),
    click.option("--restart", is_flag=True, help="Delete what is there of this stage; begin anew."),
    quiet_option,
    device_option,
)
precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Of matrix products while training; auto: bfloat16 on GPUs and CPUs that are made for it. "
    " [default: as in the recipe]",
)
vgg_option = click.option(
    "--vgg-weights",
    type=click.Path(),
    help="File with VGG16's weights, for glo.loss=vgg.  [default: fetched]",
)
codes_on_option = click.option(
    "--codes-on",
    type=click.Choice(["memory", "disk"]),
    help="Where codes are while they are learned; on disk they may be larger than memory.  "
    "[default: as in the recipe]",
)
imle_options = _options(
    click.option(
        "--search",
        type=click.Choice(["torch", "faiss", "ivf"]),
        help="Nearest-neighbour search: torch and faiss find the same; ivf (faiss) is faster for "
        "many codes and may miss the nearest: how often is measured and logged as recall.  "
        "[default: as in the recipe]",
    ),
    click.option(
        "--with-codes",
        is_flag=True,
        help="Save the training images' codes in the pipeline too, for `glann reconstruct`.",
    ),
    click.option("--half", is_flag=True, help="Save the pipeline as float16, half the size."),
    click.option(
        "--details",
        type=click.IntRange(min=0),
        metavar="N",
        help="Save the details of N training codes at the most (imle.detail): fewer make the "
        "pipeline smaller and its samples a little less varied. Fine-tuning learns from such "
        "samples.  [default: all]",
    ),
)


def output_option(default: str) -> Callable[[Any], Any]:
    """`-o`, with a default name in the current folder."""
    return click.option(
        "-o",
        "--output",
        default=default,
        show_default=True,
        type=click.Path(path_type=Path),
        help="x.png: a grid; x.npy or x.npz: the uint8 array; a name without an ending: a folder "
        "of PNGs.",
    )


def _resolve(
    recipe: str | None,
    overrides: tuple[str, ...],
    changes: dict[str, str | None] | None = None,
) -> "Recipe":
    """The recipe with what --set and other options change; an option that isn't given is None."""
    from glann.recipes import load_recipe

    extra = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items() if value]
    return load_recipe(recipe, [*overrides, *extra])


# ---------------------------------------------------------------------- training


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
    codes that samples have. RECIPE is a shipped recipe's name (`glann recipes`) or a TOML file of
    your own. The same command resumes a run that was interrupted.
    """
    changes = {"glo.vgg_weights": vgg_weights, "glo.codes_on": codes_on, "imle.search": search}
    changes |= {"glo.precision": precision, "imle.precision": precision}
    resolved = _resolve(recipe, overrides, changes)
    if dry_run:
        click.echo(resolved.to_toml(), nl=False)
        return
    from glann import runner

    folder = run or RUNS / resolved.name
    how: dict[str, Any] = {"device": device, "progress": not quiet, "say": click.echo}
    runner.train_glo(resolved, folder, data=data, restart=restart, **how)
    saved: dict[str, Any] = {"with_codes": with_codes, "half": half, "details": details}
    runner.train_imle(resolved, folder, data=data, **saved, **how)
    click.echo(f"next      glann sample {folder}")


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

    RECIPE is a shipped recipe's name (`glann recipes`) or a TOML file of your own. The same command
    resumes a run that was interrupted.
    """
    changes = {"glo.vgg_weights": vgg_weights, "glo.codes_on": codes_on, "glo.precision": precision}
    resolved = _resolve(recipe, overrides, changes)
    if dry_run:
        click.echo(resolved.to_toml(), nl=False)
        return
    from glann import runner

    runner.train_glo(
        resolved,
        run or RUNS / resolved.name,
        data=data,
        device=device,
        progress=not quiet,
        restart=restart,
        say=click.echo,
    )
    click.echo(f"next      glann train-imle {recipe}" + (f" --run {run}" if run else ""))


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
    r"""Stage two: learn to sample the codes, and save the pipeline.

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
    changes = {"imle.search": search, "imle.precision": precision}
    resolved = _resolve(recipe, overrides, changes)
    if dry_run:
        click.echo(resolved.to_toml(), nl=False)
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
        click.echo(f"next      glann sample {output} -n 1000 -o new-codes.npy")
        return
    folder = run or RUNS / resolved.name
    saved: dict[str, Any] = {"with_codes": with_codes, "half": half, "details": details}
    runner.train_imle(resolved, folder, data=data, **saved, **how)
    click.echo(f"next      glann sample {folder}")


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
    r"""Train a GAN, a VAE or IMLE on pixels, on a recipe's images and with its generator.

    RECIPE as in train-glo. The model's settings, published ones unless the recipe says otherwise,
    are those of the recipe's section with its name:

    \b
      glann train-baseline mnist --model wgan-gp --set wgan-gp.images_seen=500000
      glann sample runs/mnist/baselines/wgan-gp
    """
    resolved = _resolve(recipe, (f"compare.models={json.dumps([model])}", *overrides))
    if dry_run:
        click.echo(resolved.to_toml(), nl=False)
        return
    from glann import runner

    folder = run or RUNS / resolved.name
    runner.train_baseline(
        _resolve(recipe, overrides),
        model,
        folder,
        data=data,
        device=device,
        progress=not quiet,
        restart=restart,
        say=click.echo,
    )
    click.echo(f"next      glann sample {folder / 'baselines' / model}")


# ---------------------------------------------------------------------- using a pipeline


@main.command()
@click.argument("pipeline")
@click.option("-n", "n", default=64, show_default=True, type=click.IntRange(1), help="How many.")
@seed_option
@click.option(
    "--start",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Number of the first: sample 7 of a seed is always the same image.",
)
@click.option("--columns", type=click.IntRange(1), help="Columns of a grid.")
@output_option("samples.png")
@device_option
def sample(
    pipeline: str, n: int, seed: int, start: int, columns: int | None, output: Path, device: str
) -> None:
    """New images from a saved pipeline.

    PIPELINE is a run's folder (runs/digits), a pipeline's folder, or the name of one that ships
    with glann (digits). A folder of train-imle --codes gives new codes, -o x.npy.
    """
    from glann import images, storage
    from glann.pipeline import GLANN, load_sampler

    images.check_output(output)
    if storage.holds(Path(pipeline), "sampler"):
        if output.suffix != ".npy":
            raise GlannError(
                f"{pipeline} gives codes, not images; wanted -o x.npy, got -o {output}"
            )
        codes = load_sampler(pipeline).sample(n, seed, start)
        click.echo(f"wrote {images.save_array(codes, output)}")
        return
    made = GLANN.load(pipeline, device).sample(n, seed, start)
    click.echo(f"wrote {images.save_images(made, output, columns)}")


@main.command()
@click.argument("pipeline")
@click.option("-n", "n", default=32, show_default=True, type=click.IntRange(1), help="The first n.")
@click.option("--indices", help="Numbers of training images instead, such as 0,5,17.")
@click.option(
    "--originals/--no-originals",
    default=True,
    show_default=True,
    help="Show each row of training images above its reconstructions.",
)
@data_option
@output_option("reconstructions.png")
@device_option
def reconstruct(
    pipeline: str,
    n: int,
    indices: str | None,
    originals: bool,
    data: str | None,
    output: Path,
    device: str,
) -> None:
    """Training images as the generator gives them from their codes.

    PIPELINE is a run's folder, or a pipeline that was saved --with-codes.
    """
    from glann import images, runner

    images.check_output(output)
    loaded = runner.load_with_codes(pipeline, device)
    assert loaded.codes is not None
    chosen = _numbers(indices) if indices else list(range(min(n, len(loaded.codes))))
    made = loaded.reconstruct(chosen)
    columns = None
    if originals:
        place = data or runner.place_of(pipeline)
        real = runner.training_images(loaded, place).images[chosen]
        error = (images.to_float(made) - images.to_float(real)).abs().mean()
        click.echo(f"mean absolute error of a pixel: {float(error):.4f} (of 1)")
        if output.suffix == ".png":
            made, columns = images.interleave(real, made), min(8, len(chosen))
    click.echo(f"wrote {images.save_images(made, output, columns)}")


@main.command()
@click.argument("pipeline")
@click.argument("folder_or_file", type=click.Path(path_type=Path))
@click.option("--steps", default=300, show_default=True, type=click.IntRange(1), help="Steps.")
@click.option("--codes", type=click.Path(path_type=Path), help="Write the codes too: x.npy.")
@output_option("projected.png")
@device_option
def project(
    pipeline: str, folder_or_file: Path, steps: int, codes: Path | None, output: Path, device: str
) -> None:
    """Find codes for new images, by optimisation, and show how near they come.

    FOLDER_OR_FILE holds images, or is one, or an array (.npy, .npz). They are scaled and cropped to
    the pipeline's size.
    """
    from glann import images
    from glann.data import read_images
    from glann.pipeline import GLANN

    images.check_output(output)
    if codes is not None and codes.suffix != ".npy":
        raise GlannError(f"--codes {codes}: wanted a name that ends in .npy")
    loaded = GLANN.load(pipeline, device)
    channels, *size = loaded.image_shape
    given = read_images(folder_or_file, size=size, channels=channels)
    found = loaded.project(given, steps=steps)
    errors = found.errors
    click.echo(
        f"mean absolute error of a pixel over {len(given)} images: {float(errors.mean()):.4f} "
        f"(of 1; best {float(errors.min()):.4f}, worst {float(errors.max()):.4f}, image "
        f"{int(errors.argmax())})"
    )
    made, columns = found.images, None
    if output.suffix == ".png":
        made, columns = images.interleave(given, made), min(8, len(given))
    click.echo(f"wrote {images.save_images(made, output, columns)}")
    if codes is not None:
        click.echo(f"wrote {images.save_array(found.codes, codes)}")


@main.command()
@click.argument("pipeline")
@click.option("--pairs", default=8, show_default=True, type=click.IntRange(1), help="Rows.")
@click.option("--between", help="Numbers of two samples instead, such as 3,7.")
@click.option("--steps", default=10, show_default=True, type=click.IntRange(2), help="Columns.")
@seed_option
@output_option("interpolation.png")
@device_option
def interpolate(
    pipeline: str,
    pairs: int,
    between: str | None,
    steps: int,
    seed: int,
    output: Path,
    device: str,
) -> None:
    """Images on the way from one sample to another, a row for each pair."""
    from glann import images
    from glann.pipeline import GLANN

    images.check_output(output)
    if between:
        ends = _numbers(between)
        if len(ends) != 2:
            raise GlannError(f"--between {between}: wanted two numbers, such as 3,7")
        if min(ends) < 0:
            raise GlannError(f"--between {between}: samples have numbers of 0 or more")
    else:
        ends = list(range(2 * pairs))
    loaded = GLANN.load(pipeline, device)
    codes = loaded.sampler.sample(max(ends) + 1, seed)[ends]
    made = loaded.interpolate(codes[0::2], codes[1::2], steps)
    click.echo(f"wrote {images.save_images(made, output, columns=steps)}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise GlannError(
            f"'{text}' was given; wanted numbers with commas, such as 0,5,17"
        ) from error


# ---------------------------------------------------------------------- comparing


features_option = click.option(
    "--features",
    type=click.Choice(["auto", "classifier", "inception", "random", "pixels"]),
    help="What scores are computed on: auto is a classifier of the labels where there are any, "
    "else random convolutions.",
)
weights_option = click.option(
    "--weights", type=click.Path(), help="File with Inception's weights, for --features inception."
)


@main.command()
@click.argument("pipeline", required=False)
@click.option("--fake", type=click.Path(path_type=Path), help="Score these images instead.")
@click.option(
    "--real",
    type=click.Path(path_type=Path),
    help="Against these.  [default: the test images that belong to PIPELINE's training images]",
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
    n: int,
    features: str | None,
    weights: str | None,
    output: Path | None,
    data: str | None,
    quiet: bool,
    device: str,
) -> None:
    r"""Score a sampler's images against real ones: FID, KID, precision, recall and more.

    PIPELINE is a run's folder, a pipeline's, a baseline's, or the name of one that ships. Beside
    its samples stand the training images (the floor: what a perfect sampler would get), the
    reconstructions, and one Gaussian and a mixture on the codes, which stage two has to beat.

    \b
      glann evaluate runs/digits
      glann evaluate --real photos/ --fake somebodys-samples.npy
    """
    if (pipeline is None) == (fake is None):
        raise click.UsageError("give either a PIPELINE or --fake IMAGES")
    if fake is not None and real is None:
        raise click.UsageError("--fake IMAGES needs --real IMAGES to be scored against")
    from glann import comparison
    from glann.report import markdown_table

    rows = comparison.evaluate(
        pipeline,
        real=real,
        fake=fake,
        data=data,
        folder=output,
        samples=n,
        features=features or "auto",
        weights=weights,
        device=device,
        progress=not quiet,
        command=_command(),
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
    r"""GLANN beside GANs and others: same images, same generator, same scores.

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
    resolved = _resolve(recipe, (*overrides, *extra))
    if dry_run:
        click.echo(resolved.to_toml(), nl=False)
        return
    from glann import comparison

    # Trained to other lengths, it is another run.
    name = resolved.name if budget_seconds is None else f"{resolved.name}-{budget_seconds:g}s"
    folder = run or RUNS / name
    if restart:
        shutil.rmtree(folder / "compare", ignore_errors=True)
    report = comparison.compare(
        resolved,
        folder,
        command=_command(),
        data=data,
        device=device,
        progress=not quiet,
        budget_seconds=budget_seconds,
        weights=weights,
        say=click.echo,
    )
    click.echo(f"look at   {report}")


STUDY_HELP = f"""The claims as experiments: carry out studies and report what they found.

NAME is one or several of

\b
{"".join(f"  {name:12}{claim}{chr(10)}" for name, claim in STUDIES.items())}
Each run of a study becomes a row in the run folder when it is done: the same command goes on where
it was stopped, and with changed settings makes only the rows that they change. The report shows all
studies that were carried out.

\b
  glann study modes --quick
  glann study modes --set seeds=10 --jobs 4
"""


@main.command("study", help=STUDY_HELP)
@click.argument("names", nargs=-1, required=True, type=click.Choice([*STUDIES]), metavar="NAME…")
@click.option("--quick", is_flag=True, help="Minutes on two cores: fewer seeds, shorter training.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Runs at a time, each in a process of its own.  [default: as many as there are cores]",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting, such as seeds=3; may be repeated. --dry-run shows them all.",
)
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    help="Run folder.  [default: runs/study-NAME, with --quick runs/study-NAME-quick]",
)
@click.option("--dry-run", is_flag=True, help="Print the settings and the names of the runs; stop.")
@click.option("--restart", is_flag=True, help="Delete the rows that are there; begin anew.")
@data_option
@quiet_option
@device_option
def study(
    names: tuple[str, ...],
    quick: bool,
    jobs: int | None,
    overrides: tuple[str, ...],
    run: Path | None,
    dry_run: bool,
    restart: bool,
    data: str | None,
    quiet: bool,
    device: str,
) -> None:
    """Carry out studies; STUDY_HELP is what the user sees."""
    from glann.studies import find_study
    from glann.studies.study import load_settings, to_toml
    from glann.studies.work import carry_out

    if len(names) > 1 and (run or overrides):
        raise click.UsageError("--run and --set belong to one study: name one")
    report = None
    for name in names:
        asked = find_study(name)
        settings = load_settings(asked, overrides, quick)
        if dry_run:
            keys = " ".join(item.key for item in asked.runs(settings))
            click.echo(f"{to_toml(settings)}# runs: {keys}")
            continue
        report = carry_out(
            asked,
            settings,
            run or RUNS / f"study-{name}{'-quick' * quick}",
            command=_command(),
            jobs=jobs,
            data=data,
            device=device,
            restart=restart,
            say=lambda text: None if quiet else click.echo(text),
        )
    if report is not None:
        click.echo(f"look at   {report}")


@main.command("bench")
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    help="Measure this alone: stage-one, training, stage-two, matching, growth, samples, features, "
    "scores or start; may be repeated.",
)
@click.option(
    "--rounds",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Of each way of doing the work, which take turns; medians are shown.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: as torch takes]")
@click.option(
    "--quick", is_flag=True, help="Tiny sizes: shows that all works, but measures nothing."
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write every round there.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw matching's time and memory as codes grow to a million: x.png or x.svg.",
)
@quiet_option
@device_option
def bench(
    only: tuple[str, ...],
    rounds: int,
    threads: int | None,
    quick: bool,
    file: Path | None,
    plot: Path | None,
    quiet: bool,
    device: str,
) -> None:
    r"""How fast this is here, beside a plain reading of the method, other libraries, the machine.

    Both stages, matching alone, sampling, scoring and start-up, as they are in use. "Plain" is the
    method as one would first write it down (glann/bench/plain.py); faiss, if it is installed, and
    scikit-learn do the matching too; the limit is the best product of matrices that this machine
    does. Takes some minutes: leave the machine alone meanwhile.

    \b
      glann bench --only matching --only stage-two
      glann bench --json bench.json --plot growth.png
    """
    from glann import bench as benchmark
    from glann import storage
    from glann.bench.chart import check_plot, plot_growth
    from glann.bench.table import as_text

    if plot is not None:
        check_plot(plot, only)
    found = benchmark.bench(
        only=only,
        rounds=rounds,
        quick=quick,
        device=device,
        threads=threads,
        command=_command(),
        say=lambda text: None if quiet else click.echo(text, err=True),
    )
    if file is not None:
        storage.write_json(file, found)
    if plot is not None:
        plot_growth(found, plot)
    click.echo(as_text(found), nl=False)
    for path in (file, plot):
        if path is not None:
            click.echo(f"wrote {path}")


def _command() -> str:
    """What the user typed."""
    return shlex.join(["glann", *sys.argv[1:]])


# ---------------------------------------------------------------------- looking


@main.command()
@click.argument("folder_or_name", metavar="FOLDER")
def inspect(folder_or_name: str) -> None:
    """What a run, a saved pipeline or a mapper is, and how far it has come.

    FOLDER is a run's (runs/digits), a pipeline's, one of train-imle --codes, or the name of a
    pipeline that ships with glann (digits).
    """
    from glann.inspection import describe

    for name, value in describe(folder_or_name):
        click.echo(f"{name:14} {value}")


@main.command()
@click.option("--settings", is_flag=True, help="List every setting of a recipe instead.")
def recipes(settings: bool) -> None:
    """List the shipped recipes: what they are of and what to expect."""
    if settings:
        from glann.recipes import describe_settings

        for name, default, help_text in describe_settings():
            click.echo(f"{name:22} {default:14} {help_text}")
        return
    from glann.places import shipped_pipelines, shipped_recipes

    trained = shipped_pipelines()
    for name, path in shipped_recipes().items():
        click.secho(name, bold=True, nl=False)
        click.echo(
            "  (a trained pipeline ships: glann sample " + name + ")" if name in trained else ""
        )
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            click.echo("  " + line.removeprefix("#").strip())
        click.echo("")
