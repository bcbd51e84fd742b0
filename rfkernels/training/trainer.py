"""The training loop: optimizer, average, checkpoints, metrics. Objectives say what to minimise."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rfkernels.ops.random import derive_seed
from rfkernels.training import checkpoint as checkpoints
from rfkernels.training.config import TrainConfig
from rfkernels.training.ema import EMA
from rfkernels.training.interrupt import InterruptGuard
from rfkernels.training.metrics_log import MetricsLog, tensorboard_wanted
from rfkernels.training.objective import Batch, Objective
from rfkernels.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors
from rfkernels.training.parallel import (
    broadcast,
    is_sharded,
    local,
    make_parallel,
    put,
    shard,
    whole,
)
from rfkernels.training.processes import agreed, on_first, processes
from rfkernels.training.progress import Bar
from rfkernels.training.run_folder import RunFolder
from rfkernels.training.schedule import learning_rate

__all__ = ["RunResult", "Trainer", "TrainingDivergedError", "check_processes", "device_of"]


_log = logging.getLogger("rfkernels")

_AGREE_EVERY = 10  # steps between questions whether some process was interrupted


class TrainingDivergedError(RuntimeError):
    """The loss is no longer finite."""


@dataclass
class RunResult:
    """A finished run.

    Attributes:
        model: the network with its last weights.
        ema: a copy with the averaged weights, in evaluation mode; the one to sample from.
        run: the run's folder, None when nothing was written.
        metrics: the logged lines, each a dict with `step`; `loss` is the mean since the line
            before.
        kind: "train", "reflow", "distill" or a recipe's name.
        config: the run's TrainConfig, ReflowConfig, DistillConfig or recipe.
        sample_shape: shape of one sample.
        num_classes: how many class labels the network takes as `y`; None for none.
        conditional: whether it was trained with labels or condition vectors.
    """

    model: nn.Module
    ema: nn.Module
    run: Path | None
    metrics: list[dict[str, Any]]
    kind: str = "train"
    config: Any = None
    sample_shape: tuple[int, ...] = ()
    num_classes: int | None = None
    conditional: bool = False


def device_of(model: object) -> torch.device:
    """Where a network's weights are; the CPU for one without weights, and for what is no network."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


