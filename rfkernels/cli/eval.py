"""`rfkernels eval`: quality against the number of steps, for one run or several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rfkernels.cli.options import Device, Quiet, choose_device, given
from rfkernels.cli.output import check_folder, console, fresh_folder, say, write_bytes, write_csv

# Samples of an endless data set stand for training and held-out data; those drawn in training have small indices.
_STREAM_SIZE, _STREAM_START = 2000, 2**40


def evaluate(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs on the same data.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where table and plot go.", show_default="rfkernels-eval"),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="The real data.", show_default="what a run was trained on")
    ] = None,
    steps: Annotated[str, typer.Option(help="Numbers of steps, with commas.")] = "1,2,4,8,32",
    solver: Annotated[
        str, typer.Option(help="euler, midpoint, heun, rk4, ab2 or taylor.")
    ] = "euler",
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale, for conditional runs.")
    ] = None,
    draws: Annotated[
        int, typer.Option(help="Sets of samples that the 1-NN test is averaged over.")
    ] = 5,
    seed: Annotated[int, typer.Option(help="Of the noise, the same for all runs.")] = 0,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Measure runs at several numbers of steps: a table, a plot and a CSV file.

    Frechet distance of the pixels (or numbers) to the training data, accuracy of a 1-nearest-neighbour test against
    held-out data (0.5 is ideal), median distance to the nearest training sample, energy distance to held-out data.

    [bold]Examples[/]

      rfkernels eval runs/digits

      rfkernels eval runs/digits runs/digits-2rf runs/digits-1step --out comparison

      rfkernels eval runs/moons --steps 1,4,16 --solver heun
    """
    import torch

    from rfkernels.cli.pictures import quality_plot, require_pictures
    from rfkernels.cli.quality import Yardstick, measure_steps, quality_rows
    from rfkernels.metrics.drawer import Drawer
    from rfkernels.training import load
    from rfkernels.training.progress import Bar

    counts = _counts(steps)
    if draws < 1:
        raise ValueError(f"draws: must be at least 1; got {draws}")
    if seed < 0:
        raise ValueError(f"seed: must not be negative; got {seed}")
    require_pictures()
    if out is not None:
        check_folder("out", out)
    target = choose_device(device)
    loaded = {_name(run, runs): load(run, device=target) for run in runs}
    drawers = {name: Drawer(run, guidance=guidance) for name, run in loaded.items()}
    train, held_out = _real_data(list(loaded.values()), dataset)
    for name, drawer in drawers.items():
        if drawer.sample_shape != tuple(train.shape[1:]):
            raise ValueError(
                f"runs: {name} makes samples of the shape {drawer.sample_shape}; the data has {tuple(train.shape[1:])}"
            )
    yardstick = Yardstick(train, held_out, draws)
    index = torch.arange(yardstick.count)
    curves = {}
    with Bar("eval", len(drawers) * len(counts), show=not quiet) as bar:
        for name, drawer in drawers.items():
            curves[name], _ = measure_steps(
                lambda n, d=drawer: d.draw(index, seed=seed, steps=n, solver=solver)[0],
                yardstick,
                counts,
                bar.advance,
            )
    out = fresh_folder("rfkernels-eval") if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    points = len(train.shape) == 2
    plot = quality_plot(
        curves,
        solver=solver,
        gaussian=yardstick.measure(yardstick.gaussian(seed)),
        **(
            {"distance": "energy", "distance_name": "energy distance to held-out data"}
            if points
            else {}
        ),
    )
    write_csv(out / "quality.csv", quality_rows(curves))
    write_bytes(out / "quality.png", plot)
    console.print(_table(curves, yardstick))
    for name in ("quality.csv", "quality.png"):
        say(f"  {out / name}")


def _counts(text: str) -> list[int]:
    """The numbers of steps in "1,2,4"."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(
            f"steps: must be whole numbers with commas between, like 1,2,4; got {text!r}"
        ) from None
    if counts[0] < 1:
        raise ValueError(f"steps: must be at least 1; got {counts[0]}")
    return counts


def _name(run: Path, runs: list[Path]) -> str:
    """What the run is called in the table: its folder's name, or its path where that is not enough."""
    if len({r.resolve() for r in runs}) < len(runs):
        raise ValueError("runs: one of them is given twice")
    names = [r.resolve().name for r in runs]
    return run.resolve().name if names.count(run.resolve().name) == 1 else str(run)


def _real_data(runs: list[Any], dataset: str | None) -> tuple[Any, Any]:
    """(training, held-out) samples: split as the first run's training split them.

    Raises:
        ValueError: no run says what it was trained on, and no data set is given.
    """
    import torch

    from rfkernels.data import DATASETS, load_dataset, split

    trained = next((run for run in runs if run.kind == "train"), None)
    if dataset is None:
        described = {} if trained is None else trained.description.get("data", {})
        dataset = described.get("name")
        if dataset not in DATASETS:
            what = (
                "the runs were trained on pairs"
                if trained is None
                else f"{dataset!r} is a file or folder"
            )
            raise ValueError(f"dataset: must be given, {what}; got none")
        # An endless toy is another one for every seed of its own.
        options = given(seed=described.get("seed")) if described.get("size") is None else {}
        data = load_dataset(dataset, **options)
    else:
        shape = runs[0].sample_shape
        folder = {"image_size": shape[-1], "channels": shape[0]} if Path(dataset).is_dir() else {}
        data = load_dataset(dataset, **folder)
    if data.size is None:
        index = torch.arange(_STREAM_START, _STREAM_START + 2 * _STREAM_SIZE)
        x = data.rows(index).x
        return x[:_STREAM_SIZE], x[_STREAM_SIZE:]
    source = trained or runs[0]
    config = source.config if source.kind == "train" else source.config.train
    part, held_out = split(data, config.holdout or 0.1, config.seed)
    return part.x, held_out.x


def _table(curves: dict[str, dict[int, Any]], yardstick: Any) -> Table:
    table = Table(title="Quality against the number of steps", title_justify="left")
    table.add_column("run", style="bold")
    for title in ("steps", "Fréchet", "1-NN accuracy", "nearest train", "energy"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, curve in curves.items():
        for i, (n, q) in enumerate(curve.items()):
            table.add_row(
                name if i == 0 else "",
                str(n),
                f"{q.frechet:.4g}",
                f"{q.one_nn:.3f} ± {q.one_nn_spread:.3f}",
                f"{q.nearest:.3g}",
                f"{q.energy:.4f}",
                end_section=i == len(curve) - 1,
            )
    table.add_row(
        "held-out data", "", "", "0.5 is ideal", f"{yardstick.held_out_nearest():.3g}", ""
    )
    return table
