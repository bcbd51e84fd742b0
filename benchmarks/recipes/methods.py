"""What the table of recipes compares: each method, trained at an equal budget.

The budget counts samples seen by the trained network plus evaluations of teachers, pairs and averaged
networks included; a recipe's own second calls of the network it trains (forward derivatives) are not
counted, and show in the seconds. Methods without a teacher have the budget of both stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rfkernels import data, metrics, models, training
from rfkernels.training import recipes
from rfkernels.training.files import read_json, write_json


@dataclass(frozen=True)
class Budget:
    """Sizes of an experiment.

    Attributes:
        teacher, second: samples seen plus teacher evaluations of the two stages.
        pairs, pair_steps: pairs of a teacher, by Heun's method.
        width, depth, small: the network, and (width, depth) of a small student.
    """

    dataset: str
    teacher: int
    second: int
    pairs: int
    pair_steps: int
    width: int
    depth: int
    small: tuple[int, int]
    batch: int = 128

    @property
    def pair_cost(self) -> int:
        """Evaluations that making the pairs takes."""
        return self.pairs * self.pair_steps * 2


BUDGETS = {
    "digits": Budget("digits", 256_000, 384_000, 6000, 12, 256, 3, (96, 2)),
    "mnist": Budget("mnist", 320_000, 448_000, 6000, 12, 512, 3, (192, 2)),
    "quick": Budget("digits", 6400, 9600, 128, 3, 32, 1, (16, 1), 32),
}


@contextmanager
def counting() -> Iterator[dict[str, float]]:
    """Counts samples through networks in training mode ("seen") and frozen ("teacher"), and seconds of
    processor time, which other load on the machine changes little."""
    counts: dict[str, float] = {"seen": 0, "teacher": 0, "seconds": 0.0}

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, models.MLPVelocity):
            counts["seen" if module.training else "teacher"] += len(inputs[0])

    started = time.process_time()
    hook = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield counts
    finally:
        hook.remove()
        counts["seconds"] = time.process_time() - started


class Bench:
    """Trains the methods of one budget in a folder, each once; what is finished there is loaded.

    Attributes:
        used: names of the runs that the method at hand has needed so far.
    """

    def __init__(self, budget: Budget, folder: Path) -> None:
        self.budget, self.folder = budget, folder
        self.data = data.load_dataset(budget.dataset)
        self.shape = self.data.sample_shape
        self.used: set[str] = set()

    def network(self, *, small: bool = False, **options: Any) -> nn.Module:
        """A new network of the experiment's size."""
        width, depth = self.budget.small if small else (self.budget.width, self.budget.depth)
        return models.build(
            "mlp", seed=0, sample_shape=self.shape, width=width, depth=depth, **options
        )

    def config(self, evaluations: float, cost: float = 1.0, **options: Any) -> training.TrainConfig:
        """A loop of so many evaluations at `cost` a sample."""
        steps = max(1, round(evaluations / (self.budget.batch * cost)))
        defaults = {
            "steps": steps,
            "batch_size": self.budget.batch,
            "learning_rate": 1e-3,
            "log_every": min(50, steps),
            "holdout_every": steps,
            "checkpoint_every": steps,
            "tensorboard": False,
        }
        return training.TrainConfig(**{**defaults, **options})

    @property
    def pair_options(self) -> dict[str, Any]:
        """How every method makes its pairs."""
        return {"pairs": self.budget.pairs, "pair_steps": self.budget.pair_steps}

    @property
    def both(self) -> int:
        """The budget of a method without a teacher."""
        return self.budget.teacher + self.budget.second

    def run(self, name: str, call: Callable[[Path], Any]) -> Path:
        """The folder of a finished run; `call` trains what is not there."""
        folder = self.folder / self.budget.dataset / name
        self.used.add(name)
        if not (folder / "counts.json").is_file():
            with counting() as counts:
                call(folder)
            write_json(folder / "counts.json", counts)
        return folder

    def counts(self) -> dict[str, float]:
        """Samples seen, teacher evaluations and seconds of all the runs in `used`."""
        found = [
            read_json(self.folder / self.budget.dataset / name / "counts.json")
            for name in self.used
        ]
        return {key: sum(counts[key] for counts in found) for key in found[0]}

    def teacher(self, **options: Any) -> Path:
        """The first flow, of the first stage's budget."""
        labels = options.get("num_classes") is not None
        name = "teacher-labels" if labels else "teacher"
        config = self.config(self.budget.teacher, label_dropout=0.1 if labels else 0.0)

        def train(folder: Path) -> None:
            training.train_flow(
                self.network(**options), self.data, config, run=folder, resume=True, progress=True
            )

        return self.run(name, train)

    def recipe(
        self, name: str, recipe: recipes.Recipe, model: nn.Module | None, **arguments: Any
    ) -> Path:
        """A run of any recipe."""

        def train(folder: Path) -> None:
            training.train_recipe(
                recipe, model, run=folder, resume=True, progress=True, **arguments
            )

        return self.run(name, train)

    def flow(self, name: str, config: training.TrainConfig) -> Path:
        """A first flow by `train_flow`."""

        def train(folder: Path) -> None:
            training.train_flow(
                self.network(), self.data, config, run=folder, resume=True, progress=True
            )

        return self.run(name, train)

    def reflow(self, name: str, share: float = 1.0, **options: Any) -> Path:
        """A 2-RF of the teacher, with a share of what its pairs leave of the budget."""
        rest = share * (self.budget.second - self.budget.pair_cost)
        teacher = self.teacher(**options)
        guided = {"guidance_scale": 1.5} if options else {}
        config = training.ReflowConfig(**self.pair_options, **guided, train=self.config(rest))

        def train(folder: Path) -> None:
            training.reflow(teacher, config, run=folder, resume=True, progress=True)

        return self.run(name, train)

    def distill(self, name: str, teacher: Path, pairs: Path | None, evaluations: float) -> Path:
        """A one-step student."""
        config = training.DistillConfig(
            **self.pair_options, train=self.config(evaluations, learning_rate=5e-4)
        )

        def train(folder: Path) -> None:
            training.distill(teacher, config, pairs=pairs, run=folder, resume=True, progress=True)

        return self.run(name, train)

    @property
    def after_pairs(self) -> int:
        """What the pairs leave of the second stage's budget."""
        return self.budget.second - self.budget.pair_cost


