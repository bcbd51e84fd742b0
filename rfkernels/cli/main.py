"""The command's frame: which subcommands there are, and how every error becomes one line and an exit code.

Exit codes: 0 done; 1 the demo missed a target; 2 the input is wrong, or the surroundings are (a package, a file, disk
space); 130 interrupted.
Anything else that goes wrong is a bug in this package and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from rfkernels import BackendUnavailableError, __version__
from rfkernels.cli.bench import bench
from rfkernels.cli.compare import compare
from rfkernels.cli.demo import demo
from rfkernels.cli.distill import distill
from rfkernels.cli.doctor import doctor
from rfkernels.cli.edit import edit
from rfkernels.cli.eval import evaluate
from rfkernels.cli.invert import invert
from rfkernels.cli.reflow import reflow
from rfkernels.cli.sample import sample
from rfkernels.cli.train import train
from rfkernels.sampling.run import TolerancesNotReachedError
from rfkernels.training import TrainingDivergedError
from rfkernels.training.processes import leave_processes

__all__ = ["app", "main"]

# What the package raises for wrong input and for surroundings that cannot serve it.
_EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    BackendUnavailableError,
    TolerancesNotReachedError,
    TrainingDivergedError,
    torch.OutOfMemoryError,
)
# typer's own usage errors; BadParameter is the only one it exports, the base of all is two classes above it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="rfkernels",
    help="Train, straighten and sample rectified flows.\n\n"
    "Start with: rfkernels demo (real digits, two CPU cores, no network, under three minutes)",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rfkernels {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _frame(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option("--traceback", help="Show where an error came from, for a report of a bug."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _name, _function in (
    ("demo", demo),
    ("train", train),
    ("reflow", reflow),
    ("distill", distill),
    ("sample", sample),
    ("invert", invert),
    ("edit", edit),
    ("eval", evaluate),
    ("compare", compare),
    ("bench", bench),
    ("doctor", doctor),
):
    # What `rfkernels bench` does not know itself is for the benchmarks: `--quick`, `--only OP`, ...
    _rest = {"allow_extra_args": _name == "bench", "ignore_unknown_options": _name == "bench"}
    app.command(_name, context_settings=_rest)(_function)


def _one_line(error: Exception) -> str:
    """The error's message without its line breaks; a usage error's is made by typer."""
    message = error.format_message() if isinstance(error, _UsageError) else str(error)
    # str() of an OSError from the system begins with "[Errno 13]", which tells a user nothing.
    if isinstance(error, OSError) and error.strerror:
        at = "" if error.filename is None else f"{error.filename}: "
        message = f"{at}{error.strerror}"
    # The library speaks of its arguments; here the same thing is an option.
    message = message.replace("resume=True", "--resume")
    return " ".join(message.split()) or type(error).__name__


def _fail(arguments: Sequence[str], error: Exception) -> int:
    known = {command.name for command in app.registered_commands}
    name = next((a for a in arguments if a in known), None)
    where = f"rfkernels {name}" if name else "rfkernels"
    hint = f" (see: {where} --help)" if isinstance(error, _UsageError) else ""
    # Messages begin with the function they come from, and `rfkernels sample: sample: ...` says it twice.
    message = _one_line(error).removeprefix(f"{name}: ")
    print(f"{where}: {message}{hint}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        arguments: what follows the command's name; None takes them from the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=arguments, prog_name="rfkernels", standalone_mode=False)
    except BrokenPipeError:
        # The reader (head, less) left: not an error, but Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _UsageError as error:
        return _fail(arguments, error)
    except _EXPECTED as error:
        if "--traceback" in arguments:
            raise
        return _fail(arguments, error)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    finally:
        leave_processes()
    return code if isinstance(code, int) else 0
