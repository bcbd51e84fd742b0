"""What AdamP and SGDP share: state, groups, shards, and one call of the kernel per group and device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from rfkernels.backends.reference.precision import compute_dtype
from rfkernels.ops.projected_update import check_options, projected_update
from rfkernels.optim.shards import is_dtensor, local_part

__all__ = ["Projected"]

_OPTIONS = (
    *("lr", "betas", "momentum", "dampening", "eps", "weight_decay", "delta", "wd_ratio"),
    "nesterov",
)


class Projected(torch.optim.Optimizer):
    """Base of the optimizers on ``rfkernels.ops.projected_update``; a subclass names its rule and its moments."""

    _rule: str
    _moments: tuple[str, ...]

    def __init__(
        self, params: Iterable, defaults: dict[str, Any], ema: Sequence[torch.Tensor] | None
    ) -> None:
        self._ema: dict[torch.Tensor, torch.Tensor] = {}
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_options(self._rule, **self._options(group))
        if ema is None:
            return
        parameters = [p for group in self.param_groups for p in group["params"]]
        averages = list(ema)
        if len(averages) != len(parameters):
            raise ValueError(
                f"{type(self).__name__}: ema must have one tensor per parameter, {len(parameters)}; got {len(averages)}"
            )
        for k, (p, average) in enumerate(zip(parameters, averages, strict=True)):
            if average.shape != p.shape or average.device != p.device or average is p:
                raise ValueError(
                    f"{type(self).__name__}: ema[{k}] must be a tensor of its own of shape {tuple(p.shape)} on {p.device}; "
                    f"got shape {tuple(average.shape)} on {average.device}"
                )
        self._ema = dict(zip(parameters, averages, strict=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_ema", {})
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ema": self._ema}

    def _options(self, group: dict[str, Any]) -> dict[str, Any]:
        options = {name: group[name] for name in _OPTIONS if name in group}
        return options | {"average_decay": group["ema_decay"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` of this class, or of the package ``adamp``, gave.

        Moments keep their precision, where the base class would round them to the parameter's dtype.
        """
        super().load_state_dict(state_dict)
        saved = [k for group in state_dict["param_groups"] for k in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved, parameters, strict=True):
            state = self.state.get(p)
            if not state:
                continue
            for name in self._moments:
                if state[name].dtype != compute_dtype(p):
                    original = state_dict["state"][key][name]
                    state[name] = original.to(device=p.device, dtype=compute_dtype(p), copy=True)
            if "step" in state:
                state["step"] = torch.as_tensor(
                    state["step"], dtype=torch.float32, device=p.device
                ).clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step on every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        calls: dict[tuple, _Call] = {}
        still: list[tuple[torch.Tensor, torch.Tensor]] = []
        for p in group["params"]:
            average = self._ema.get(p) if self._ema else None
            grad, dims = p.grad, p.ndim
            if grad is None:
                if average is not None:
                    still.append((average, p))
                continue
            if grad.layout is not torch.strided:
                raise TypeError(
                    f"{type(self).__name__}: gradients must be dense; got one of layout {grad.layout}"
                )
            state = self.state[p] or self._new_state(p)
            shard, total, moments = None, 0, [state[name] for name in self._moments]
            tensors = [p, grad, average, *moments]
            if type(p) is not torch.nn.Parameter and is_dtensor(p):
                # Elements of vectors do not depend on each other: nothing is asked of other shards.
                shard = _shard_group(type(self).__name__, p) if dims > 1 else None
                total = p.numel()
                tensors = [local_part(t) for t in tensors]
            key = (p.device, shard)
            if key not in calls:
                calls[key] = _Call()
            calls[key].add(*tensors, step=state.get("step"), projected=dims > 1, total=total)
        options = self._options(group)
        for (device, shard), call in calls.items():
            projected_update(
                call.weights, call.grads, call.first, call.second, call.steps, rule=self._rule,
                **options | {"lr": _on_device(options["lr"], device)},
                averages=call.averages if any(a is not None for a in call.averages) else (),
                projected=call.projected,
                totals=call.totals, reduce=None if shard is None else _reduction(shard),
            )  # fmt: skip
        for average, p in still:
            average.lerp_(p.to(average.dtype), 1.0 - group["ema_decay"])

    def _new_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[p]
        if self._rule == "adamp":
            # On the device, so that a captured step counts.
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in self._moments:
            state[name] = torch.zeros_like(
                p, dtype=compute_dtype(p), memory_format=torch.preserve_format
            )
        return state


class _Call:
    """The lists of one call of the kernel."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.grads: list[torch.Tensor] = []
        self.first: list[torch.Tensor] = []
        self.second: list[torch.Tensor] = []
        self.steps: list[torch.Tensor] = []
        self.averages: list[torch.Tensor | None] = []
        self.projected: list[bool] = []
        self.totals: list[int] = []

    def add(self, weight, grad, average, first, second=None, *, step, projected, total) -> None:
        self.weights.append(weight)
        self.grads.append(grad)
        self.averages.append(average)
        self.first.append(first)
        if second is not None:
            self.second.append(second)
        if step is not None:
            self.steps.append(step)
        self.projected.append(projected)
        self.totals.append(total)


def _on_device(lr: float | torch.Tensor, device: torch.device) -> float | torch.Tensor:
    """A learning rate that the kernel on that device can read; a tensor of the CPU is a number to CUDA."""
    if not isinstance(lr, torch.Tensor) or lr.device == device:
        return lr
    return float(lr) if lr.is_cpu else lr.to(device)


def _shard_group(name: str, p: torch.Tensor):
    """The process group over which the rows of a DTensor are split; None where they are not.

    Raises:
        ValueError: split in another way, or the gradient in another way than the parameter.
    """
    if not is_dtensor(p.grad) or p.grad.placements != p.placements:
        got = p.grad.placements if is_dtensor(p.grad) else "an ordinary tensor"
        raise ValueError(
            f"{name}: a gradient must have the placements of its parameter, {p.placements}; got {got}"
        )
    split = [d for d, placement in enumerate(p.placements) if not placement.is_replicate()]
    if not split:
        return None
    if len(split) > 1 or not p.placements[split[0]].is_shard(0):
        raise ValueError(
            f"{name}: a sharded parameter must be split along dimension 0 over one mesh dimension; got {p.placements}"
        )
    return p.device_mesh.get_group(split[0])


def _reduction(group) -> Callable[[torch.Tensor], None]:
    """The summary over all shards: one gathering, then maximum and sums in the order of the ranks, the same on each."""

    def reduce(summary: torch.Tensor) -> None:
        world = torch.distributed.get_world_size(group)
        every = summary.new_empty(world * summary.shape[0], summary.shape[1])
        torch.distributed.all_gather_into_tensor(every, summary, group=group)
        every = every.unflatten(0, (world, -1))
        summary[:, 0] = every[:, :, 0].amax(0)
        summary[:, 1:] = every[:, :, 1:].sum(0)

    return reduce
