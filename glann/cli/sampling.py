"""Commands that use what was trained: new images, reconstructions, codes, ways between samples."""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glann.cli.group import main
from glann.cli.options import data_option, device_option, output_option, seed_option
from glann.errors import GlannError

if TYPE_CHECKING:
    import torch

    from glann.pipeline import GLANN, CodeSampler

AT_A_TIME = 8192
"""Samples between two moves of the bar."""


@main.command()
@click.argument("pipeline")
@click.option(
    "-n", "n", default=64, show_default=True, type=click.IntRange(1), help="Number of images."
)
@seed_option
@click.option(
    "--start",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Number of the first: sample 7 of a seed is always the same image.",
)
@click.option("--columns", type=click.IntRange(1), help="Columns of the grid, where it is one.")
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
        if images.ending(output) != ".npy":
            raise GlannError(
                f"{pipeline} gives codes, not images; wanted -o x.npy, got -o {output}"
            )
        sampler = load_sampler(pipeline)
        _check_room(output, n, 4 * sampler.sample(1).shape[1], "codes")
        click.echo(f"wrote {images.save_array(_drawn(sampler, n, seed, start), output)}")
        return
    loaded = GLANN.load(pipeline, device)
    _check_room(output, n, math.prod(loaded.image_shape), "images")
    click.echo(f"wrote {images.save_images(_drawn(loaded, n, seed, start), output, columns)}")


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
    """Training images as the generator makes them from codes.

    PIPELINE is a run's folder, or a pipeline that was saved --with-codes.
    """
    from glann import images, runner

    images.check_output(output)
    loaded = runner.load_with_codes(pipeline, device)
    assert loaded.codes is not None
    chosen = _numbers(indices) if indices is not None else list(range(min(n, len(loaded.codes))))
    made = loaded.reconstruct(chosen)
    columns, shown = None, len(made)
    if originals:
        place = data or runner.place_of(pipeline)
        real = runner.training_images(loaded, place).images[chosen]
        error = (images.to_float(made) - images.to_float(real)).abs().mean()
        click.echo(f"mean absolute error of a pixel: {float(error):.4f} (of 1)")
        if images.ending(output) == ".png":
            made, columns, shown = images.interleave(real, made), min(8, shown), 2 * shown
    click.echo(f"wrote {images.save_images(made, output, columns, shown)}")


@main.command()
@click.argument("pipeline")
@click.argument("folder_or_file", type=click.Path(path_type=Path))
@click.option(
    "--steps",
    default=300,
    show_default=True,
    type=click.IntRange(1),
    help="Steps of optimisation for each image.",
)
@click.option("--codes", type=click.Path(path_type=Path), help="Write the codes too: x.npy.")
@output_option("projected.png")
@device_option
def project(
    pipeline: str, folder_or_file: Path, steps: int, codes: Path | None, output: Path, device: str
) -> None:
    """Find codes for new images, and show how near they come.

    FOLDER_OR_FILE holds images, or is one, or an array (.npy, .npz). They are scaled and cropped to
    the pipeline's size.
    """
    from glann import images
    from glann.data import read_images
    from glann.pipeline import GLANN

    images.check_output(output)
    if codes is not None and images.ending(codes) != ".npy":
        raise GlannError(f"--codes {codes}: wanted a name that ends in .npy")
    loaded = GLANN.load(pipeline, device)
    channels, *size = loaded.image_shape
    given = read_images(folder_or_file, size=size, channels=channels)
    found = loaded.project(given, steps=steps)
    errors = found.errors
    click.echo(
        f"mean absolute error of a pixel over {len(given)} image{'s' * (len(given) != 1)}: "
        f"{float(errors.mean()):.4f} (of 1; best {float(errors.min()):.4f}, worst "
        f"{float(errors.max()):.4f}, image {int(errors.argmax())})"
    )
    made, columns, shown = found.images, None, len(given)
    if images.ending(output) == ".png":
        made, columns, shown = images.interleave(given, made), min(8, shown), 2 * shown
    click.echo(f"wrote {images.save_images(made, output, columns, shown)}")
    if codes is not None:
        click.echo(f"wrote {images.save_array(found.codes, codes)}")


@main.command()
@click.argument("pipeline")
@click.option(
    "--pairs", default=8, show_default=True, type=click.IntRange(1), help="Pairs, a row for each."
)
@click.option("--between", help="Numbers of two samples instead, such as 3,7.")
@click.option(
    "--steps",
    default=10,
    show_default=True,
    type=click.IntRange(2),
    help="Images in a row, both ends included.",
)
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
    """Images on the way from one sample to another."""
    import torch

    from glann import images
    from glann.pipeline import GLANN

    images.check_output(output)
    if between is not None:
        ends = _numbers(between)
        if len(ends) != 2:
            raise GlannError(f"--between {between}: wanted two numbers, such as 3,7")
        if min(ends) < 0:
            raise GlannError(f"--between {between}: samples have numbers of 0 or more")
    else:
        ends = list(range(2 * pairs))
    loaded = GLANN.load(pipeline, device)
    if between is None:
        codes = loaded.sampler.sample(len(ends), seed)
    else:  # not all those before them
        codes = torch.cat([loaded.sampler.sample(1, seed, number) for number in ends])
    made = loaded.interpolate(codes[0::2], codes[1::2], steps)
    click.echo(f"wrote {images.save_images(made, output, columns=steps)}")


def _check_room(output: Path, n: int, size: int, what: str) -> None:
    """Refuse more than the disk has room for, before the work is done."""
    place = next(each for each in (output.absolute(), *output.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    if n * size > max(free, 2**30):  # of less, the error in writing tells
        raise GlannError(
            f"-n {n}: so many {what} of {size:,} bytes are {n * size / 2**30:,.0f} GB, and "
            f"{free / 2**30:,.1f} GB are free in {place}"
        )


def _drawn(sampler: "CodeSampler | GLANN", n: int, seed: int, start: int) -> "torch.Tensor":
    """`n` samples, with a bar where that takes long."""
    import torch
    from tqdm import tqdm

    from glann import processes

    made, silent = [], not processes.is_first()
    with tqdm(total=n, unit_scale=True, leave=False, delay=3, disable=silent) as bar:
        for first in range(start, start + n, AT_A_TIME):
            made.append(sampler.sample(min(AT_A_TIME, start + n - first), seed, first))
            bar.update(len(made[-1]))
    return torch.cat(made)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise GlannError(
            f"'{text}' was given; wanted numbers with commas, such as 0,5,17"
        ) from error
