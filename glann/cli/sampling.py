"""Commands that use what was trained: new images, reconstructions, codes, ways between samples."""

from pathlib import Path

import click

from glann.cli.group import main
from glann.cli.options import data_option, device_option, output_option, seed_option
from glann.errors import GlannError


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
