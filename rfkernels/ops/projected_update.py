"""One step of AdamP or SGDP on many parameters in place, with the projection decided on the device.

AdamP and SGDP (Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights", ICLR 2021;
clovaai/AdamP) take from the update of a scale-invariant weight the part along the weight, which momentum turns into growth
of its norm. ``rfkernels.optim`` has them as optimizers; this is the kernel behind both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from rfkernels import _dispatch, _registry
from rfkernels.backends.reference.precision import compute_dtype
from rfkernels.ops import _checks

RULES = ("adamp", "sgdp")
SUMMARY = 5  # RFK_UPDATE_SUMMARY: greatest |cos|, sums of g w, g^2, w^2, u w

Tensors = Sequence[torch.Tensor]


class Options(NamedTuple):
    """What all parameters of a call share; for SGDP beta1 is the momentum and beta2 the dampening."""

    rule: str
    nesterov: bool
    lr: float | torch.Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    delta: float
    wd_ratio: float
    average_decay: float


def projected_update(
    weights: Tensors,
    grads: Tensors,
    first: Tensors,
    second: Tensors = (),
    steps: Tensors = (),
    *,
    rule: str = "adamp",
    lr: float | torch.Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.0,
    dampening: float = 0.0,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    averages: Sequence[torch.Tensor | None] = (),
    average_decay: float = 0.0,
    projected: Sequence[bool] | None = None,
    totals: Sequence[int] | None = None,
    reduce: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Update weights, moments, steps and averages in place; nothing is returned and no gradient is recorded.

    In C (float64 for a float64 weight, else float32), per parameter with weight w, gradient g, t = step + 1:

    * ``adamp``: m = beta1 m + (1 - beta1) g; v = beta2 v + ((1 - beta2) g) g; top = m, or beta1 m + (1 - beta1) g with
      ``nesterov``; u = top / (sqrt(v) r + eps) with r = 1 / sqrt(1 - beta2^t); s = lr / (1 - beta1^t).
    * ``sgdp``: m = momentum m + (1 - dampening) g; u = m, or g + momentum m with ``nesterov``; s = lr. The first step has
      the factor (1 - dampening) too, unlike torch.optim.SGD.

    Projection: with w and g as (rows, columns), rows = shape[0], and cos = (g . w) / (max(|g|, eps) max(|w|, eps)),

    * *channel*, if every row has |cos| < delta / sqrt(columns): u = u - f w row by row, f = (u . w) / (|w| + eps)^2;
    * else *layer*, if the whole tensor as one row has |cos| < delta / sqrt(elements): the same with one f;
    * else u stays. A NaN in a test fails it. The test looks at g and the old w, not at u.

    With ``sgdp`` without ``nesterov`` the projected update also becomes the momentum buffer: in the authors' code the update
    *is* the buffer and is projected in place, so the next step goes on from what the projection left.

    Then w = w k - s u with k = 1 - lr weight_decay (times ``wd_ratio`` where projected; for sgdp divided by 1 - momentum),
    rounded once to the weight's dtype, and average = average + (1 - average_decay) (w - average) with w as stored. Sums are
    in C within 4096 columns and in float64 beyond; m, v and the rest are elementwise and follow this order of operations.

    Args:
        weights: float32, float64, bfloat16 or float16 tensors of one device, any shapes, any strides without overlap. What
            is not dense with its first dimension outermost, in the same order for all tensors of the parameter, is copied
            and copied back.
        grads: of the shape and dtype of their weights.
        first: exp_avg (adamp) or the momentum buffer (sgdp), in C; zeros at the start.
        second: exp_avg_sq in C, adamp only.
        steps: 0-d float32 tensors on the device, the number of steps done; adamp only. The call adds 1.
        rule: ``adamp`` or ``sgdp``.
        lr: learning rate >= 0; a 0-d tensor on the device is read there, without a synchronisation.
        betas: adamp's, each in [0, 1).
        momentum, dampening: sgdp's.
        eps: > 0, in the denominator and in the norms.
        weight_decay: >= 0, decoupled.
        delta, wd_ratio: the threshold of the test and the factor on the decay of projected parameters.
        nesterov: look one step of momentum ahead.
        averages: moving averages of the weights in any floating dtype, or None; updated in the same pass.
        average_decay: in [0, 1].
        projected: which parameters may be projected; default: those of two and more dimensions.
        totals: elements of the whole parameters of which the weights are shards of rows.
        reduce: for shards: called with the (parameters, 5) float64 summary, whose first column (greatest |cos| of a row,
            infinity for NaN) it has to replace by the maximum over the shards and whose others (sums of g w, g^2, w^2, u w)
            by their sums.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range.
    """
    options = _options(
        rule, lr, betas, momentum, dampening, eps, weight_decay, delta, wd_ratio, nesterov, average_decay
    )  # fmt: skip
    if rule == "sgdp" and (second or steps):
        raise ValueError("projected_update: second and steps must be empty for sgdp; got some")
    if projected is not None and len(projected) != len(weights):
        raise ValueError(
            f"projected_update: projected must have {len(weights)} entries; got {len(projected)}"
        )
    if not weights:
        return
    if reduce is None and _run_unchecked(
        weights, grads, first, second, steps, averages, projected, totals, options
    ):
        return
    _check_lists(rule, weights, grads, first, second, steps, averages)
    if projected is None:
        projected = [w.ndim > 1 for w in weights]
    totals = [0] * len(weights) if totals is None else list(totals)
    with torch.no_grad():
        if reduce is None and not (_dispatch.plain(*weights, *grads) and _functional_level()):
            tensor = options.lr if isinstance(lr, torch.Tensor) else None
            number = 0.0 if tensor is not None else float(lr)
            projected_update_op(
                list(weights), list(grads), list(first), list(second), list(steps),
                [a for a in averages if a is not None], [a is not None for a in averages],
                list(projected), number, tensor, *options[:2], *options[3:],
            )  # fmt: skip
            return
        _run(weights, grads, first, second, steps, averages, projected, totals, options, reduce)
        _dispatch.mark_written(*weights, *averages)


