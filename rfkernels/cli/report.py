"""HTML reports, one file each, no scripts, nothing loaded from elsewhere; and the demo's report and pictures."""

from __future__ import annotations

import base64
import importlib.resources
import string
from html import escape
from typing import TYPE_CHECKING

from rfkernels import __version__
from rfkernels.cli.pictures import COLOURS, sample_rows

if TYPE_CHECKING:
    from rfkernels.cli.demo_run import Outcome
    from rfkernels.cli.quality import Quality

__all__ = ["demo_picture", "html_report", "image_tag", "page"]

_TITLES = {
    "1-RF": "1-RF: trained on noise and digits paired at random",
    "2-RF": "2-RF: retrained on the 1-RF's own pairs (reflow)",
    "distilled": "Distilled: the 2-RF's student, made for one step",
}


def page(name: str, **parts: str) -> str:
    """The page of that name with its parts filled in, each of them HTML; the style is shared by all."""
    folder = importlib.resources.files("rfkernels.cli")
    template, style = (
        (folder / file).read_text(encoding="utf-8") for file in (name, "report_style.css")
    )
    return string.Template(template).substitute(parts, style=style, version=escape(__version__))


def _steps(n: int) -> str:
    return f"{n} step" if n == 1 else f"{n} steps"


def demo_picture(outcome: Outcome) -> bytes:
    """PNG: the noises, every model at every number of steps, and real held-out images."""
    groups = [("The noise that all columns start from", "#6b7280", [("noise", outcome.noise / 2)])]
    for (name, rows), colour in zip(outcome.shown.items(), COLOURS, strict=False):
        groups.append((_TITLES[name], colour, [(_steps(n), x) for n, x in rows.items()]))
    groups.append(("Real digits that no model has seen", "#24292f", [("held out", outcome.real)]))
    return sample_rows(groups)


def image_tag(png: bytes, text: str) -> str:
    """A picture inside the page."""
    return (
        f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(text)}">'
    )


def _card(value: str, label: str) -> str:
    return f'<div class="card"><strong>{value}</strong><span>{label}</span></div>'


def _cells(q: Quality) -> str:
    return f"<td>{q.frechet:.3f}</td><td>{q.one_nn:.3f} ± {q.one_nn_spread:.3f}</td><td>{q.nearest:.2f}</td>"


def _quality_table(outcome: Outcome) -> str:
    body = []
    for (name, curve), colour in zip(outcome.curves.items(), COLOURS, strict=False):
        for i, (n, q) in enumerate(curve.items()):
            head = (
                f'<th rowspan="{len(curve)}" style="color:{colour}">{escape(name)}</th>'
                if i == 0
                else ""
            )
            body.append(f"<tr{' class=first' if i == 0 else ''}>{head}<td>{n}</td>{_cells(q)}</tr>")
    body.append(
        f'<tr class="first"><th>fitted Gaussian</th><td></td>{_cells(outcome.gaussian)}</tr>'
    )
    real = f"<td></td><td></td><td>0.5 is ideal</td><td>{outcome.held_out_nearest:.2f}</td>"
    body.append(f"<tr><th>held-out digits</th>{real}</tr>")
    return (
        "<table><thead><tr><th>model</th><th>steps</th><th>Fréchet distance</th><th>1-NN accuracy</th>"
        "<th>nearest training image</th></tr></thead><tbody>" + "".join(body) + "</tbody></table>"
    )


def _flow_table(outcome: Outcome) -> str:
    names = {"independent": "noise and digits, unpaired", "1-RF": "1-RF", "2-RF": "2-RF"}
    body = "".join(
        f"<tr><th>{label}</th><td>{outcome.straightness[name]:.3f}</td><td>{outcome.cost[name]:.1f}</td></tr>"
        if name in outcome.straightness
        else f"<tr><th>{label}</th><td></td><td>{outcome.cost[name]:.1f}</td></tr>"
        for name, label in names.items()
    )
    return (
        "<table><thead><tr><th>coupling</th><th>straightness S</th><th>transport cost</th></tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def html_report(
    outcome: Outcome, samples: bytes, plot: bytes, dataset: str, command: str, seconds: float
) -> str:
    """The report as one HTML document with its pictures inside."""
    first, second = outcome.curves["1-RF"], outcome.curves["2-RF"]
    most = max(first)
    side = "x".join(str(n) for n in outcome.sample_shape[1:])
    cards = "".join(
        (
            _card(f"{outcome.gain:.0f} times", "better in one step after reflow"),
            _card(
                f"{first[1].frechet:.1f} → {second[1].frechet:.2f}",
                "Fréchet distance of one-step samples",
            ),
            _card(
                f"{outcome.straightness['1-RF']:.1f} → {outcome.straightness['2-RF']:.2f}",
                "straightness S, 0 is straight",
            ),
            _card(f"{seconds:.0f} s", "on the CPU, in all"),
        )
    )
    stages = ", ".join(f"{name} {value:.0f} s" for name, value in outcome.seconds.items())
    return page(
        "report_page.html",
        cards=cards,
        dataset=escape(dataset),
        side=side,
        train=str(outcome.sizes[0]),
        held_out=str(outcome.sizes[1]),
        parameters=f"{outcome.parameters / 1e6:.1f}",
        most=str(most),
        one_nn_first=f"{first[most].one_nn:.2f}",
        one_nn_second=f"{second[1].one_nn:.2f}",
        one_nn_gaussian=f"{outcome.gaussian.one_nn:.2f}",
        frechet_gaussian=f"{outcome.gaussian.frechet:.3f}",
        cost_before=f"{outcome.cost['independent']:.0f}",
        cost_after=f"{outcome.cost['1-RF']:.0f}",
        near=f"{outcome.held_out_nearest:.2f}",
        samples=image_tag(samples, "Rows of generated digits for each model and number of steps"),
        plot=image_tag(plot, "Quality against the number of steps"),
        quality=_quality_table(outcome),
        flows=_flow_table(outcome),
        command=escape(command),
        stages=escape(stages),
    )
