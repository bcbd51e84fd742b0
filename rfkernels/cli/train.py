"""`rfkernels train`: a first rectified flow from a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rfkernels.cli.options import (
    Device,
    Quiet,
    Resume,
    Settings,
    begun,
    choose_device,
    command_line,
    given,
    parse_settings,
)
from rfkernels.cli.output import resumable, say

# Above this many pixels a fully connected network is the wrong tool.
_MLP_SIDE = 16


def train(
    run: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the run: config, metrics, checkpoints.")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="digits, mnist, emoji, moons, ring, checkerboard, spirals, an .npz or .safetensors file with x (and labels), "
            "a folder of images, tar shards (a folder, file or pattern), or a .parquet or save_to_disk set of datasets."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="mlp, dit, unet or diffusers-unet.", show_default="mlp up to 16x16, else unet"
        ),
    ] = None,
    model_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the network, e.g. width=512"),
    ] = None,
    conditional: Annotated[
        bool,
        typer.Option(
            "--conditional", help="Learn the labels too, for `sample --label` and `--guidance`."
        ),
    ] = False,
    image_size: Annotated[
        int | None, typer.Option(help="Side to which a folder's images are resized.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="3000")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per step.", show_default="256")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Its peak.", show_default="2e-3")
    ] = None,
    path: Annotated[
        str | None, typer.Option(help="linear, trigonometric, vp or sub-vp.", show_default="linear")
    ] = None,
    time_distribution: Annotated[
        str | None,
        typer.Option(help="uniform, logit-normal, u-shaped, ...", show_default="uniform"),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="mse, pseudo_huber or pseudo_huber_elementwise.", show_default="mse"),
    ] = None,
    coupling: Annotated[
        str | None,
        typer.Option(
            help="independent, or ot for minibatch optimal transport.", show_default="independent"
        ),
    ] = None,
    label_dropout: Annotated[
        float | None,
        typer.Option(
            help="Share of labels left out, for guidance.", show_default="0.1 if --conditional"
        ),
    ] = None,
    autocast: Annotated[str | None, typer.Option(help="bfloat16, for the network only.")] = None,
    sample_every: Annotated[
        int | None, typer.Option(help="Steps between sample pictures in DIR/samples.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Everything random follows from it.", show_default="0")
    ] = None,
    settings: Settings = None,
    resume: Resume = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train a rectified flow on a data set (a "1-rectified flow").

    [bold]Examples[/]

      rfkernels train --dataset digits --run runs/digits

      rfkernels train --dataset mnist --conditional --model unet --model-option width=32 --run runs/mnist

      rfkernels train --dataset photos/ --image-size 64 --batch-size 64 --sample-every 500 --run runs/photos

      rfkernels train --run runs/digits --resume
    """
    import rfkernels.training as training

    saved = begun(run, "train", resume=resume)
    target = choose_device(device)
    options: dict[str, Any] = given(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        path=path,
        time_distribution=time_distribution,
        loss=loss,
        coupling=coupling,
        label_dropout=label_dropout,
        autocast=autocast,
        sample_every=sample_every,
        seed=seed,
    )
    options |= parse_settings("set", settings)
    if saved is None:
        if dataset is None:
            raise ValueError(
                "dataset: must be given for a new run, e.g. --dataset digits; got none"
            )
        data = _open(dataset, image_size)
        if conditional:
            options.setdefault("label_dropout", 0.1)
        config = training.from_dict(training.TrainConfig, {**options, "conditional": conditional})
        network = _new_network(model, model_option, data, conditional, config.seed)
    else:
        refused = given(
            model=model, model_option=model_option or None, conditional=conditional or None
        )
        if refused:
            raise ValueError(
                f"{next(iter(refused))}: a resumed run has the network it began with; leave this out"
            )
        config = training.from_dict(training.TrainConfig, {**saved["config"], **options})
        data = _open(dataset or _data_name(saved, run), image_size)
        network = _saved_network(saved, run)
    # The run remembers the rest.
    again = given(dataset=dataset, image_size=image_size, device=device)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in again.items()]
    command = command_line("train", "--run", run, "--resume", *words)
    with resumable(command):
        result = training.train_flow(
            network.to(target), data, config, run=run, resume=resume, progress=not quiet
        )
    last = result.metrics[-1] if result.metrics else {}
    losses = ", ".join(
        f"{k.replace('_', ' ')} {last[k]:.4f}" for k in ("loss", "holdout_loss") if k in last
    )
    say(f"Trained to step {config.steps}: {losses}. The run is in {run}")
    say(f"Next: {command_line('sample', run, '--out', 'samples.png')}")


def _open(dataset: str, image_size: int | None) -> Any:
    from rfkernels.data import load_dataset

    return load_dataset(dataset, **given(image_size=image_size))


def _new_network(
    name: str | None, model_options: list[str] | None, data: Any, conditional: bool, seed: int
) -> Any:
    import rfkernels.models as models
    from rfkernels.ops.random import derive_seed

    shape = tuple(data.sample_shape)
    options = parse_settings("model-option", model_options)
    if conditional:
        classes = getattr(data, "num_classes", None)
        if not data.has_labels:
            raise ValueError(f"conditional: needs data with labels; {data.name} has none")
        # An endless toy has labels whose number only a look at them tells.
        options.setdefault("num_classes", classes if classes is not None else _count_classes(data))
    if name is None:
        name = "unet" if len(shape) == 3 and max(shape[1:]) > _MLP_SIDE else "mlp"
    return models.build(name, seed=derive_seed(seed, "init"), sample_shape=shape, **options)


def _count_classes(data: Any) -> int:
    import torch

    labels = data.rows(torch.arange(4096)).labels
    if labels.is_floating_point():
        raise ValueError(
            f"conditional: the labels of {data.name} are vectors, which the command does not serve"
        )
    return int(labels.max()) + 1


def _data_name(saved: dict[str, Any], run: Path) -> str:
    from rfkernels.data import DATASETS

    name = saved.get("data", {}).get("name")
    if name not in DATASETS:
        raise ValueError(
            f"dataset: {run} was trained on {name!r}, a file or folder; give it again with --dataset"
        )
    return name


def _saved_network(saved: dict[str, Any], run: Path) -> Any:
    import rfkernels.models as models
    from rfkernels.ops.random import derive_seed

    described = saved["model"]
    if "name" not in described:
        raise ValueError(
            f"resume: {run} trained a network of your own; resume it in Python, with train_flow"
        )
    return models.build(
        described["name"], seed=derive_seed(saved["config"]["seed"], "init"), **described["options"]
    )
