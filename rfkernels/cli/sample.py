"""`rfkernels sample`: draw samples from a run into a picture or a file of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rfkernels._whole_file import write_whole
from rfkernels.cli.options import Device, Force, Grid, Shift, Silent, check_counts, choose_device
from rfkernels.cli.output import check_file, say, write_arrays

_SUFFIXES = (".png", ".safetensors", ".npz")


def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="A .png picture, or .npz / .safetensors with the array x."
        ),
    ],
    n: Annotated[
        int | None,
        typer.Option("--n", "-n", help="How many samples.", show_default="64; 8 with --compare"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the solver.", show_default="8; none for dopri5")
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="euler, heun, ab2, fireflow, unipc, dpm++, dopri5, sde, ... (docs/samplers.md); "
            "with --compare several, with commas.",
            show_default="the run's: euler, for most; all with --compare",
        ),
    ] = None,
    shift: Shift = None,
    grid: Grid = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="One picture of the same noises under every solver, at --nfe."
        ),
    ] = False,
    nfe: Annotated[
        str | None,
        typer.Option(
            help="Network evaluations that --compare shows, with commas.", show_default="4,8,16"
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale, for a conditional run.")
    ] = None,
    label: Annotated[
        int | None, typer.Option(help="The class to draw.", show_default="all in turn")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the noise. Sample i is the same whatever --n is.")
    ] = 0,
    batch: Annotated[int, typer.Option(help="Samples computed at a time.")] = 256,
    force: Force = False,
    device: Device = None,
    quiet: Silent = False,
) -> None:
    """Draw samples from a run.

    [bold]Examples[/]

      rfkernels sample runs/digits --n 64 --steps 32 --out digits.png

      rfkernels sample runs/digits-2rf --steps 1 --out one-step.png

      rfkernels sample runs/mnist --label 3 --guidance 2 --solver heun --out threes.npz

      rfkernels sample runs/digits --compare --nfe 4,8,16 --out solvers.png
    """
    import torch

    from rfkernels.cli.pictures import is_image, one_grid, require_pictures
    from rfkernels.cli.plots import point_cloud
    from rfkernels.cli.run_grid import choose_grid
    from rfkernels.cli.solver_comparison import compared, evaluation_counts, show_distances
    from rfkernels.metrics.drawer import Drawer
    from rfkernels.training import load

    n = (8 if compare else 64) if n is None else n
    check_counts(n=n, batch=batch)
    if seed < 0:
        raise ValueError(f"seed: must not be negative; got {seed}")
    if nfe is not None and not compare:
        raise ValueError(f"nfe: belongs to --compare; give --steps instead; got {nfe!r}")
    counts = evaluation_counts(nfe or "4,8,16") if compare else ()
    if compare and steps is not None:
        raise ValueError(f"steps: leave it out with --compare, which takes --nfe; got {steps}")
    check_file("out", out, (".png",) if compare else _SUFFIXES, force=force)
    loaded = load(run, device=choose_device(device))
    drawer = Drawer(loaded, guidance=guidance, label=label)
    shape = drawer.sample_shape
    picture = out.suffix.lower() == ".png"
    if picture:
        if not is_image(shape) and shape != (2,):
            raise ValueError(
                f"out: samples of the shape {shape} are no pictures; give an .npz or .safetensors file"
            )
        require_pictures()
    solver = solver if compare else solver or drawer.default_solver
    times = choose_grid(
        loaded, grid, shift, solver=None if compare else solver, guidance=guidance, quiet=quiet
    )
    options = {"seed": seed, "grid": times, "batch": batch}
    if compare:
        found = compared(drawer, solver, counts, torch.arange(n), options)
        write_whole(out, found.picture)
        if not quiet:
            show_distances(found, counts)
            solvers = "1 solver" if found.solvers == 1 else f"{found.solvers} solvers"
            allowed = ",".join(map(str, counts))
            say(f"{n} noises, {solvers}, {allowed} network evaluations. Wrote {out}")
        return
    if steps is None and solver != "dopri5":
        steps = 8
    index = torch.arange(n)
    x, cost = drawer.draw(index, steps=steps, solver=solver, progress=not quiet, **options)
    labels = drawer.labels(index)
    if picture:
        write_whole(out, one_grid(x) if is_image(shape) else point_cloud(x))
    else:
        # x (n, ...) float32 and, of a conditional run, labels (n,) int64: `train --dataset` reads it.
        values = {"x": x} | ({} if labels is None else {"labels": labels})
        write_arrays(out, values)
    if not quiet:
        say(f"{n} samples, network evaluations for each: {cost:g}. Wrote {out}")
