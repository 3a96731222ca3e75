"""Commands that measure: the claims as studies, and the speed of this machine."""

from pathlib import Path

import click

from glann.cli.group import main
from glann.cli.options import data_option, device_option, quiet_option, typed
from glann.places import RUNS
from glann.studies import STUDIES

STUDY_HELP = f"""The claims as experiments.

Carries out studies and reports what they found. NAME is one or several of

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
    from glann.studies.study import load_settings, looks_for_images, to_toml
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
        # What was given for one of several studies is nothing to another without files.
        its_data = data if len(names) == 1 or looks_for_images(settings) else None
        report = carry_out(
            asked,
            settings,
            run or RUNS / f"study-{name}{'-quick' * quick}",
            command=typed(),
            jobs=jobs,
            data=its_data,
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
    help="Times that each way is measured, in turns; medians are shown.",
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
    """How fast this is here, beside other ways to do it.

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
        command=typed(),
        say=lambda text: None if quiet else click.echo(text, err=True),
    )
    click.echo(as_text(found), nl=False)  # first: a file that can't be written costs no minutes
    if file is not None:
        storage.write_json(file, found)
    if plot is not None:
        plot_growth(found, plot)
    for path in (file, plot):
        if path is not None:
            click.echo(f"wrote {path}")
