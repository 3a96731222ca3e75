"""The group of all commands: their order, several processes, errors without a traceback."""

import contextlib
import errno
import io
import os
import sys
from typing import Any, NoReturn

import click

from glann import __version__
from glann.errors import GlannError

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


AGAIN = "The same command without --restart goes"

ENDED = (
    "another of the processes that torchrun started has ended, and none goes on without it. What "
    "was saved is kept"
)


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
        if _several():
            _meet(ctx, str(found[0]))
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what a user can mend becomes a message and exit code 2."""
        try:
            return super().invoke(ctx)
        except GlannError as error:
            message = str(error)
            if "--restart" in sys.argv:  # which would delete what was just saved
                message = message.replace("The same command goes", AGAIN)
            _say(message)
            # 130 is what a shell reports for a command that Ctrl-C ended.
            ctx.exit(130 if type(error).__name__ == "Interrupted" else 2)
        except click.UsageError:
            if _several() and os.environ.get("RANK", "0") != "0":  # all find the same
                ctx.exit(2)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            click.echo(f"Error: output can't be written: {error.strerror}", err=True)
            os._exit(2)  # what is left in a buffer would raise the same again
        except MemoryError as error:
            _out_of_memory(ctx, error)
        except RuntimeError as error:
            if _several():
                from glann import processes

                if processes.tells_of_an_end(error):
                    _say(ENDED)
                    ctx.exit(2)
            if type(error).__name__ != "OutOfMemoryError" and "allocate memory" not in str(error):
                raise
            _out_of_memory(ctx, error)


def _several() -> bool:
    """Whether torchrun started more processes than this one."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _say(message: str) -> None:
    """Print an error; of several processes that come to the same, one does."""
    if _several():
        from glann import processes

        if not processes.is_first_to_say(message):
            return
    click.echo(f"Error: {message}", err=True)


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
    _say(
        f"out of memory ({str(error).splitlines()[0] if str(error) else 'no details'}); "
        "try a smaller batch_size, fewer images (data.limit) or smaller ones (data.size), or keep "
        "codes on disk (glo.codes_on). What was saved is kept"
    )
    ctx.exit(2)


@click.group(
    cls=Glann, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="glann")
def main() -> None:
    """Train image generators without an adversary, in two stages.

    \b
    Stage one (GLO) learns a generator and a code for each image.
    Stage two (IMLE) learns to turn noise into such codes.

    \b
      glann sample digits -o out.png      sample a pipeline that ships with glann
      glann train digits                  train both stages of a recipe (seconds)
      glann sample runs/digits -n 100     sample what was trained
      glann train folder --data photos/   your own images
    """
