"""`rfkernels sample`: draw samples from a run into a picture or a file of arrays."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer

from rfkernels.cli.options import Device, choose_device
from rfkernels.cli.output import check_file, say, write_bytes

_SUFFIXES = (".png", ".safetensors", ".npz")


def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="A .png picture, or .npz / .safetensors with the array x."
        ),
    ],
    n: Annotated[int, typer.Option("--n", "-n", help="How many samples.")] = 64,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the solver.", show_default="8; none for dopri5")
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="euler, midpoint, heun, rk4, ab2, taylor, dopri5, rf++ or flow-map.",
            show_default="the run's: euler, for most",
        ),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(help="Time shift of the grid: above 1, more steps near the noise."),
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
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing.")] = False,
) -> None:
    """Draw samples from a run.

    [bold]Examples[/]

      rfkernels sample runs/digits --n 64 --steps 32 --out digits.png

      rfkernels sample runs/digits-2rf --steps 1 --out one-step.png

      rfkernels sample runs/mnist --label 3 --guidance 2 --solver heun --out threes.npz
    """
    import torch

    from rfkernels.cli.pictures import is_image, one_grid, require_pictures
    from rfkernels.cli.plots import point_cloud
    from rfkernels.metrics.drawer import Drawer
    from rfkernels.training import load

    for name, value in (("n", n), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1; got {value}")
    if seed < 0:
        raise ValueError(f"seed: must not be negative; got {seed}")
    check_file("out", out, _SUFFIXES, force=force)
    drawer = Drawer(load(run, device=choose_device(device)), guidance=guidance, label=label)
    shape = drawer.sample_shape
    picture = out.suffix.lower() == ".png"
    if picture:
        if not is_image(shape) and shape != (2,):
            raise ValueError(
                f"out: samples of the shape {shape} are no pictures; give an .npz or .safetensors file"
            )
        require_pictures()
    solver = solver or drawer.default_solver
    if steps is None and solver != "dopri5":
        steps = 8
    index = torch.arange(n)
    try:
        x, nfe = drawer.draw(
            index,
            seed=seed,
            steps=steps,
            solver=solver,
            grid=shift,
            batch=batch,
            progress=not quiet,
        )
    except RuntimeError as error:
        # An adaptive solver that gives up is about this flow and its tolerances; other errors are bugs.
        if str(error).startswith("dopri5:"):
            raise ValueError(str(error)) from error
        raise
    labels = drawer.labels(index)
    if picture:
        write_bytes(out, one_grid(x) if is_image(shape) else point_cloud(x))
    else:
        write_bytes(out, _arrays(out.suffix.lower(), x, labels))
    if not quiet:
        say(f"{n} samples, network evaluations for each: {nfe:g}. Wrote {out}")


def _arrays(suffix: str, x, labels) -> bytes:
    """The file's bytes: x (n, ...) float32 and, of a conditional run, labels (n,) int64; `train --dataset` reads it."""
    arrays = {"x": x.contiguous()} | ({} if labels is None else {"labels": labels.contiguous()})
    if suffix == ".safetensors":
        from safetensors.torch import save

        return save(arrays)
    import numpy

    stream = io.BytesIO()
    numpy.savez(stream, **{name: value.numpy() for name, value in arrays.items()})
    return stream.getvalue()
