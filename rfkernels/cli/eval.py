"""`rfkernels eval`: quality against the number of evaluations, for runs and solvers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from rfkernels._whole_file import write_whole
from rfkernels.cli.options import Device, Quiet, choose_device
from rfkernels.cli.output import (
    check_folder,
    console,
    fresh_folder,
    say,
    write_csv,
    write_json,
)
from rfkernels.cli.quality import Column, json_values, shown_columns
from rfkernels.metrics.evaluate import Evaluation

__all__ = ["Cache", "Dataset", "Draws", "Features", "Guidance", "Runs", "Seed", "evaluate"]

# Options that `rfkernels compare` takes alike.
Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folders of runs on the same data.")
]
Dataset = Annotated[
    str | None, typer.Option(help="The real data.", show_default="what a run was trained on")
]
Features = Annotated[
    str,
    typer.Option(
        help="What samples are compared by: pixels, classifier, efficientnet-lite0[:SIZE], "
        "inception:PATH, vgg16:PATH or random-conv."
    ),
]
Guidance = Annotated[
    float | None, typer.Option(help="Classifier-free guidance scale, for conditional runs.")
]
Draws = Annotated[int, typer.Option(help="Sets of samples that measures are averaged over.")]
Seed = Annotated[int, typer.Option(help="Of the noise, the same for all runs.")]
Cache = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where --features classifier keeps its trained network."),
]


def evaluate(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where table and plot go.", show_default="rfkernels-eval"),
    ] = None,
    dataset: Dataset = None,
    steps: Annotated[str, typer.Option(help="Numbers of steps, with commas.")] = "1,2,4,8,32",
    solver: Annotated[
        list[str] | None,
        typer.Option(
            help="euler, heun, ab2, fireflow, unipc, dopri5, ... (docs/samplers.md); give it again for another.",
            show_default="each run's own",
        ),
    ] = None,
    features: Features = "pixels",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="frechet, one-nn, kid, energy, precision-recall, density-coverage, straightness or "
            "transport-cost; give it again for another.",
            show_default="frechet, one-nn, energy",
        ),
    ] = None,
    guidance: Guidance = None,
    draws: Draws = 5,
    seed: Seed = 0,
    cache: Cache = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Measure runs at several numbers of steps: a table, a plot, a CSV and a JSON file.

    Fréchet distance to the training data, accuracy of a 1-nearest-neighbour test against held-out data (0.5 is ideal),
    energy distance to held-out data, and always memorisation: the median distance to the nearest training sample over
    that of held-out data (1 is new, 0 is a copy). docs/evaluation.md says what each misses.

    [bold]Examples[/]

      rfkernels eval runs/digits

      rfkernels eval runs/digits runs/digits-2rf runs/digits-1step --out comparison

      rfkernels eval runs/digits --solver euler --solver heun --solver dopri5 --steps 1,2,4,8

      rfkernels eval runs/digits --features classifier --metric frechet --metric kid --metric precision-recall
    """
    from rfkernels import metrics
    from rfkernels.cli.pictures import require_pictures
    from rfkernels.cli.plots import evaluation_plot
    from rfkernels.metrics.yardstick import DEFAULT_METRICS

    counts = step_counts(steps)
    require_pictures()
    if out is not None:
        check_folder("out", out)
    found = metrics.evaluate(
        runs,
        dataset,
        steps=counts,
        solvers=solver,
        features=features,
        metrics=metric or DEFAULT_METRICS,
        draws=draws,
        guidance=guidance,
        seed=seed,
        device=choose_device(device),
        cache=cache,
        progress=not quiet,
    )
    out = fresh_folder("rfkernels-eval") if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "quality.csv", found.table())
    write_json(out / "quality.json", json_values(found))
    write_whole(out / "quality.png", evaluation_plot(found))
    print_quality(found)
    for name in ("quality.csv", "quality.json", "quality.png"):
        say(f"  {out / name}")


def step_counts(text: str) -> list[int]:
    """The numbers of steps in "1,2,4".

    Raises:
        ValueError: no whole numbers, or one below 1.
    """
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(
            f"steps: must be whole numbers with commas between, like 1,2,4; got {text!r}"
        ) from None
    if counts[0] < 1:
        raise ValueError(f"steps: must be at least 1; got {counts[0]}")
    return counts


def print_quality(evaluation: Evaluation) -> None:
    """The evaluation on the terminal; narrow ones get a table without the distance that memorisation divides."""
    options = console.options.update(width=1000)
    for columns in (
        shown_columns(evaluation),
        [c for c in shown_columns(evaluation) if c.key != "nearest_training_distance"],
    ):
        table = _quality_table(evaluation, columns)
        least = console.measure(table, options=options).minimum
        if least <= console.width:
            break
    else:
        # rich would squeeze the names of the runs out of sight; the terminal's own line breaks lose nothing.
        table.width = least
    console.print(table, crop=False)


def _quality_table(evaluation: Evaluation, columns: list[Column]) -> Table:
    """The evaluation for a terminal, with what real data scores below it."""
    settings = evaluation.settings
    table = Table(
        title=f"Quality against the number of evaluations, by {settings['features']} "
        f"({settings['samples']} samples each)",
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    solvers = len({row.solver for row in evaluation.rows}) > 1
    table.add_column("run", style="bold", min_width=8, overflow="fold")
    if solvers:
        table.add_column("solver", no_wrap=True)
    for title in ("steps", "NFE", *(column.title for column in columns)):
        table.add_column(title, justify="right", no_wrap=title not in ("nearest train",))
    last = None
    for i, row in enumerate(evaluation.rows):
        after = evaluation.rows[i + 1] if i + 1 < len(evaluation.rows) else None
        table.add_row(
            row.run if row.run != last else "",
            *([row.solver] if solvers else []),
            "" if row.steps is None else str(row.steps),
            f"{row.nfe:.4g}",
            *(column.cell(row.values) for column in columns),
            end_section=after is None or after.run != row.run,
        )
        last = row.run
    empty = ["", ""] + [""] * solvers
    table.add_row(
        "fitted Gaussian", *empty, *(column.cell(evaluation.gaussian) for column in columns)
    )
    real = (
        "0.5 is ideal" if c.key == "one_nn_accuracy" else c.cell(evaluation.real) for c in columns
    )
    table.add_row("held-out data", *empty, *real)
    return table