_PLAIN = {torch.Tensor, torch.nn.Parameter}


def _run_unchecked(
    weights, grads, first, second, steps, averages, projected, totals, options
) -> bool:
    """True when the usual case is done: plain tensors in the kernels' own layout, which the extension itself checks.

    The checks in Python take longer than the step of a small parameter.
    """
    lists = (weights, grads, first, second, steps)
    every = [t for tensors in lists for t in tensors] + [a for a in averages if a is not None]
    if not set(map(type, every)) <= _PLAIN or not _dispatch.plain(*every):
        return False
    if _dispatch.transforms_active():
        return False
    module = _dispatch.backend("projected_update", weights[0])
    if not getattr(module, "CHECKS_TENSORS", False):
        return False
    try:
        module.projected_update(
            *map(list, lists), list(averages),
            [w.ndim > 1 for w in weights] if projected is None else list(projected),
            [0] * len(weights) if totals is None else list(totals), options, None,
        )  # fmt: skip
    except (TypeError, ValueError):
        return False  # nothing was written; what follows copies, or says what is wrong
    written = [w for w in weights if not w.is_inference()]
    torch._C._increment_version(written + [a for a in averages if a is not None])
    return True


def check_options(
    rule: str,
    *,
    lr: float | torch.Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.0,
    dampening: float = 0.0,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    average_decay: float = 0.0,
) -> None:
    """Raises what ``projected_update`` would raise for these options."""
    _options(
        rule, lr, betas, momentum, dampening, eps, weight_decay, delta, wd_ratio, nesterov, average_decay
    )  # fmt: skip


def _functional_level() -> bool:
    if _dispatch.transforms_active():
        raise TypeError("projected_update: works in place; got a call under vmap or torch.func")
    return True


def _options(
    rule, lr, betas, momentum, dampening, eps, weight_decay, delta, wd_ratio, nesterov, average_decay
) -> Options:  # fmt: skip
    name = "projected_update"
    if rule not in RULES:
        raise ValueError(f"{name}: rule must be one of {', '.join(RULES)}; got {rule!r}")
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(
                f"{name}: lr must be a number or one in a floating point tensor; got {_checks.describe(lr)}"
            )
        lr = lr.reshape(())
    else:
        lr = _number("lr", lr, 0.0, math.inf)
    if rule == "adamp":
        one = math.nextafter(1.0, 0.0)
        beta1, beta2 = (
            _number(f"betas[{k}]", b, 0.0, one, "in [0, 1)") for k, b in enumerate(betas)
        )
    else:
        beta1 = _number("momentum", momentum, 0.0, math.inf)
        beta2 = _number("dampening", dampening, -math.inf, math.inf)
        if beta1 == 1.0 and weight_decay:
            raise ValueError(f"{name}: momentum must not be 1 with weight decay; got {momentum!r}")
    return Options(
        rule,
        bool(nesterov),
        lr,
        beta1,
        beta2,
        _number("eps", eps, math.ulp(0.0), math.inf, "positive"),
        _number("weight_decay", weight_decay, 0.0, math.inf),
        _number("delta", delta, 0.0, math.inf),
        _number("wd_ratio", wd_ratio, 0.0, math.inf),
        _number("average_decay", average_decay, 0.0, 1.0, "in [0, 1]"),
    )


