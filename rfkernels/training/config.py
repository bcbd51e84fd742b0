"""The options of a training run: frozen dataclasses that check themselves.

`config_json.py` writes them to a run's config.json and reads them back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from rfkernels.flow.paths import LinearPath, get_path
from rfkernels.flow.times import get_time_distribution
from rfkernels.training.option_checks import number, require, whole

__all__ = ["DistillConfig", "OwnObject", "ReflowConfig", "TrainConfig"]

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LOSSES = ("mse", "pseudo_huber", "pseudo_huber_elementwise")

# What TrainConfig checks: whole numbers, numbers within bounds (None where that is a default), words.
_FROM_1 = (
    "steps", "batch_size", "accumulate", "holdout_every", "log_every", "checkpoint_every",
    "keep_checkpoints", "sample_steps",
)  # fmt: skip
_FROM_0 = ("warmup_steps", "sample_every", "seed")
_BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (lambda x: x > 0, "must be positive"),
    "weight_decay": (lambda x: x >= 0, "must not be negative"),
    "clip_norm": (lambda x: x > 0, "must be positive or None"),
    "ema_decay": (lambda x: 0 <= x < 1, "must be in [0, 1)"),
    "time_max": (lambda x: 0 < x <= 1, "must be in (0, 1]"),
    "huber_c": (lambda x: x > 0, "must be positive or None"),
    "label_dropout": (lambda x: 0 <= x < 1, "must be in [0, 1)"),
    "holdout": (lambda x: 0 <= x < 1, "must be in [0, 1)"),
}
_OPTIONAL = ("clip_norm", "time_max", "huber_c")
_CHOICES = {
    "schedule": ("cosine", "constant"),
    "loss": LOSSES,
    "coupling": ("independent", "ot", "ot-global", "given"),
    "optimizer": ("adamw", "adamp", "sgdp"),
    "parallel": ("ddp", "fsdp"),
    "autocast": (None, "bfloat16"),
    "conditional": (None, True, False),
}


@dataclass(frozen=True)
class OwnObject:
    """Stands for an object of the user's own in a config read back: JSON only names it."""

    name: str


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a velocity network is trained. Times: t = 0 is the source, t = 1 the data.

    Attributes:
        steps: optimizer steps.
        batch_size: samples per step, over all its micro-batches.
        accumulate: micro-batches per step; divides batch_size. The result is that of the whole
            batch, up to rounding.
        optimizer: "adamw"; "adamp" or "sgdp", for networks whose weights are followed by norms
            (Heo et al., 2021), in `rfkernels.optim`.
        learning_rate: its peak.
        schedule: "cosine" (to zero at the last step) or "constant", after the warm-up.
        warmup_steps: linear warm-up from zero.
        weight_decay: decoupled, as in AdamW; 0 makes that Adam.
        betas: of AdamW and AdamP; the first is the momentum of SGDP.
        clip_norm: greatest norm of the gradient; None for no clipping.
        ema_decay: of the averaged weights, in [0, 1); it ramps up as min(ema_decay, (1 + n) / (10 +
            n)).
        seed: everything random is a function of it and of the step or sample.
        path: "linear", "trigonometric", "vp", "sub-vp" or a path object of rfkernels.flow.
        time_distribution: "uniform", "logit-normal", ... or an object of rfkernels.flow.
        time_min, time_max: drawn times are scaled to [time_min, time_max]; the original rectified
            flow has time_min = 1e-3. None is the path's own `t_end`, the largest time with a finite
            target (1 but for "vp").
        loss: "mse", "pseudo_huber" or "pseudo_huber_elementwise"; huber_c is the constant of the
            last two.
        coupling: "independent"; "ot" (exact minibatch optimal transport, of several processes each
            within its own part of a step; "ot-global": over the whole step); "given" (row i of x0
            with row i of x1).
        conditional: whether labels reach the network as `y`; None: when the data has labels and the
            network a `null_label`. None for runs on pairs, which have what they were made with.
        label_dropout: probability of replacing a sample's label by the network's `null_label`.
        holdout: fraction of the data held out for `holdout_loss`.
        holdout_every: steps between measurements of it.
        autocast: None or "bfloat16", for the network only.
        log_every: steps between lines of the metrics.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: how many of them stay.
        sample_every: steps between sample pictures; 0 for none.
        sample_steps: steps of these, by the solver that the run is made for.
        tensorboard: also write TensorBoard events to the run folder; None: when tensorboard is
            installed.
        parallel: how several processes (torchrun, accelerate) share the network: "ddp", each has it
            whole; "fsdp", each has a shard of weights, gradients and optimizer state. batch_size
            counts the samples of all of them.
        num_threads: torch.set_num_threads for the run; None leaves it. Weights are reproducible bit
            for bit at the same thread count.
    """

    steps: int = 3000
    batch_size: int = 256
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    schedule: str = "cosine"
    warmup_steps: int = 50
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    path: Any = "linear"
    time_distribution: Any = "uniform"
    time_min: float = 0.0
    time_max: float | None = None
    loss: str = "mse"
    huber_c: float | None = None
    coupling: str = "independent"
    conditional: bool | None = None
    label_dropout: float = 0.0
    holdout: float = 0.1
    holdout_every: int = 250
    autocast: str | None = None
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    sample_every: int = 0
    sample_steps: int = 20
    tensorboard: bool | None = None
    parallel: str = "ddp"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in _FROM_1:
            whole(name, getattr(self, name), 1)
        for name in _FROM_0:
            whole(name, getattr(self, name), 0)
        require(self.seed < 2**63, "seed", "must be below 2**63", self.seed)
        if self.num_threads is not None:
            whole("num_threads", self.num_threads, 1)
        rule = f"must divide batch_size, {self.batch_size}"
        require(self.batch_size % self.accumulate == 0, "accumulate", rule, self.accumulate)
        for name, (holds, rule) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                require(holds(number(name, value)), name, rule, value)
        self._check_betas()
        inside = 0 <= number("time_min", self.time_min) < (self.time_max or 1)
        require(inside, "time_min", "must be in [0, time_max)", self.time_min)
        if self.huber_c is not None:
            rule = "belongs to the pseudo-Huber losses; loss is 'mse'"
            require(self.loss != "mse", "huber_c", rule, self.huber_c)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(value in choices, name, f"must be one of {', '.join(map(str, choices))}", value)
        if not isinstance(self.path, OwnObject):
            self._check_time_max()
        if not isinstance(self.time_distribution, OwnObject):
            get_time_distribution(self.time_distribution)

    def _check_betas(self) -> None:
        two = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        require(two, "betas", "must be two numbers", self.betas)
        # JSON gives a list back; the dataclass stays hashable and comparable with a tuple.
        object.__setattr__(self, "betas", tuple(number("betas", b) for b in self.betas))
        require(all(0 <= b < 1 for b in self.betas), "betas", "must lie in [0, 1)", self.betas)

    def _check_time_max(self) -> None:
        """A path whose target diverges at the data must be left before."""
        last = getattr(get_path(self.path), "t_end", 1.0)
        if self.time_max is not None:
            require(
                self.time_max <= last,
                "time_max",
                f"must not exceed {last}, the largest time with a finite target of this path",
                self.time_max,
            )
        require(self.time_min < last, "time_min", f"must be below {last}", self.time_min)


def check_linear(train: TrainConfig, why: str) -> None:
    """Refuses a path other than the straight one; what was read back by its name may be one."""
    path = train.path
    straight = isinstance(path, OwnObject) or isinstance(get_path(path), LinearPath)
    require(straight, "train.path", why, path)


def check_train(value: object) -> None:
    """Refuses what is no TrainConfig."""
    if not isinstance(value, TrainConfig):
        raise TypeError(f"train: must be a TrainConfig; got {type(value).__name__}")


def check_pair_options(config: Any) -> None:
    """Refuses options by which no pairs can be made, or none are left to train on."""
    check_train(config.train)
    whole("pairs", config.pairs, 2)
    if config.pair_steps is not None:
        whole("pair_steps", config.pair_steps, 1)
    whole("pair_batch", config.pair_batch, 1)
    require(isinstance(config.solver, str), "solver", "must be a solver's name", config.solver)
    if config.guidance_scale is not None:
        number("guidance_scale", config.guidance_scale)
    held = round(config.pairs * config.train.holdout)
    require(held < config.pairs, "train.holdout", "must leave pairs to train on", held)
    require(
        config.train.coupling == "independent",
        "train.coupling",
        "pairs are the coupling here",
        config.train.coupling,
    )
    require(
        config.train.conditional is None,
        "train.conditional",
        "pairs have the condition they were made with",
        config.train.conditional,
    )


@dataclass(frozen=True, kw_only=True)
class ReflowConfig:
    """Reflow: the teacher's ODE makes pairs (x0, x1), and a copy of it is trained on them (Liu et
    al., 2023, 3.1).

    Attributes:
        rounds: how often; each round's teacher is the EMA network of the round before.
        pairs: pairs per round.
        solver, pair_steps: how the teacher's ODE is solved; no steps (None) for an adaptive solver.
        pair_batch: samples solved at a time.
        guidance_scale: classifier-free guidance of the teacher while making pairs; None for none.
        train: the training on the pairs; its seed is also the one of the pairs.
    """

    rounds: int = 1
    pairs: int = 10_000
    solver: str = "heun"
    pair_steps: int | None = 20
    pair_batch: int = 1000
    guidance_scale: float | None = None
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=2500, learning_rate=1e-3))

    def __post_init__(self) -> None:
        whole("rounds", self.rounds, 1)
        check_pair_options(self)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation of a teacher's ODE into a student of k Euler steps (Liu et al., 2023, 3.2).

    Attributes:
        k: Euler steps of the student; its times are 0, 1/k, ..., (k-1)/k.
        distance: "l2", or a callable(prediction, x1) -> (B,) losses or their mean. "l2" compares
            velocities with the loss of `train`; a callable sees the predicted end point x_t + (1 -
            t) v and x1.
        reverse: distil the way back instead, a fast encoder: times 1/k, 2/k, ..., 1, and a callable
            distance sees x_t - t v and x0. Such a student is for `rfkernels.invert`, in k Euler
            steps.
        pairs, solver, pair_steps, pair_batch, guidance_scale: as in ReflowConfig, for when no pairs
            are given.
        train: the training on the pairs; its time_distribution is not used.
    """

    k: int = 1
    distance: str | Distance = "l2"
    reverse: bool = False
    pairs: int = 10_000
    solver: str = "heun"
    pair_steps: int | None = 20
    pair_batch: int = 1000
    guidance_scale: float | None = None
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1500, learning_rate=1e-3))

    def __post_init__(self) -> None:
        whole("k", self.k, 1)
        if not isinstance(self.reverse, bool):
            raise TypeError(f"reverse: must be true or false; got {self.reverse!r}")
        check_pair_options(self)
        require(
            not (self.reverse and self.train.sample_every),
            "train.sample_every",
            "a student of the way back makes no samples",
            self.train.sample_every,
        )
        if not callable(self.distance) and not isinstance(self.distance, OwnObject):
            require(self.distance == "l2", "distance", "must be 'l2' or a callable", self.distance)
        check_linear(self.train, "a student of Euler steps learns the linear path")
