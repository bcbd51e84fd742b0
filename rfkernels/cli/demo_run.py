"""What `rfkernels demo` does: its budgets, three stages of training, and the measurements. It writes the run folders
and shows bars; the command in demo.py shows what comes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import rfkernels.data as datasets
import rfkernels.models as models
import rfkernels.training as training
from rfkernels.cli.quality import STEPS, Quality, Yardstick, measure_steps
from rfkernels.metrics import transport_cost
from rfkernels.metrics.drawer import Drawer
from rfkernels.ops.random import derive_seed
from rfkernels.training.progress import Bar

__all__ = ["BUDGETS", "MODELS", "Budget", "Outcome", "Target", "run_demo"]

MODELS = ("1-RF", "2-RF", "distilled")
SHOWN = 16  # columns of the picture


@dataclass(frozen=True)
class Target:
    """What must come out, or the demo says so and fails.

    Attributes:
        gain: how many times better the one-step 2-RF is than the one-step 1-RF, in Frechet distance.
        frechet: the one-step 2-RF's Frechet distance, at most.
        one_nn_many: 1-nearest-neighbour accuracy of the 1-RF at 32 steps, at most.
        one_nn_one: that of the one-step 2-RF, at most.
    """

    gain: float
    frechet: float
    one_nn_many: float
    one_nn_one: float


@dataclass(frozen=True)
class Budget:
    """How much work the demo does on a data set, and what must come of it.

    Digits in full take some 150 s of one core, digits in small 30 s, mnist in full twice as long as digits.
    The networks learn the labels, for `rfkernels edit` and guidance; only the full budgets learn them well.
    """

    width: int
    steps: tuple[int, int, int]  # of 1-RF, reflow, distillation
    pairs: int
    held_out: int
    draws: int
    target: Target
    batch_size: int = 128
    learning_rates: tuple[float, float, float] = (1e-3, 1e-3, 5e-4)
    # Heun's evaluations are spent twice per step; 12 steps differ from 64 by less than the noise of the measures.
    pair_steps: int = 12


BUDGETS = {
    ("digits", "full"): Budget(
        384, (3000, 2500, 1500), 10_000, 297, 10, Target(10, 1.0, 0.70, 0.75)
    ),
    ("digits", "small"): Budget(256, (900, 500, 250), 4000, 297, 4, Target(5, 1.5, 0.85, 0.90)),
    ("mnist", "full"): Budget(512, (3000, 2500, 1500), 10_000, 500, 4, Target(5, 40.0, 0.70, 0.75)),
    ("mnist", "small"): Budget(512, (700, 300, 150), 3000, 500, 2, Target(1.5, 150.0, 1.0, 1.0)),
}


@dataclass
class Outcome:
    """Everything that the demo found.

    Attributes:
        curves: model -> steps -> quality, Euler steps from the same noises.
        gaussian: quality of a Gaussian fitted to the training data.
        held_out_nearest: median distance of held-out data to the nearest training sample.
        straightness: model -> S of its flow (not of the student, which has no flow).
        cost: coupling -> mean squared distance between noise and sample.
        shown: model -> steps -> the first samples; `noise` and `real` beside them.
        seconds: stage -> seconds.
    """

    sizes: tuple[int, int]
    sample_shape: tuple[int, ...]
    parameters: int
    curves: dict[str, dict[int, Quality]] = field(default_factory=dict)
    gaussian: Quality | None = None
    held_out_nearest: float = 0.0
    straightness: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    shown: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    noise: torch.Tensor | None = None
    real: torch.Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """How many times better one step of the 2-RF is than one step of the 1-RF."""
        return self.curves["1-RF"][1].frechet / self.curves["2-RF"][1].frechet

    def checks(self, target: Target) -> list[tuple[str, float, str, bool]]:
        """(what, value, bound, whether it holds) for each target."""
        one, many = self.curves["2-RF"][1], self.curves["1-RF"][max(STEPS)]
        return [
            (
                "one step: 2-RF better than 1-RF, times",
                self.gain,
                f">= {target.gain:g}",
                self.gain >= target.gain,
            ),
            (
                "Frechet distance, 2-RF, 1 step",
                one.frechet,
                f"<= {target.frechet:g}",
                one.frechet <= target.frechet,
            ),
            (
                f"1-NN accuracy, 1-RF, {max(STEPS)} steps",
                many.one_nn,
                f"<= {target.one_nn_many:g}",
                many.one_nn <= target.one_nn_many,
            ),
            (
                "1-NN accuracy, 2-RF, 1 step",
                one.one_nn,
                f"<= {target.one_nn_one:g}",
                one.one_nn <= target.one_nn_one,
            ),
        ]


def run_demo(
    dataset: str,
    budget: Budget,
    seed: int,
    folder: Path,
    *,
    resume: bool,
    progress: bool,
    stage: Callable[[str], object],
) -> Outcome:
    """Trains, reflows, distils and measures.

    Args:
        folder: gets the runs 1-rf, 2-rf and distilled.
        resume: go on with the runs in it.
        stage: told the title of each stage as it begins.
    """
    data = datasets.load_dataset(dataset)
    fraction = budget.held_out / data.size
    # The training loop makes this same split from the seed, so the held-out part is what no model has seen.
    train, held_out = datasets.split(data, fraction, seed)
    network = models.build(
        "mlp",
        seed=derive_seed(seed, "init"),
        sample_shape=data.sample_shape,
        width=budget.width,
        depth=3,
        num_classes=data.num_classes,
    )
    parameters = sum(p.numel() for p in network.parameters())
    outcome = Outcome((train.size, held_out.size), tuple(data.sample_shape), parameters)

    def options(which: int, **more: object) -> training.TrainConfig:
        return training.TrainConfig(
            steps=budget.steps[which],
            learning_rate=budget.learning_rates[which],
            batch_size=budget.batch_size,
            seed=seed,
            **more,
        )

    shared = {"pairs": budget.pairs, "solver": "heun", "pair_steps": budget.pair_steps}
    common = {"resume": resume, "progress": progress}

    begin = time.monotonic()

    def timed(name: str) -> None:
        nonlocal begin
        outcome.seconds[name] = round(time.monotonic() - begin, 1)
        begin = time.monotonic()

    stage(f"Train a first rectified flow (1-RF) on {train.size} images")
    first = training.train_flow(
        network,
        data,
        options(0, holdout=fraction, label_dropout=0.1),
        run=folder / "1-rf",
        **common,
    )
    timed("train 1-RF")
    stage(
        f"Reflow: pair {budget.pairs} noises with the 1-RF's images, learn straight lines between them (2-RF)"
    )
    reflow_config = training.ReflowConfig(train=options(1, time_distribution="u-shaped"), **shared)
    second = training.reflow(first, reflow_config, run=folder / "2-rf", **common)
    timed("reflow to 2-RF")
    stage("Distil: teach a student to do the whole way in one step")
    distill_config = training.DistillConfig(k=1, train=options(2), **shared)
    student = training.distill(
        second, distill_config, pairs=folder / "2-rf" / "pairs", run=folder / "distilled", **common
    )
    timed("distil")
    stage("Measure: the same noises through every model at 1, 2, 4, 8 and 32 steps")
    _measure(
        outcome,
        dict(zip(MODELS, (first, second, student), strict=True)),
        train,
        held_out,
        budget,
        seed,
        progress,
    )
    timed("measure")
    return outcome


def _measure(
    outcome: Outcome,
    results: dict[str, training.RunResult],
    train: datasets.Dataset,
    held_out: datasets.Dataset,
    budget: Budget,
    seed: int,
    progress: bool,
) -> None:
    """Fills the outcome with everything that is measured."""
    yardstick = Yardstick(train.x, held_out.x, budget.draws)
    index = torch.arange(yardstick.count)
    key = derive_seed(seed, "evaluation")
    with Bar("measure", len(results) * len(STEPS), show=progress) as bar:
        for name, result in results.items():
            drawer = Drawer(result)
            curve, samples = measure_steps(
                lambda n, d=drawer: d.draw(index, seed=key, steps=n)[0],
                yardstick,
                STEPS,
                bar.advance,
            )
            outcome.curves[name] = curve
            outcome.shown[name] = {n: x[:SHOWN] for n, x in samples.items()}
            noise = drawer.noise(index, key)
            if name != "distilled":  # a student of one step has no flow
                # The finest run of the ODE stands for its end point.
                outcome.cost[name] = transport_cost(noise, samples[max(STEPS)])
                outcome.straightness[name] = drawer.straightness(
                    index[:1000], seed=key, steps=max(STEPS)
                )
    unpaired = min(len(noise), train.size)
    outcome.cost["independent"] = transport_cost(noise[:unpaired], train.x[:unpaired])
    outcome.gaussian = yardstick.measure(yardstick.gaussian(seed))
    outcome.held_out_nearest = yardstick.held_out_nearest()
    outcome.noise = noise[:SHOWN]
    # From all over the held-out part: data sets come sorted by class.
    outcome.real = held_out.x[:: max(1, held_out.size // SHOWN)][:SHOWN]
