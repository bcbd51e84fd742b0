"""`rfkernels train`: a first rectified flow from a data set, or any recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rfkernels.cli.options import (
    BatchSize,
    Device,
    Loss,
    Quiet,
    Resume,
    Settings,
    TrainSeed,
    begun,
    choose_device,
    command_line,
    given,
    parse_settings,
)
from rfkernels.cli.output import resumable, say
from rfkernels.cli.recipes import RecipeCall, find_recipe, list_recipes
from rfkernels.cli.setting import count_classes, data_name, new_network, open_data, saved_network
from rfkernels.training import RunResult, TrainConfig, from_dict, train_flow
from rfkernels.training.recipes import RECIPES
from rfkernels.training.run_folder import read_config


def train(
    run: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the run: config, metrics, checkpoints.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A published method; `--recipe list` prints them all.",
            show_default="plain flow matching",
            callback=list_recipes,
            is_eager=True,
        ),
    ] = None,
    recipe_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An option of the recipe, e.g. anneal=cosine, or distance=perceptual:random-conv",
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="The run that a recipe learns from; without --model it is copied."
        ),
    ] = None,
    pairs_from: Annotated[
        Path | None,
        typer.Option(
            "--pairs-from",
            "--pairs",
            metavar="DIR",
            help="A recipe's pairs, instead of new ones, e.g. runs/digits-2rf/pairs",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="digits, mnist, emoji, moons, ring, checkerboard, spirals, an .npz or .safetensors file with x "
            "(and labels), a folder of images, tar shards (a folder, file or pattern), or a .parquet or "
            "save_to_disk set of datasets."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET", help="Where the flow starts from.", show_default="normal noise"
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
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps.", show_default="3000, or the recipe's")
    ] = None,
    batch_size: BatchSize = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Its peak.", show_default="2e-3, or the recipe's")
    ] = None,
    path: Annotated[
        str | None, typer.Option(help="linear, trigonometric, vp or sub-vp.", show_default="linear")
    ] = None,
    time_distribution: Annotated[
        str | None,
        typer.Option(help="uniform, logit-normal, u-shaped, ...", show_default="uniform"),
    ] = None,
    loss: Loss = None,
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
    seed: TrainSeed = None,
    settings: Settings = None,
    resume: Resume = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Train a rectified flow on a data set (a "1-rectified flow"), or any network by a --recipe.

    [bold]Examples[/]

      rfkernels train --dataset digits --run runs/digits

      rfkernels train --dataset mnist --conditional --model unet --model-option width=32 --run runs/mnist

      rfkernels train --dataset photos/ --image-size 64 --batch-size 64 --sample-every 500 --run runs/photos

      rfkernels train --run runs/digits --resume

      rfkernels train --recipe slimflow-reflow --teacher runs/digits --model mlp --model-option width=96 --run runs/small
    """
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
    again = [] if device is None else [f"--device={device}"]
    recipe = recipe or _begun_recipe(run, resume=resume)
    if recipe is not None:
        cls = find_recipe(recipe)
        saved, target = begun(run, recipe, resume=resume), choose_device(device)
        call = RecipeCall(
            cls,
            run=run,
            teacher=teacher,
            pairs_from=pairs_from,
            dataset=dataset,
            source=source,
            image_size=image_size,
            model=model,
            model_option=model_option,
            conditional=conditional,
            recipe_option=recipe_option,
            options=options,
            saved=saved,
        )
        result = call.train(target, resume=resume, quiet=quiet, again=again)
        _tell(result, run, from_noise=call.source is None)
        return
    refused = given(teacher=teacher, pairs_from=pairs_from, recipe_option=recipe_option or None)
    if refused:
        name = next(iter(refused)).replace("_", "-")
        raise ValueError(f"{name}: belongs to a recipe; give --recipe too, or leave this out")
    saved, target = begun(run, "train", resume=resume), choose_device(device)
    if saved is None:
        network, data, config = _new(dataset, image_size, model, model_option, conditional, options)
    else:
        refused = given(
            model=model, model_option=model_option or None, conditional=conditional or None
        )
        if refused:
            raise ValueError(
                f"{next(iter(refused))}: a resumed run has the network it began with; leave this out"
            )
        config = from_dict(TrainConfig, {**saved["config"], **options})
        data = open_data(dataset or data_name(saved.get("data"), "dataset", run), image_size)
        network = saved_network(saved, saved["config"]["seed"], run)
        source = source or data_name(saved.get("source"), "source", run)
    x0 = None if source is None else open_data(source, image_size)
    # The run remembers the rest.
    named = given(dataset=dataset, source=source, image_size=image_size)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in named.items()]
    command = command_line("train", "--run", run, "--resume", *words, *again)
    with resumable(command):
        result = train_flow(
            network.to(target), data, config, x0=x0, run=run, resume=resume, progress=not quiet
        )
    _tell(result, run, from_noise=source is None)


def _new(
    dataset: str | None,
    image_size: int | None,
    model: str | None,
    model_option: Sequence[str] | None,
    conditional: bool,
    options: dict[str, Any],
) -> tuple[Any, Any, TrainConfig]:
    """(network, data, config) of a new run."""
    if dataset is None:
        raise ValueError("dataset: must be given for a new run, e.g. --dataset digits; got none")
    data = open_data(dataset, image_size)
    dropout = {"label_dropout": 0.1} if conditional else {}
    config = from_dict(TrainConfig, {**dropout, **options, "conditional": conditional})
    network = new_network(
        model,
        model_option,
        sample_shape=data.sample_shape,
        num_classes=count_classes(data) if conditional else None,
        seed=config.seed,
    )
    return network, data, config


def _begun_recipe(run: Path, *, resume: bool) -> str | None:
    """The recipe of the run to go on with; None for a new run or one without a recipe."""
    if not resume or not (run / "config.json").is_file():
        return None
    kind = read_config(run)["kind"]
    return kind if kind in RECIPES else None


def _tell(result: RunResult, run: Path, *, from_noise: bool) -> None:
    last = result.metrics[-1] if result.metrics else {}
    losses = ", ".join(
        f"{k.replace('_', ' ')} {last[k]:.4f}" for k in ("loss", "holdout_loss") if k in last
    )
    steps = getattr(result.config, "train", result.config).steps
    say(f"Trained to step {steps}: {losses}. The run is in {run}")
    if from_noise:
        say(f"Next: {command_line('sample', run, '--out', 'samples.png')}")
