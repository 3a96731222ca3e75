"""Commands that look: what a folder holds, and which recipes ship."""

import click

from glann.cli.group import main


@main.command()
@click.argument("folder_or_name", metavar="FOLDER")
def inspect(folder_or_name: str) -> None:
    """What a run or a pipeline is, and how far it has come.

    FOLDER is a run's (runs/digits), a pipeline's, one of train-imle --codes, or the name of a
    pipeline that ships with glann (digits).
    """
    from glann.inspection import describe

    for name, value in describe(folder_or_name):
        click.echo(f"{name:14} {value}")


@main.command()
@click.option("--settings", is_flag=True, help="List every setting of a recipe instead.")
def recipes(settings: bool) -> None:
    """List the recipes that ship, and what to expect of them.

    To make one of your own of it: `glann train NAME --dry-run > mine.toml`, change that file, and
    `glann train mine.toml`.
    """
    if settings:
        from glann.recipes import describe_settings

        for name, default, help_text in describe_settings():
            click.echo(f"{name:26} {default:16} {help_text}")
        return
    from glann.places import shipped_pipelines, shipped_recipes

    trained, paths = shipped_pipelines(), shipped_recipes()
    # Others of the same images, as mnist-short, last.
    for name in sorted(paths, key=lambda name: (name.rpartition("-")[0] in paths, name)):
        click.secho(name, bold=True, nl=False)
        click.echo(
            "  (a trained pipeline ships: glann sample " + name + ")" if name in trained else ""
        )
        for line in paths[name].read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            click.echo("  " + line.removeprefix("#").strip())
        click.echo("")
