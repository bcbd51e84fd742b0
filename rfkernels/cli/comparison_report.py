"""The HTML report of `rfkernels compare`: one file, light and dark, with its pictures inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import torch

from rfkernels.cli.pictures import INK, is_image, one_grid
from rfkernels.cli.plots import frame_of, point_cloud
from rfkernels.cli.quality import shown_columns
from rfkernels.cli.report import image_tag, page
from rfkernels.metrics.evaluate import Evaluation, EvaluationRow

__all__ = ["comparison_report"]

# What each measure is, for those that the report shows.
_MEASURES = {
    "frechet_distance": (
        "Fréchet distance",
        "To the training data, 0 is best. Compares means and covariances of the features and is blind to all else: the "
        "fitted Gaussian in the table scores near 0. Compare at equal numbers of samples.",
    ),
    "one_nn_accuracy": (
        "1-NN accuracy",
        "How often a nearest-neighbour classifier tells samples from held-out data, 0.5 is best; with its standard "
        "deviation over the draws.",
    ),
    "energy_distance": (
        "Energy distance",
        "To held-out data, 0 is best; an unbiased estimate, so it may fall below 0.",
    ),
    "memorisation_ratio": (
        "Memorisation",
        "The median distance from a sample to the nearest training sample, over that of held-out data. 1: as new as "
        "data that no run has seen. Far below 1: copies. Far above: unlike the data.",
    ),
    "close_share": (
        "Close",
        "The share of samples nearer to a training sample than the nearest 5 % of held-out data. Far above 0.05, some "
        "samples are copies.",
    ),
}


def comparison_report(
    found: Evaluation,
    cells: Mapping[str, Sequence[torch.Tensor | None]],
    colours: Mapping[str, str],
    plot: bytes,
    command: str,
    across: int,
) -> str:
    """The report as one HTML document.

    Args:
        found: the measures.
        cells: row label -> samples of every run, in the order of `colours`; the last row holds real data.
        colours: run -> its colour.
        plot: PNG of quality against evaluations.
        command: what made it.
        across: images side by side in a grid.
    """
    settings = found.settings
    *rows, (_, real) = cells.items()
    drawn = "images" if is_image(real[0].shape[1:]) else "points"
    body = "".join(_row(label, members, real[0], colours, found, across) for label, members in rows)
    heads = "".join(
        f'<div class="head" style="border-color:{colour}">{escape(name)}</div>'
        for name, colour in colours.items()
    )
    shown = {column.key for column in shown_columns(found)}
    return page(
        "comparison_page.html",
        title=escape(", ".join(colours)),
        columns=str(len(colours)),
        samples=f"{settings['samples']:,}",
        training=f"{settings['training_samples']:,}",
        held_out=f"{settings['held_out_samples']:,}",
        data=escape(str(settings["data"])),
        features=escape(str(settings["features"])),
        drawn=drawn,
        grid=f'<div class="corner"></div>{heads}{body}',
        real=image_tag(_picture(real[0], real[0], across), f"Held-out {drawn}"),
        plot=image_tag(plot, "Every measure against the evaluations of the network"),
        quality=_table(found, colours),
        measures="".join(
            f"<dt>{title}</dt><dd>{text}</dd>"
            for key, (title, text) in _MEASURES.items()
            if key in shown
        ),
        command=escape(command),
    )


def _picture(x: torch.Tensor, real: torch.Tensor, across: int, colour: str = INK) -> bytes:
    if is_image(x.shape[1:]):
        return one_grid(x, across, 32)
    return point_cloud(x, frame_of(real), colour)


def _row(
    label: str,
    members: Sequence[torch.Tensor | None],
    real: torch.Tensor,
    colours: Mapping[str, str],
    found: Evaluation,
    across: int,
) -> str:
    count = int(label.split()[0])
    points = {(row.run, row.steps): row for row in found.rows}
    cells = "".join(
        f'<figure class="cell">{image_tag(_picture(x, real, across, colour), f"{name}, {label}")}'
        f"<figcaption>{_caption(points[name, count])}</figcaption></figure>"
        for (name, colour), x in zip(colours.items(), members, strict=True)
    )
    return f'<div class="label">{label}</div>{cells}'


def _caption(row: EvaluationRow) -> str:
    return (
        f"Fréchet <b>{row.values['frechet_distance']:.3g}</b> · memorisation "
        f"<b>{row.values['memorisation_ratio']:.2f}</b>"
    )


def _table(found: Evaluation, colours: Mapping[str, str]) -> str:
    columns = shown_columns(found)
    heads = "".join(f"<th>{c.title}</th>" for c in columns)
    body = []
    for name, colour in colours.items():
        rows = [row for row in found.rows if row.run == name]
        for i, row in enumerate(rows):
            head = (
                f'<th rowspan="{len(rows)}"><i style="background:{colour}"></i>{escape(name)}</th>'
                if i == 0
                else ""
            )
            cells = "".join(f"<td>{c.cell(row.values)}</td>" for c in columns)
            first = ' class="first"' if i == 0 else ""
            body.append(f"<tr{first}>{head}<td>{row.steps}</td><td>{row.nfe:.4g}</td>{cells}</tr>")
    for i, (name, values) in enumerate(
        (("fitted Gaussian", found.gaussian), ("held-out data", found.real))
    ):
        cells = "".join(f"<td>{c.cell(values)}</td>" for c in columns)
        first = ' class="first"' if i == 0 else ""
        body.append(f"<tr{first}><th>{name}</th><td></td><td></td>{cells}</tr>")
    return (
        f"<table><thead><tr><th>run</th><th>steps</th><th>NFE</th>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )
