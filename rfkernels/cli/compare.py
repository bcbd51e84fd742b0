"""`rfkernels compare`: runs side by side, the same noises through each, as one picture and one HTML report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from rfkernels._whole_file import write_whole
from rfkernels.cli.eval import (
    Cache,
    Dataset,
    Draws,
    Features,
    Guidance,
    Runs,
    Seed,
    print_quality,
    step_counts,
)
from rfkernels.cli.options import Device, Quiet, choose_device, command_line, given
from rfkernels.cli.output import check_folder, say, write_csv, write_json
from rfkernels.cli.quality import json_values

if TYPE_CHECKING:
    from rfkernels.metrics.evaluate import Evaluation
    from rfkernels.metrics.real_data import RealData

_ACROSS, _DOWN = 10, 3  # images of a grid: with ten classes in turn, a column is a class
_POINTS = 1000


def compare(
    runs: Runs,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where report, pictures and tables go.")],
    dataset: Dataset = None,
    steps: Annotated[str, typer.Option(help="Numbers of steps, with commas.")] = "1,2,4,8",
    solver: Annotated[
        str | None,
        typer.Option(
            help="euler, heun, ab2, fireflow, unipc, ... (docs/samplers.md); not dopri5.",
            show_default="each run's own",
        ),
    ] = None,
    features: Features = "pixels",
    guidance: Guidance = None,
    draws: Draws = 5,
    seed: Seed = 0,
    cache: Cache = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Show runs side by side: samples from the same noises at 1, 2, 4 and 8 steps, with their quality.

    Writes report.html, one file that needs nothing else, and its parts: samples.png, quality.png, quality.csv and
    quality.json. The measures are those of rfkernels eval.

    [bold]Examples[/]

      rfkernels compare runs/digits runs/digits-2rf runs/digits-1step --out comparison

      rfkernels compare runs/a runs/b --solver heun --features classifier --out comparison
    """
    from rfkernels import metrics
    from rfkernels.cli.comparison_report import comparison_report
    from rfkernels.cli.pictures import COLOURS, grid_table, is_image, require_pictures
    from rfkernels.cli.plots import cloud_table, evaluation_plot, frame_of
    from rfkernels.metrics.evaluate import named
    from rfkernels.sampling.solvers import get_solver
    from rfkernels.training import load

    counts = step_counts(steps)
    require_pictures()
    check_folder("out", out)
    target = choose_device(device)
    loaded = {name: load(run, device=target) for name, run in named(runs).items()}
    shape = tuple(next(iter(loaded.values())).sample_shape)
    if not is_image(shape) and shape != (2,):
        raise ValueError(f"runs: make samples of the shape {shape}, which are no pictures")
    if solver is not None and get_solver(solver).adaptive:
        raise ValueError(f"solver: must take numbers of steps; got {solver}")
    real = metrics.real_data(list(loaded.values()), dataset)
    shown = _ACROSS * _DOWN if is_image(shape) else _POINTS
    found = metrics.evaluate(
        loaded,
        real,
        steps=counts,
        solvers=None if solver is None else [solver],
        features=features,
        draws=draws,
        guidance=guidance,
        seed=seed,
        device=target,
        cache=cache,
        keep=shown,
        progress=not quiet,
    )
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(loaded)}
    cells = _cells(found, real, list(loaded), counts, shown)
    columns = list(colours.items())
    samples = (
        grid_table(columns, list(cells), list(cells.values()), _ACROSS)
        if is_image(shape)
        else cloud_table(columns, list(cells), list(cells.values()), frame_of(cells["real"][0]))
    )
    plot = evaluation_plot(found)
    options = {
        "--dataset": dataset, "--steps": steps, "--solver": solver, "--features": features,
        "--guidance": guidance, "--draws": draws, "--seed": seed,
    }  # fmt: skip
    words = [word for name, value in given(**options).items() for word in (name, str(value))]
    command = command_line("compare", *runs, "--out", out, *words)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "samples.png", samples)
    write_whole(out / "quality.png", plot)
    write_csv(out / "quality.csv", found.table())
    write_json(out / "quality.json", json_values(found))
    report = comparison_report(found, cells, colours, plot, command, _ACROSS)
    write_whole(out / "report.html", report.encode())
    print_quality(found)
    for name in ("report.html", "samples.png", "quality.png", "quality.csv", "quality.json"):
        say(f"  {out / name}")


def _cells(
    found: Evaluation, real: RealData, names: list[str], counts: list[int], shown: int
) -> dict[str, list[torch.Tensor | None]]:
    """Row label -> the samples of every run; the last row has held-out data in its first place."""
    by_steps = {(run, count): samples for (run, _, count), samples in found.samples.items()}
    cells: dict[str, list[torch.Tensor | None]] = {
        f"{count} step" + "s" * (count > 1): [by_steps[name, count] for name in names]
        for count in counts
    }
    # From all over the held-out part: data sets come sorted by class.
    part = real.held_out[:: max(1, len(real.held_out) // shown)][:shown]
    return cells | {"real": [part, *[None] * (len(names) - 1)]}
