"""`rfkernels train --recipe`: a recipe, its network, data and teacher from names and JSON values."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from rfkernels.cli.distances import resolve_distances
from rfkernels.cli.options import command_line, given, parse_settings
from rfkernels.cli.output import resumable, say
from rfkernels.cli.setting import (
    count_classes,
    data_name,
    new_network,
    open_data,
    saved_network,
)
from rfkernels.training import RunResult, TrainConfig
from rfkernels.training.recipes import RECIPES, PairRecipe, Recipe

__all__ = ["RecipeCall", "find_recipe", "list_recipes", "summary"]


def summary(cls: type[Recipe]) -> str:
    """A recipe in one line: the first sentence of its docstring."""
    paragraph = " ".join((inspect.getdoc(cls) or "").split("\n\n", 1)[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph, maxsplit=1)[0]


def list_recipes(value: str | None) -> str | None:
    """Prints the recipes and leaves, for `--recipe list`."""
    if value not in ("help", "list"):
        return value
    width = max(map(len, RECIPES))
    for name, cls in sorted(RECIPES.items()):
        say(f"{name:{width}}  {_needs(cls)}: {summary(cls)}")
    raise typer.Exit


def _needs(cls: type[Recipe]) -> str:
    if issubclass(cls, PairRecipe):
        needs = "pairs of --teacher"
    else:
        needs = "data and --teacher" if cls.teacher == "required" else "data"
    return f"{needs}, in Python only" if _objects(cls) else needs


def _objects(cls: type[Recipe]) -> list[str]:
    """Options without a default: objects that no name stands for."""
    return [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]


def _default_train(cls: type[Recipe]) -> TrainConfig:
    factory = next(f for f in dataclasses.fields(cls) if f.name == "train").default_factory
    return factory()  # type: ignore[misc]


def find_recipe(name: str) -> type[Recipe]:
    """The recipe of that name."""
    if name not in RECIPES:
        raise ValueError(f"recipe: must be one of {', '.join(sorted(RECIPES))}; got {name!r}")
    return RECIPES[name]


@dataclasses.dataclass
class RecipeCall:
    """One call of the command: what the user gave, under the names of its options.

    Attributes:
        options: the given options of TrainConfig.
        saved: config.json of the run that is resumed; None for a new one.
    """

    cls: type[Recipe]
    run: Path
    teacher: Path | None
    pairs_from: Path | None
    dataset: str | None
    source: str | None
    image_size: int | None
    model: str | None
    model_option: Sequence[str] | None
    conditional: bool
    recipe_option: Sequence[str] | None
    options: dict[str, Any]
    saved: dict[str, Any] | None

    def train(
        self, device: torch.device, *, resume: bool, quiet: bool, again: list[str]
    ) -> RunResult:
        """Trains; `again` are the words of the command that a resumed run needs besides its own.

        Raises:
            ValueError, TypeError, OSError, ImportError: as `train_recipe`, and for options that do
            not belong to the recipe.
        """
        import rfkernels.training as training

        self._refuse_what_does_not_fit()
        found = None if self.teacher is None else training.load(self.teacher, device=device)
        data, x0 = self._data("dataset", "data"), self._data("source", "source")
        if found is not None and found.conditional and data is not None and data.has_labels:
            self.conditional = True  # --set conditional=false for a student without labels
        recipe = self._recipe()
        network = self._network(recipe, found, data)
        with resumable(command_line(*self._command(), *again)):
            return training.train_recipe(
                recipe,
                None if network is None else network.to(device),
                data,
                teacher=found,
                pairs=self.pairs_from,
                x0=x0,
                run=self.run,
                resume=resume,
                progress=not quiet,
            )

    def _refuse_what_does_not_fit(self) -> None:
        name, on_pairs = self.cls.name, issubclass(self.cls, PairRecipe)
        if _objects(self.cls):
            raise ValueError(
                f"recipe: {name} needs {', '.join(_objects(self.cls))}, an object of your own; run it "
                "in Python, with rfkernels.training.train_recipe"
            )
        if self.cls.teacher == "required" and self.teacher is None:
            raise ValueError(f"teacher: {name} needs one, e.g. --teacher runs/digits; got none")
        if self.cls.teacher == "none" and self.teacher is not None:
            raise ValueError(f"teacher: {name} has none; got {self.teacher}")
        if not on_pairs:
            if self.pairs_from is not None:
                raise ValueError(f"pairs-from: {name} trains on data; got {self.pairs_from}")
            return
        refused = given(
            dataset=self.dataset, source=self.source, conditional=self.conditional or None
        )
        if refused:
            raise ValueError(
                f"{next(iter(refused))}: {name} trains on pairs of its teacher, which have their own; "
                "leave this out"
            )

    def _data(self, option: str, entry: str) -> Any:
        """The data set of an option, or that of the run."""
        name = getattr(self, option)
        if name is None and self.saved is not None:
            name = data_name(self.saved.get(entry), option, self.run)
        if name is not None:
            return open_data(name, self.image_size)
        if option == "dataset" and not issubclass(self.cls, PairRecipe):
            raise ValueError(
                f"dataset: {self.cls.name} trains on one, e.g. --dataset digits; got none"
            )
        return None

    def _recipe(self) -> Recipe:
        import rfkernels.training as training

        own = parse_settings("recipe-option", self.recipe_option)
        if "train" in own:
            raise ValueError(
                "recipe-option: options of TrainConfig are given by --set; got train=..."
            )
        if self.saved is not None:
            before = self.saved["config"]
            own, inner = {**before, **own}, before["train"]
        else:
            inner = training.to_dict(_default_train(self.cls))
            if not issubclass(self.cls, PairRecipe):
                inner["conditional"] = self.conditional
                if self.conditional:
                    inner["label_dropout"] = inner["label_dropout"] or 0.1
        values = {**resolve_distances(own), "train": {**inner, **self.options}}
        return training.from_dict(self.cls, values)

    def _network(self, recipe: Recipe, teacher: Any, data: Any) -> Any:
        """The network to train; None for a copy of the teacher."""
        seed = recipe.train.seed
        if self.model is None and teacher is not None:
            if self.model_option:
                raise ValueError(
                    "model-option: belongs to a new network; without --model it is the teacher's"
                )
            described, network = _like_teacher(teacher.model, flow_map=self.cls.flow_map, seed=seed)
            if self.saved is None or self.saved["model"] == described:
                return network
        elif self.saved is None or self.model is not None:
            return new_network(
                self.model,
                self.model_option,
                sample_shape=data.sample_shape if teacher is None else teacher.sample_shape,
                num_classes=self._classes(teacher, data),
                seed=seed,
                flow_map=self.cls.flow_map,
            )
        return saved_network(self.saved, seed, self.run)

    def _classes(self, teacher: Any, data: Any) -> int | None:
        if data is None:
            return teacher.num_classes if teacher.conditional else None
        return count_classes(data) if self.conditional else None

    def _command(self) -> list[str]:
        """The command that goes on. The teacher and files are not in the run; a network that was
        asked for is, but not whether it was a copy of the teacher."""
        words = ["train", "--run", str(self.run), "--resume"]
        named = given(
            teacher=self.teacher,
            pairs_from=self.pairs_from,
            dataset=self.dataset,
            source=self.source,
            image_size=self.image_size,
            model=self.model,
        )
        words += [f"--{name.replace('_', '-')}={value}" for name, value in named.items()]
        return words + [f"--model-option={option}" for option in self.model_option or ()]


def _like_teacher(teacher: Any, *, flow_map: bool, seed: int) -> tuple[dict[str, Any] | None, Any]:
    """(description of the network to train, the network); None as the network leaves a copy of the
    teacher to `train_recipe`.

    A flow map has other time features than a velocity, whose weights it therefore cannot take: of
    such a teacher it has the architecture, and new weights.
    """
    import rfkernels.models as models
    from rfkernels.ops.random import derive_seed

    described = models.describe(teacher)
    if not flow_map or described is None or described["options"].get("flow_map"):
        return described, None
    options = {**described["options"], "flow_map": True}
    network = models.build(described["name"], seed=derive_seed(seed, "init"), **options)
    return models.describe(network), network
