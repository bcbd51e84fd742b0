"""What several subcommands take alike: options, settings as name=value, the device, an interrupted run's own config."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rfkernels.training.processes import join_processes
from rfkernels.training.run_folder import read_config

__all__ = [
    "BatchSize",
    "Device",
    "FirstImages",
    "Force",
    "Grid",
    "ImagesAtATime",
    "Loss",
    "PairGuidance",
    "PairSolver",
    "PairSteps",
    "Quiet",
    "Resume",
    "Settings",
    "Shift",
    "Silent",
    "TrainSeed",
    "begun",
    "check_counts",
    "choose_device",
    "command_line",
    "given",
    "parse_settings",
]

Device = Annotated[
    str | None,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1, ...",
        show_default="cuda if there is one, else cpu",
    ),
]

# Of training.
BatchSize = Annotated[int | None, typer.Option(help="Samples per step.", show_default="256")]
Loss = Annotated[
    str | None,
    typer.Option(help="mse, pseudo_huber or pseudo_huber_elementwise.", show_default="mse"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the interrupted run in that folder.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other option of TrainConfig, e.g. --set clip_norm=0.5",
    ),
]
TrainSeed = Annotated[
    int | None, typer.Option(help="Everything random follows from it.", show_default="0")
]

# Of a teacher's pairs.
PairGuidance = Annotated[
    float | None, typer.Option(help="Guidance scale of the pairs, for a conditional run.")
]
PairSolver = Annotated[
    str | None, typer.Option(help="Solver of the teacher's ODE.", show_default="heun")
]
PairSteps = Annotated[int | None, typer.Option(help="Its steps.", show_default="20")]

# Of what a run makes of noises or images.
FirstImages = Annotated[
    int | None, typer.Option("--n", "-n", help="The first so many images.", show_default="all")
]
Force = Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")]
Grid = Annotated[
    str | None,
    typer.Option(
        help="Another grid: uniform, karras, exponential, beta; or optimised, made for this run once "
        "and kept in its grid.json."
    ),
]
ImagesAtATime = Annotated[int, typer.Option(help="Images computed at a time.")]
Shift = Annotated[
    float | None,
    typer.Option(help="Time shift of the grid: above 1, more steps near the noise."),
]
Silent = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing.")]


def parse_settings(option: str, settings: Sequence[str] | None) -> dict[str, Any]:
    """name=value pairs as a dict; a value is read as JSON where it is JSON, and is text otherwise.

    Raises:
        ValueError: no "=" in one of them, or a name given twice.
    """
    found: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"{option}: must look like NAME=VALUE; got {setting!r}")
        if name in found:
            raise ValueError(f"{option}: {name} is given twice")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave; None is one that was left out."""
    return {name: value for name, value in options.items() if value is not None}


def check_counts(**counts: int | None) -> None:
    """Refuses what is below 1; None is an option that was left out.

    Raises:
        ValueError: so it is.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: must be at least 1; got {value}")


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is; under torchrun, this process's, and it joins
    the others.

    Raises:
        ValueError: unknown, or not there.
    """
    if name is None:
        return join_processes("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: must be cpu, cuda, cuda:N, mps, ...; got {name!r}") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name} cannot be used here ({reason})") from None
    return join_processes(device)


def begun(folder: Path, kind: str, *, resume: bool) -> dict[str, Any] | None:
    """config.json of the run to go on with; None when a new run is to begin in `folder`.

    Raises:
        ValueError: the run there is of another kind.
    """
    if not resume or not (folder / "config.json").is_file():
        return None
    description = read_config(folder)
    if description.get("kind") != kind:
        raise ValueError(
            f"resume: {folder} holds a run of kind {description.get('kind')!r}, not {kind!r}"
        )
    return description


def command_line(*words: str | Path) -> str:
    """A command to show to the user, ready to be pasted into a shell."""
    return shlex.join(["rfkernels", *map(str, words)])