def _two_rf_distilled(bench: Bench) -> Path:
    half = bench.after_pairs / 2
    straight = bench.reflow("2-rf-half", 0.5)
    return bench.distill("2-rf-distilled", straight, straight / "pairs", half)


def _slimflow(bench: Bench) -> Path:
    half = bench.after_pairs / 2
    reflow = recipes.SlimFlowReflow(**bench.pair_options, train=bench.config(half))
    small = bench.recipe(
        "slimflow-reflow", reflow, bench.network(small=True), teacher=bench.teacher()
    )
    # Two evaluations of the small flow a sample, for the two-step target.
    distill = recipes.SlimFlowDistill(train=bench.config(half, 2.0, learning_rate=5e-4))
    return bench.recipe("slimflow", distill, None, teacher=small, pairs=small / "pairs")


def _small_two_rf_distilled(bench: Bench) -> Path:
    """The same small student without SlimFlow: plain reflow into it, plain distillation."""
    half = bench.after_pairs / 2
    plain = recipes.SlimFlowReflow(**bench.pair_options, anneal=0.0, train=bench.config(half))
    small = bench.recipe("small-2-rf", plain, bench.network(small=True), teacher=bench.teacher())
    return bench.distill("small-distilled", small, small / "pairs", half)


def _instaflow(bench: Bench) -> Path:
    half = bench.after_pairs / 2
    straight = bench.reflow("2-rf-labels", 0.5, num_classes=10)
    recipe = recipes.InstaFlowDistill(
        distance=metrics.PerceptualDistance("random-conv"),
        train=bench.config(half, learning_rate=5e-4),
    )
    return bench.recipe("instaflow", recipe, None, teacher=straight, pairs=straight / "pairs")


def _plus_plus(bench: Bench, name: str, **options: Any) -> Path:
    recipe = recipes.RectifiedFlowPlusPlus(
        **bench.pair_options, **options, train=bench.config(bench.after_pairs)
    )
    return bench.recipe(name, recipe, None, teacher=bench.teacher())


def _perflow(bench: Bench) -> Path:
    # Four steps of the teacher a sample, each one evaluation.
    recipe = recipes.PeRFlow(teacher_steps=4, train=bench.config(bench.budget.second, 5.0))
    return bench.recipe("perflow", recipe, None, data=bench.data, teacher=bench.teacher())


