"""`rfkernels edit`: turn images of one class into another by a conditional run's flow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rfkernels._whole_file import write_whole
from rfkernels.cli.options import (
    Device,
    FirstImages,
    Force,
    ImagesAtATime,
    Shift,
    Silent,
    check_counts,
    choose_device,
    parse_settings,
)
from rfkernels.cli.output import check_file, say, write_arrays

if TYPE_CHECKING:
    from rfkernels.data.dataset import Data
    from rfkernels.editing import Method


def edit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a conditional run.")],
    source: Annotated[
        str,
        typer.Option(
            "--in",
            metavar="IMAGES",
            help="An image, a folder of images, an .npz or .safetensors file with the array "
            "x, or a data set.",
        ),
    ],
    target_label: Annotated[int, typer.Option(help="The class to edit to.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="A .png picture, or .npz / .safetensors with the array x."
        ),
    ],
    source_label: Annotated[
        int | None,
        typer.Option(help="The class of all images.", show_default="their own labels"),
    ] = None,
    method: Annotated[
        str, typer.Option(help="flowedit, rf-inversion, uniedit, rf-edit or fireflow.")
    ] = "flowedit",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="An option of the method, e.g. --set n_max=20"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the grid.")] = 28,
    shift: Shift = None,
    source_guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale of the source's class.")
    ] = None,
    target_guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale of the target's class.")
    ] = None,
    share: Annotated[
        int,
        typer.Option(
            help="Steps that share attention features, for rf-edit and fireflow with a DiT."
        ),
    ] = 0,
    n: FirstImages = None,
    seed: Annotated[int, typer.Option(help="Of the noise that some methods draw.")] = 0,
    batch: ImagesAtATime = 256,
    force: Force = False,
    device: Device = None,
    quiet: Silent = False,
) -> None:
    """Edit images into another class without training.

    A .png shows every image above its edit; a file of arrays holds the edits x (n, ...), their labels
    and source (n, ...).

    [bold]Examples[/]

      rfkernels edit rfkernels-demo/1-rf --in digits --n 32 --target-label 8 --out eights.png

      rfkernels edit runs/faces --in me.png --source-label 0 --target-label 1 --method uniedit --out edit.png

      rfkernels edit runs/labels --in x.safetensors --target-label 3 --set n_max=20 --target-guidance 2 --out threes.npz
    """
    import torch

    from rfkernels.cli.images import check_labels, first_rows
    from rfkernels.cli.pictures import beside, is_image, require_pictures
    from rfkernels.editing import Features
    from rfkernels.editing import edit as edit_samples
    from rfkernels.metrics.drawer import Drawer
    from rfkernels.ops.random import derive_seed
    from rfkernels.training import load

    check_counts(n=n, batch=batch)
    if seed < 0:
        raise ValueError(f"seed: must not be negative; got {seed}")
    check_file("out", out, (".png", ".safetensors", ".npz"), force=force)
    editor = _method(method, options)
    device = choose_device(device)
    loaded = load(run, device=device)
    if loaded.num_classes is None:
        raise ValueError("run: must be one trained with --conditional, on labels; got one without")
    # Both classes and both scales have to be such as the run knows.
    drawer = Drawer(loaded, guidance=target_guidance, label=target_label)
    Drawer(loaded, guidance=source_guidance, label=source_label)
    picture = out.suffix.lower() == ".png"
    if picture:
        if not is_image(drawer.sample_shape):
            raise ValueError(
                f"out: samples of the shape {drawer.sample_shape} are no pictures; "
                "give an .npz or .safetensors file"
            )
        require_pictures()
    data = _open(source, drawer.sample_shape)
    index = first_rows(data, source, n)
    if source_label is None:
        check_labels(data, index, "source-label", drawer.num_classes)
    key = derive_seed(seed, "edit") // 2
    found: dict[str, list[torch.Tensor]] = {"x": [], "labels": [], "source": []}
    nfe = size = 0
    for rows in index.split(batch):
        read = data.rows(rows)
        labels = read.labels if source_label is None else torch.full_like(rows, source_label)
        result = edit_samples(
            drawer.velocity,
            read.x.to(device),
            source={"y": labels.to(device)},
            target={"y": drawer.labels(rows).to(device)},
            method=editor,
            steps=steps,
            grid=shift,
            source_guidance_scale=source_guidance,
            target_guidance_scale=target_guidance,
            uncondition={},
            features=Features(share) if share else None,
            # A key of its own for every image, so that the batch does not matter.
            seed=rows.to(device) + key,
            progress=not quiet and len(index) > batch // 2,
        )
        nfe, size = result.nfe, max(size, result.bank_bytes)
        found["x"].append(result.x.cpu())
        found["labels"].append(drawer.labels(rows))
        found["source"].append(read.x)
    values = {name: torch.cat(parts) for name, parts in found.items()}
    if picture:
        title = f"To class {target_label} by {method}"
        write_whole(out, beside(values["source"], values["x"], title))
    else:
        write_arrays(out, values)
    if not quiet:
        kept = f" Features kept: {size / 1e6:.1f} MB." if share else ""
        say(f"{len(index)} images, network evaluations for each: {nfe}.{kept} Wrote {out}")


def _method(name: str, options: list[str] | None) -> Method:
    """The method of that name with its NAME=VALUE options."""
    from rfkernels.editing import METHODS

    if name not in METHODS:
        raise ValueError(f"method: must be one of {', '.join(METHODS)}; got {name!r}")
    known = [option.name for option in dataclasses.fields(METHODS[name])]
    given: dict[str, Any] = parse_settings("set", options)
    for option in given:
        if option not in known:
            raise ValueError(f"set: {name} has the options {', '.join(known)}; got {option!r}")
    return METHODS[name](**given)


def _open(source: str, shape: tuple[int, ...]) -> Data:
    """A single image, or what `open_images` opens, in the shape that the run takes."""
    import torch

    from rfkernels.cli.images import open_images
    from rfkernels.data import as_dataset
    from rfkernels.data.decode import IMAGE_SUFFIXES, decode_image

    path = Path(source)
    if path.suffix.lower()[1:] not in IMAGE_SUFFIXES or path.is_dir():
        return open_images(source, shape)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"in: an image needs a run of square images; this one has {shape}")
    pixels = decode_image(path, source, image_size=shape[-1], channels=shape[0])
    return as_dataset(torch.from_numpy(pixels.copy())[None].float() / 127.5 - 1)
