"""What commands have in common: options, and the recipe that these change."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from glann.recipes import Recipe


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where to compute: auto (a GPU where there is one), cpu, cuda, cuda:1, mps.",
)
seed_option = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the samples."
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress.")
data_option = click.option(
    "--data",
    type=click.Path(),
    help="Where the images are: a folder or a file.  [default: of a trained run where they "
    "were then, else $GLANN_DATA/SOURCE or data/SOURCE, else fetched]",
)
recipe_options = together(
    click.option(
        "--run", type=click.Path(path_type=Path), help="Run folder.  [default: runs/RECIPE]"
    ),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Change a setting, such as glo.epochs=5 or seed=1; may be repeated. `glann recipes "
        "--settings` lists them all.",
    ),
    click.option("--dry-run", is_flag=True, help="Print the resolved recipe and stop."),
    click.option(
        "--restart",
        is_flag=True,
        help="Begin anew: what this stage had learned, and what came of it, is deleted; of compare "
        "the scores alone.",
    ),
    quiet_option,
    device_option,
)
precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Precision of matrix products while training; auto: bfloat16 on GPUs and CPUs that are "
    "made for it.  [default: as in the recipe]",
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
imle_options = together(
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


features_option = click.option(
    "--features",
    type=click.Choice(["auto", "classifier", "inception", "random", "pixels"]),
    help="What scores are computed on: auto is a classifier of the labels where there are enough "
    "(500 training images, 10 of each class, labelled test images), else random convolutions.",
)
weights_option = click.option(
    "--weights", type=click.Path(), help="File with Inception's weights, for --features inception."
)


def resolve(
    recipe: str | None,
    overrides: tuple[str, ...],
    changes: dict[str, str | None] | None = None,
) -> "Recipe":
    """The recipe with what --set and other options change; an option that isn't given is None."""
    from glann.recipes import load_recipe

    extra = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items() if value]
    return load_recipe(recipe, [*overrides, *extra])


def show(recipe: "Recipe", data: str | None) -> None:
    """Print a recipe as TOML, that says where the images are if --data does."""
    if data is not None:
        recipe.data.path = str(Path(data).absolute())
    click.echo(recipe.to_toml(), nl=False)


def typed() -> str:
    """What the user typed."""
    return shlex.join(["glann", *sys.argv[1:]])