def _flow_map(bench: Bench, name: str, recipe: recipes.Recipe) -> Path:
    return bench.recipe(name, recipe, bench.network(flow_map=True), data=bench.data)


def _re_meanflow(bench: Bench) -> Path:
    recipe = recipes.ReMeanFlow(**bench.pair_options, train=bench.config(bench.after_pairs))
    network = bench.network(flow_map=True)
    return bench.recipe("re-meanflow", recipe, network, teacher=bench.teacher())


def _diffusion_teacher(bench: Bench) -> Path:
    """A network that predicts noise on a schedule, trained as such."""
    inner = models.TimeScaled(bench.network(), scale=1e-3)
    network = models.NoisePrediction(inner, "linear")
    config = bench.config(bench.budget.teacher)

    def train(folder: Path) -> None:
        training.train_flow(network, bench.data, config, run=folder, resume=True, progress=True)

    return bench.run("diffusion-teacher", train)


def _rectified_diffusion(bench: Bench) -> Path:
    recipe = recipes.RectifiedDiffusion(**bench.pair_options, train=bench.config(bench.after_pairs))
    teacher = _diffusion_teacher(bench)
    return bench.recipe("rectified-diffusion", recipe, None, teacher=teacher)


def _phased(bench: Bench) -> Path:
    # Two of eight DDIM steps of the teacher a sample.
    recipe = recipes.RectifiedDiffusionPhased(
        segments=4, grid_steps=8, train=bench.config(bench.budget.second, 3.0)
    )
    teacher = _diffusion_teacher(bench)
    return bench.recipe("phased", recipe, None, data=bench.data, teacher=teacher)


def _consistency(bench: Bench) -> Path:
    half = bench.after_pairs / 2
    stage = recipes.RectifiedDiffusion(**bench.pair_options, train=bench.config(half))
    teacher = _diffusion_teacher(bench)
    first = bench.recipe("rectified-diffusion-half", stage, None, teacher=teacher)
    # One step of the teacher and one evaluation of the average a sample.
    recipe = recipes.RectifiedDiffusionConsistency(train=bench.config(half, 3.0))
    return bench.recipe("consistency", recipe, None, data=bench.data, teacher=first)


METHODS: dict[str, Callable[[Bench], Path]] = {
    "1-RF": lambda b: b.flow("1-rf", b.config(b.both)),
    "OT flow matching": lambda b: b.flow("ot", b.config(b.both, coupling="ot")),
    "MeanFlow": lambda b: _flow_map(b, "meanflow", recipes.MeanFlow(train=b.config(b.both))),
    "improved MeanFlow": lambda b: _flow_map(
        b, "improved-meanflow", recipes.ImprovedMeanFlow(train=b.config(b.both))
    ),
    # The published times rarely visit t = 0, where one step begins.
    "MeanFlow, uniform times": lambda b: _flow_map(
        b, "meanflow-uniform", recipes.MeanFlow(times="uniform", train=b.config(b.both))
    ),
    "improved MeanFlow, uniform times": lambda b: _flow_map(
        b,
        "improved-meanflow-uniform",
        recipes.ImprovedMeanFlow(times="uniform", train=b.config(b.both)),
    ),
    # A quarter of the samples has two evaluations of the average.
    "shortcut": lambda b: _flow_map(b, "shortcut", recipes.Shortcut(train=b.config(b.both, 1.5))),
    "consistency FM": lambda b: b.recipe(
        "consistency-fm",
        recipes.ConsistencyFM(train=b.config(b.both)),
        b.network(),
        data=b.data,
    ),
    "2-RF": lambda b: b.reflow("2-rf"),
    "1-RF distilled": lambda b: b.distill("distilled", b.teacher(), None, b.after_pairs),
    "2-RF distilled": _two_rf_distilled,
    "2-RF++, Huber": lambda b: _plus_plus(b, "2-rf++"),
    "2-RF++, perceptual": lambda b: _plus_plus(
        b, "2-rf++-perceptual", perceptual=metrics.PerceptualDistance("random-conv")
    ),
    "Re-MeanFlow": _re_meanflow,
    "PeRFlow": _perflow,
    "SlimFlow, small": _slimflow,
    "2-RF distilled, small": _small_two_rf_distilled,
    "InstaFlow, labels": _instaflow,
    "rectified diffusion": _rectified_diffusion,
    "rectified diffusion, phased": _phased,
    "rectified diffusion, consistency": _consistency,
}
