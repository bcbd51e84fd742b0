"""`rfkernels distill`: a student that does a flow's work in one step, or in k."""

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


def distill(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The teacher; a reflowed run distils best.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the new run.")],
    k: Annotated[
        int | None, typer.Option("--k", help="Euler steps of the student.", show_default="1")
    ] = None,
    pairs_from: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Pairs to learn from, e.g. RUN/pairs.", show_default="new ones"
        ),
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(help="New pairs to make.", show_default="10000")
    ] = None,
    solver: PairSolver = None,
    pair_steps: PairSteps = None,
    guidance: PairGuidance = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="1500")] = None,
    batch_size: BatchSize = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Its peak.", show_default="1e-3")
    ] = None,
    loss: Loss = None,
    seed: TrainSeed = None,
    settings: Settings = None,
    resume: Resume = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Distil a flow into a student of one Euler step, or of k.

    [bold]Examples[/]

      rfkernels distill runs/digits-2rf --out runs/digits-1step

      rfkernels distill runs/digits-2rf --out runs/digits-1step --pairs-from runs/digits-2rf/pairs

      rfkernels distill runs/mnist-2rf --out runs/mnist-4step --k 4
    """
    import rfkernels.training as training

    saved = begun(out, "distill", resume=resume)
    target = choose_device(device)
    teacher = training.load(run, device=target)
    own = given(k=k, pairs=pairs, solver=solver, pair_steps=pair_steps, guidance_scale=guidance)
    if pairs_from is not None:
        refused = given(pairs=pairs, solver=solver, pair_steps=pair_steps, guidance=guidance)
        if refused:
            raise ValueError(
                f"{next(iter(refused))}: belongs to new pairs; leave it out with --pairs-from"
            )
    inner = given(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, loss=loss, seed=seed
    ) | parse_settings("set", settings)
    fresh = {"steps": 1500, "learning_rate": 1e-3}
    before = {"train": fresh} if saved is None else saved["config"]
    config = training.from_dict(
        training.DistillConfig, {**before, **own, "train": {**before["train"], **inner}}
    )
    words = ["distill", run, "--out", out, "--resume"]
    with resumable(
        command_line(*words, *([] if pairs_from is None else ["--pairs-from", pairs_from]))
    ):
        training.distill(
            teacher, config, pairs=pairs_from, run=out, resume=resume, progress=not quiet
        )
    say(f"The student of {config.k} step{'s' if config.k > 1 else ''} is in {out}")
    shown = command_line("sample", out, "--steps", str(config.k), "--out", "samples.png")
    say(f"Next: {shown}")
