"""How far a result may lie from the float64 truth. Each bound is derived in one line; none is fitted to what was seen.

u is the unit roundoff: a correctly rounded operation errs by at most u times its result, rounding to a dtype by at most the
dtype's u times the value, or half its smallest subnormal.
"""

from __future__ import annotations

import math

import torch

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
UNIT = {F32: 2.0**-24, F64: 2.0**-53, BF16: 2.0**-8, F16: 2.0**-11}
LANES, BLOCK = 16, 4096  # flow_loss: partial sums of a block, elements of a block


def compute(dtype: torch.dtype) -> torch.dtype:
    """The type that arithmetic on ``dtype`` runs in."""
    return F64 if dtype == F64 else F32


def smallest(dtype: torch.dtype) -> float:
    """The smallest subnormal."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def combination(
    dtype: torch.dtype, truth: torch.Tensor, magnitude: torch.Tensor, terms: int
) -> torch.Tensor:
    """A sum of ``terms`` products stored in ``dtype``; magnitude = the sum of |coefficient| |tensor|.

    Rounding each coefficient, product and sum: (terms + 2) u magnitude (Higham, Accuracy and Stability, (3.4)); the store
    adds u of the dtype times the value. A millionth on top for the products of errors.
    """
    arithmetic = (terms + 2) * UNIT[compute(dtype)] * magnitude
    store = 0.0 if dtype == compute(dtype) else UNIT[dtype] * (truth.abs() + arithmetic)
    return (arithmetic + store) * (1 + 1e-6) + smallest(dtype)


def loss_sum(dtype: torch.dtype, elements: int) -> float:
    """Relative to the sum of magnitudes of one sample: 16 lanes of at most 256 additions, in double between blocks.

    (additions of a lane + 8 for residual, square, root, division and weight) u.
    """
    additions = math.ceil(min(elements, BLOCK) / LANES)
    return (additions + 8) * UNIT[compute(dtype)]


def within(
    actual: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor | float, what: object = ""
) -> None:
    """|actual - truth| <= bound, element by element."""
    actual, truth = actual.detach().cpu().double(), truth.detach().cpu().double()
    error = (actual - truth).abs()
    bound = torch.as_tensor(bound, dtype=F64).cpu().expand_as(error)
    if not (error <= bound).all():
        worst = int((error - bound).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{what}: {actual.flatten()[worst].item()!r} is {error.flatten()[worst].item():.3g} from "
            f"{truth.flatten()[worst].item()!r}; allowed {bound.flatten()[worst].item():.3g}"
        )
