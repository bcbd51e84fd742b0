"""`rfkernels invert`: the noise that a run's flow makes given images of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rfkernels.cli.options import (
    Device,
    FirstImages,
    Force,
    Grid,
    ImagesAtATime,
    Shift,
    Silent,
    check_counts,
    choose_device,
    given,
)
from rfkernels.cli.output import check_file, say, write_arrays


def invert(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    source: Annotated[
        str,
        typer.Option(
            "--in",
            metavar="IMAGES",
            help="A folder of images, an .npz or .safetensors file with the array x, or a data set.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="A .safetensors or .npz file for the noise, x0.")
    ],
    n: FirstImages = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the solver.", show_default="32; none for dopri5")
    ] = None,
    solver: Annotated[
        str, typer.Option(help="fireflow, taylor (RF-Solver), heun, ab2, uni-inv, dopri5, ...")
    ] = "fireflow",
    shift: Shift = None,
    grid: Grid = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale; 1 inverts best.")
    ] = None,
    label: Annotated[
        int | None,
        typer.Option(
            help="The class of all images, for a conditional run.", show_default="their own labels"
        ),
    ] = None,
    batch: ImagesAtATime = 256,
    force: Force = False,
    device: Device = None,
    quiet: Silent = False,
) -> None:
    """Carry images back to the noise they come from, and say how exact the way is.

    The file holds x0 (n, ...), labels where there are some, and round_trip (n), the root mean square
    error of each image after sampling from its x0 again on the same grid.

    [bold]Examples[/]

      rfkernels invert runs/digits --in digits --n 64 --out noise.safetensors

      rfkernels invert runs/faces --in photos --solver taylor --steps 30 --out noise.safetensors
    """
    import torch

    from rfkernels.cli.images import check_labels, first_rows, open_images
    from rfkernels.cli.run_grid import choose_grid
    from rfkernels.metrics.drawer import Drawer
    from rfkernels.sampling import get_solver, reconstruct
    from rfkernels.training import load

    check_counts(n=n, batch=batch)
    check_file("out", out, (".safetensors", ".npz"), force=force)
    if getattr(get_solver(solver), "stochastic", False):
        raise ValueError(f"solver: must be deterministic; got {solver!r}, which draws noise")
    device = choose_device(device)
    loaded = load(run, device=device)
    drawer = Drawer(loaded, guidance=guidance, label=label)
    data = open_images(source, drawer.sample_shape)
    index = first_rows(data, source, n)
    if drawer.num_classes is not None and label is None:
        check_labels(data, index, "label", drawer.num_classes)
    if steps is None and not get_solver(solver).adaptive:
        steps = 32
    times = choose_grid(loaded, grid, shift, solver=solver, guidance=guidance, quiet=quiet)
    found: dict[str, list[torch.Tensor]] = {"x0": [], "round_trip": [], "labels": []}
    # Uni-Inv is made for Euler's way back.
    back = "euler" if solver == "uni-inv" else None
    evaluations = 0.0
    with torch.no_grad():
        for rows in index.split(batch):
            read = data.rows(rows)
            condition = {}
            if drawer.num_classes is not None:
                labels = read.labels if label is None else torch.full_like(rows, label)
                condition = {"y": labels.to(device)}
                found["labels"].append(labels)
            trip = reconstruct(
                drawer.velocity,
                read.x.to(device),
                solver=solver,
                sample_solver=back,
                grid=times,
                condition=condition,
                guidance_scale=guidance,
                uncondition=None if guidance is None else {},
                progress=not quiet and len(index) > batch // 2,
                **given(steps=steps),
            )
            found["x0"].append(trip.x0.cpu())
            found["round_trip"].append(trip.error.cpu())
            evaluations += float(torch.as_tensor(trip.nfe).double().mean()) * len(rows)
    values = {name: torch.cat(parts) for name, parts in found.items() if parts}
    write_arrays(out, values)
    if not quiet:
        error = float(values["round_trip"].square().mean().sqrt())
        spread = float(values["x0"].std()) if values["x0"].numel() > 1 else float("nan")
        say(
            f"{len(index)} images, network evaluations for each way: {evaluations / len(index) / 2:g}. "
            f"Round trip error {error:.2g} rms; standard deviation of the noise {spread:.3f} (1 is that of "
            f"a draw). Wrote {out}"
        )
