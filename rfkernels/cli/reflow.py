"""`rfkernels reflow`: straighten a run's flow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rfkernels.cli.options import (
    BatchSize,
    Device,
    Loss,
    PairGuidance,
    PairSolver,
    PairSteps,
    Quiet,
    Resume,
    Settings,
    TrainSeed,
    begun,
    choose_device,
    command_line,
    given,
    parse_settings,
)
from rfkernels.cli.output import resumable, say


def reflow(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The run to straighten: of train, or of reflow again."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the new run.")],
    pairs: Annotated[
        int | None,
        typer.Option(help="Pairs (noise, sample) that the teacher makes.", show_default="10000"),
    ] = None,
    solver: PairSolver = None,
    pair_steps: PairSteps = None,
    guidance: PairGuidance = None,
    rounds: Annotated[
        int | None, typer.Option(help="How often to reflow.", show_default="1")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps per round.", show_default="2500")
    ] = None,
    batch_size: BatchSize = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Its peak.", show_default="1e-3")
    ] = None,
    time_distribution: Annotated[
        str | None,
        typer.Option(help="uniform, u-shaped, logit-normal, ...", show_default="u-shaped"),
    ] = None,
    loss: Loss = None,
    seed: TrainSeed = None,
    settings: Settings = None,
    resume: Resume = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Straighten a flow: its ODE makes pairs (noise, sample), and a copy of the network is trained on them.

    [bold]Examples[/]

      rfkernels reflow runs/digits --out runs/digits-2rf

      rfkernels reflow runs/mnist --out runs/mnist-2rf --pairs 50000 --guidance 1.5 --time-distribution u-shaped

      rfkernels reflow runs/digits --out runs/digits-2rf --resume
    """
    import rfkernels.training as training

    saved = begun(out, "reflow", resume=resume)
    target = choose_device(device)
    teacher = training.load(run, device=target)
    own = given(
        rounds=rounds, pairs=pairs, solver=solver, pair_steps=pair_steps, guidance_scale=guidance
    )
    inner = given(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        time_distribution=time_distribution,
        loss=loss,
        seed=seed,
    ) | parse_settings("set", settings)
    # 2500 steps at 1e-3: what ReflowConfig starts from; U-shaped times are better for reflow (Lee et al., 2024).
    fresh = {"steps": 2500, "learning_rate": 1e-3, "time_distribution": "u-shaped"}
    before = {"train": fresh} if saved is None else saved["config"]
    config = training.from_dict(
        training.ReflowConfig, {**before, **own, "train": {**before["train"], **inner}}
    )
    with resumable(command_line("reflow", run, "--out", out, "--resume")):
        training.reflow(teacher, config, run=out, resume=resume, progress=not quiet)
    say(f"The straightened run is in {out}")
    say(f"Next: {command_line('sample', out, '--steps', '1', '--out', 'samples.png')}")
    say(f"      {command_line('distill', out, '--out', f'{out}-distilled')}")