@dataclass
class Trainer:
    """Trains `model` on `objective`, alone or with the other processes of torch.distributed.

    Attributes:
        name: the public function, for messages.
        picture: called with (EMA network, step) every `config.sample_every` steps.
    """

    name: str
    model: nn.Module
    objective: Objective
    config: TrainConfig
    run: RunFolder | None = None
    progress: bool = False
    picture: Callable[[nn.Module, int], None] | None = None
    _loss_sum: torch.Tensor = field(init=False)
    _loss_count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.device = device_of(self.model)
        self._here = processes()
        check_processes(self.config, self._here.count)
        # One process's dropout says nothing of another's samples.
        purpose = f"dropout {self._here.rank}" if self._here.rank else "dropout"
        self._dropout_seed = derive_seed(self.config.seed, purpose)
        self._loss_sum = torch.zeros((), device=self.device)
        self._seen = 0.0  # seconds of training before this call

    def fit(self) -> tuple[nn.Module, list[dict[str, Any]]]:
        """Runs the steps that are left; returns (the EMA network, the metrics).

        Raises:
            TrainingDivergedError: the loss is not finite.
            KeyboardInterrupt: Ctrl-C; the run's state has been saved.
        """
        config = self.config
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if config.num_threads is not None:
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(config.num_threads)
            # The loop reseeds torch's generators; the caller's random state comes back afterwards.
            stack.enter_context(
                torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])
            )
            broadcast(self.model)
            self._ema = EMA(self.model, config.ema_decay)
            if self._here.count > 1 and config.parallel == "fsdp":
                shard(self.model)
                shard(self._ema.model)
                self._ema.bind()
            self.objective.attach(self._ema.model)
            self._parameters = [p for p in self.model.parameters() if p.requires_grad]
            self._optimizer = make_optimizer(self._parameters, config)
            restored = self._restore()
            self._together = make_parallel(self.model, self.objective, config.parallel)
            step = restored or 0
            writes = self.run is not None and self._here.rank == 0
            board = None
            if writes and tensorboard_wanted(config.tensorboard):
                board = self.run.path / "tensorboard"
            self._metrics = MetricsLog(
                self.run.metrics if writes else None, resume_at=step, tensorboard=board
            )
            stack.callback(self._metrics.close)
            self._held = self.objective.held_out()
            self._bar = stack.enter_context(
                Bar(
                    self.name,
                    config.steps,
                    start=step,
                    show=self.progress and self._here.rank == 0,
                )
            )
            guard = stack.enter_context(InterruptGuard())
            if restored is None and self.run is not None:
                self._save(0)  # so that a run killed early resumes from the same initial weights
            self._loop(step, guard)
        return self._ema.model, self._metrics.entries

    def _loop(self, step: int, guard: InterruptGuard) -> None:
        config = self.config
        self._clock = time.monotonic()
        self.model.train()
        while step < config.steps:
            self._step(step)
            step += 1
            last = step == config.steps
            if step % config.log_every == 0 or last:
                self._log(step)
            stop = self._stop_requested(guard, step)
            if self.run is not None and (step % config.checkpoint_every == 0 or last or stop):
                self._refuse_divergence(step)
                self._save(step)
            if self.picture is not None and config.sample_every and step % config.sample_every == 0:
                on_first(partial(self.picture, self._ema.model, step))
            self._bar.advance()
            if stop:
                self._stop(step)
        self.model.eval()

    def _step(self, step: int) -> None:
        """One optimizer step. All of its randomness is a function of (seed, step)."""
        config = self.config
        torch.manual_seed((self._dropout_seed + step) % 2**63)  # for dropout inside the network
        rate = learning_rate(config, step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        batch = self.objective.batch(step)
        for index, part in enumerate(_parts(batch, config.accumulate)):
            with self._together.micro_batch(last=index == config.accumulate - 1):
                loss = self._together.loss(part)
                if config.accumulate > 1:
                    loss = loss / config.accumulate
                loss.backward()
            self._loss_sum += loss.detach()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._ema.update(step)
        self._loss_count += 1

    def _log(self, step: int) -> None:
        loss = self._together.mean(self._loss_sum).item() / max(self._loss_count, 1)
        if not math.isfinite(loss):
            self._diverged(step)
        self._loss_sum.zero_()
        self._loss_count = 0
        values = {
            "loss": loss,
            "learning_rate": learning_rate(self.config, step - 1),
            "seconds": round(self._seconds(), 3),
        }
        every = self.config.holdout_every
        if self._held is not None and (
            step == self.config.steps or step // every > (step - self.config.log_every) // every
        ):
            values["holdout_loss"] = self._held_out_loss()
        self._metrics.add(step, values)
        self._bar.note(f"loss {loss:.4f}")

    def _seconds(self) -> float:
        return self._seen + time.monotonic() - self._clock

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """The EMA network's loss on the held-out samples."""
        count = len(self._held["t"])
        # As many at a time as a micro-batch has, so that what trains also fits here.
        size = self.config.batch_size // (self.config.accumulate * self._here.count)
        total = torch.zeros((), device=self.device)
        for first in range(0, count, size):
            part = {name: value[first : first + size] for name, value in self._held.items()}
            total += self.objective.loss(self._ema.model, part) * len(part["t"])
        return total.item() / count

    def _refuse_divergence(self, step: int) -> None:
        """A checkpoint of weights that are not finite would in time replace the good ones."""
        norms = torch._foreach_norm(local(p.detach() for p in self._parameters))
        total = torch.stack([norm.float() for norm in norms]).sum() + self._loss_sum
        if not math.isfinite(self._together.mean(total).item()):
            self._diverged(step)

    def _diverged(self, step: int) -> None:
        kept = ""
        if self.run is not None:
            good = checkpoints.steps_on_disk(self.run.checkpoints)
            kept = f"; the last good checkpoint is step {good[-1]}" if good else ""
        raise TrainingDivergedError(
            f"{self.name}: the loss stopped being finite before step {step}{kept}. "
            f"Lower learning_rate ({self.config.learning_rate:g}), raise warmup_steps, or look "
            "for NaN in the data"
        )

    def _save(self, step: int) -> None:
        parts = {
            "model": whole(self.model.state_dict()),
            "ema": whole(self._ema.model.state_dict()),
            "optimizer": whole(optimizer_tensors(self.model, self._optimizer)),
        }
        state = {
            "loss_sum": self._together.mean(self._loss_sum).item(),
            "loss_count": self._loss_count,
            "seconds": 0.0 if step == 0 else self._seconds(),
            "num_threads": torch.get_num_threads(),
            "processes": self._here.count,
            "torch": torch.__version__,
        }
        keep = self.config.keep_checkpoints
        try:
            on_first(lambda: checkpoints.save(self.run.checkpoints, step, parts, state, keep=keep))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.name}: cannot write the checkpoint of step {step} to {self.run.path} "
                f"({error.strerror or error}); free some space and go on with resume=True",
            ) from error

    def _restore(self) -> int | None:
        """Loads the newest whole checkpoint of the run; returns its step, None without one."""
        if self.run is None or not self.run.resumed:
            return None
        on_first(lambda: checkpoints.clear_leftovers(self.run.checkpoints))
        found = checkpoints.latest(self.run.checkpoints)
        if found is None:
            return None
        # Killed between writing its last checkpoint and removing the oldest, a run has one too many.
        keep = self.config.keep_checkpoints
        on_first(lambda: checkpoints.prune(self.run.checkpoints, found.step, keep=keep))
        try:
            _load(self.model, found.tensors("model"))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"model: is not the network of {self.run.path}: {error}") from error
        _load(self._ema.model, found.tensors("ema"))
        load_optimizer(self.model, self._optimizer, found.tensors("optimizer"))
        self._loss_sum.fill_(found.state["loss_sum"])
        self._loss_count = found.state["loss_count"]
        self._seen = found.state["seconds"]
        before, now = found.state["num_threads"], torch.get_num_threads()
        if before != now:
            _log.info("%s: resumed on %d threads after %d; bits may differ", self.name, now, before)
        before = found.state.get("processes", 1)
        if before != self._here.count:
            _log.info(
                "%s: resumed by %d processes after %d; bits may differ",
                self.name,
                self._here.count,
                before,
            )
        return found.step

    def _stop_requested(self, guard: InterruptGuard, step: int) -> bool:
        """Whether to stop after this step; several processes must stop at the same one."""
        if self._here.count == 1:
            return guard.requested
        return step % _AGREE_EVERY == 0 and bool(agreed(int(guard.requested)))

    def _stop(self, step: int) -> None:
        if self.run is None:
            raise KeyboardInterrupt(
                f"{self.name}: stopped after step {step}; without a run folder nothing is kept"
            )
        raise KeyboardInterrupt(
            f"{self.name}: stopped after step {step} and saved; go on with resume=True "
            f"(--resume) and the same options on {self.run.path}"
        )


def check_processes(config: TrainConfig, count: int) -> None:
    """Refuses steps and pictures that `count` processes cannot share."""
    if count > 1 and config.batch_size % (count * config.accumulate):
        raise ValueError(
            f"batch_size: must be a multiple of processes * accumulate, {count} * "
            f"{config.accumulate}; got {config.batch_size}"
        )
    if count > 1 and config.parallel == "fsdp" and config.sample_every:
        raise ValueError(
            'sample_every: a network in shards (parallel="fsdp") draws no pictures while it '
            f"trains; got {config.sample_every}"
        )


def _load(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """load_state_dict, also into a sharded network."""
    own = model.state_dict()
    if not is_sharded(model) or own.keys() != tensors.keys():
        model.load_state_dict(tensors)  # says what is missing or unexpected
        return
    for name, tensor in own.items():
        put(tensor, tensors[name])


def _parts(batch: Batch, count: int) -> list[Batch]:
    """The micro-batches of a step."""
    if count == 1:
        return [batch]
    chunks = {name: value.chunk(count) for name, value in batch.items()}
    return [{name: values[i] for name, values in chunks.items()} for i in range(count)]
