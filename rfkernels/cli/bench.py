"""`rfkernels bench`: times the kernels against eager torch and torch.compile, with the checkout's benchmarks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import rfkernels


def bench(
    context: typer.Context,
    benchmarks: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The folder `benchmarks` of a checkout.", show_default="looked for"
        ),
    ] = None,
) -> None:
    """Time the kernels: ours against the best eager torch and torch.compile, each with its error and its limit.

    The benchmarks are part of the source tree, not of the installed package; all other options go to them.

    [bold]Examples[/]

      rfkernels bench --quick

      rfkernels bench --check --out cpu.csv

      rfkernels bench --benchmarks ~/rfkernels/benchmarks

      rfkernels bench -- --help
    """
    script = find_benchmarks(benchmarks)
    # A process of its own: benchmarks pin threads and reset compilers, and are run as the checkout documents it.
    done = subprocess.run([sys.executable, str(script), *context.args], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode if done.returncode > 0 else 128 - done.returncode)


def find_benchmarks(folder: Path | None) -> Path:
    """benchmarks/run.py: in `folder`, else beside the package's source, else below the current folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if folder is not None:
        if (folder / "run.py").is_file():
            return folder / "run.py"
        raise FileNotFoundError(
            f"benchmarks: {folder} has no run.py; give the folder benchmarks of a checkout"
        )
    source = Path(rfkernels.__file__).resolve().parents[1]
    for place in (source, Path.cwd()):
        # Site-packages may hold a folder of that name from another package: an op's file tells them apart.
        if (place / "benchmarks" / "ops" / "ode_step.py").is_file():
            return place / "benchmarks" / "run.py"
    raise FileNotFoundError(
        "benchmarks: they come with the source tree, not with the installed package; "
        "run this in a checkout, or give --benchmarks DIR"
    )