def _number(name: str, value: object, low: float, high: float, rule: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"projected_update: {name} must be a number; got {value!r}")
    if not low <= value <= high:
        rule = rule or ("finite" if low == -math.inf else f"at least {low:g}")
        raise ValueError(f"projected_update: {name} must be {rule}; got {value!r}")
    return float(value)


def _check_lists(rule, weights, grads, first, second, steps, averages) -> None:
    name, count = "projected_update", len(weights)
    wanted = {"grads": grads, "first": first}
    if rule == "adamp":
        wanted |= {"second": second, "steps": steps}
    if averages:
        wanted["averages"] = averages
    for argument, tensors in wanted.items():
        if len(tensors) != count:
            raise ValueError(
                f"{name}: {argument} must have {count} entries, one per weight; got {len(tensors)}"
            )
    device = weights[0].device if count else None
    for k, w in enumerate(weights):
        _checks.tensor(name, f"weights[{k}]", w)
        compute = compute_dtype(w)
        if w.device != device:
            raise ValueError(
                f"{name}: weights[{k}] must be on the device of the first, {device}; got {w.device}"
            )
        for argument, tensors in wanted.items():
            value = tensors[k]
            if argument == "steps":
                if value.shape != () or value.dtype != torch.float32 or value.device != device:
                    raise ValueError(
                        f"{name}: steps[{k}] must be a 0-d float32 tensor on {device}; got {_checks.describe(value)}"
                    )
                continue
            if argument == "averages" and value is None:
                continue
            _checks.tensor(name, f"{argument}[{k}]", value)
            dtype = {"grads": w.dtype, "averages": value.dtype}.get(argument, compute)
            if value.shape != w.shape or value.dtype != dtype or value.device != device:
                raise ValueError(
                    f"{name}: {argument}[{k}] must be a {dtype} tensor of shape {tuple(w.shape)} on {device}; "
                    f"got {_checks.describe(value)}"
                )


def _rows_are_dense(t: torch.Tensor) -> bool:
    """No gaps, the first dimension outermost, the others in any order."""
    if t.is_contiguous() or t.numel() == 0:
        return True
    rows = t.shape[0]
    if rows > 1 and t.stride(0) != t.numel() // rows:
        return False
    expected = 1
    for size, stride in sorted(
        ((n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1), key=lambda x: x[1]
    ):
        if stride != expected:
            return False
        expected *= size
    return expected == t.numel()


def _same_order(w: torch.Tensor, others: list[torch.Tensor]) -> bool:
    if w.is_contiguous():
        return all(t.is_contiguous() for t in others)
    strides = [s for n, s in zip(w.shape, w.stride(), strict=True) if n > 1]
    return _rows_are_dense(w) and all(
        [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1] == strides for t in others
    )


def _run(weights, grads, first, second, steps, averages, projected, totals, options, reduce):
    """The backend on tensors in the layout that it takes; the others travel through copies."""
    lists = [list(t) for t in (weights, grads, first, second, averages)]
    back: list[tuple[torch.Tensor, torch.Tensor]] = []
    for k in range(len(weights)):
        present = [tensors for tensors in lists if tensors and tensors[k] is not None]
        if _same_order(weights[k], [tensors[k] for tensors in present[1:]]):
            continue
        for tensors in present:
            original = tensors[k]
            tensors[k] = original.clone(memory_format=torch.contiguous_format)
            if tensors is not lists[1]:
                back.append((original, tensors[k]))
    weights, grads, first, second, averages = lists
    module = _dispatch.backend("projected_update", weights[0])
    module.projected_update(
        weights, grads, first, second, list(steps), averages, list(projected), totals, options, reduce
    )  # fmt: skip
    for original, copy in back:
        original.copy_(copy)


def _kernel(
    weights, grads, first, second, steps, averages, averaged, projected, lr, lr_tensor, rule, nesterov, *numbers
):  # fmt: skip
    options = Options(rule, nesterov, lr if lr_tensor is None else lr_tensor, *numbers)
    rest = iter(averages)
    averages = [next(rest) if there else None for there in averaged]
    totals = [0] * len(weights)
    _run(weights, grads, first, second, steps, averages, projected, totals, options, None)


def _below(*args) -> None:
    with _registry.below_autograd():
        projected_update_op(*args)


projected_update_op = _registry.register(
    "projected_update",
    "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] steps, "
    "Tensor(e!)[] averages, bool[] averaged, bool[] projected, float lr, Tensor? lr_tensor, str rule, bool nesterov, "
    "float beta1, float beta2, float eps, float weight_decay, float delta, float wd_ratio, float average_decay) -> ()",
    kernel=_kernel,
    fake=lambda *args: None,
    autograd=_below,
)
