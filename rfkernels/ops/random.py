"""Counter-based random numbers: a pure function of (seed, offset, element index), equal on every backend and device.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key = (low, high word of seed),
counter = (low, high word of index // 4, low, high word of offset) and lane = index % 4, index the logical row-major index
of the element. Uniforms are the leading bits of the lane's word; normals are Box-Muller of lane pairs (0, 1) and (2, 3):
z = sqrt(-2 ln u1) * (cos on the even, sin on the odd lane)(2 pi u2), u1 = ((w >> 8) + 1) 2^-24, u2 = (w >> 8) 2^-24, with
fixed float32 polynomials, so the bits do not depend on a maths library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from rfkernels import _dispatch, _registry
from rfkernels.backends.reference import random as reference
from rfkernels.ops import _checks
from rfkernels.ops._scalars import Counter, join, split_counter


def randn(
    *shape: int | Sequence[int],
    seed: Counter,
    offset: Counter = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Standard normals; the same numbers on every thread count, instruction set, backend and device.

    Args:
        shape: ints, or one sequence of ints.
        seed: an int in [0, 2^63), or an int64 tensor on the device, 0-d or (B,) with B = shape[0].
        offset: as seed. Where seed or offset is (B,), the element index restarts in every sample, so sample b draws what
            it would draw alone.
        device: default the device of a tensor seed or offset, else the CPU.
        dtype: default float32. Other dtypes round or widen the float32 number.

    Raises:
        TypeError, ValueError: a shape, seed, offset or dtype out of range.
    """
    return _draw("randn", "normal", shape, seed, offset, device, dtype)


def rand(
    *shape: int | Sequence[int],
    seed: Counter,
    offset: Counter = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Uniforms in [0, 1), counter-based like ``randn``.

    float32 and float64 take the leading 24 bits of the word, float16 11 and bfloat16 8: what they hold exactly, so 1 never
    occurs. Arguments as ``randn``.
    """
    return _draw("rand", "uniform", shape, seed, offset, device, dtype)


def derive_seed(seed: int, purpose: str) -> int:
    """A seed of its own for one purpose, so that no two uses of a run's seed share numbers.

    63 bits of BLAKE2b over the seed and the purpose's name: ``derive_seed(0, "time")`` differs from ``derive_seed(0,
    "noise")`` and from seed 0 itself.

    Args:
        seed: an int in [0, 2^63).
        purpose: a name, e.g. ``"time"``, ``"pairs"``.
    """
    seed = _checks.counter("derive_seed", "seed", seed, None)
    if isinstance(seed, torch.Tensor):
        raise TypeError("derive_seed: seed must be an int; got a tensor")
    if not isinstance(purpose, str):
        raise TypeError(f"derive_seed: purpose must be a string; got {type(purpose).__name__}")
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _draw(name, distribution, sizes, seed, offset, device, dtype) -> torch.Tensor:
    shape = _checks.shape(name, sizes)
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in _checks.FLOATS:
        raise TypeError(f"{name}: dtype must be float32, float64, bfloat16 or float16; got {dtype}")
    if device is None:
        device = next(
            (v.device for v in (seed, offset) if isinstance(v, torch.Tensor)), torch.device("cpu")
        )
    device = torch.device(device)
    seed, offset = (
        _checks.counter(name, "seed", seed, None),
        _checks.counter(name, "offset", offset, None),
    )
    for argument, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, torch.Tensor):
            if value.ndim > 1 or (value.ndim == 1 and (not shape or value.shape[0] != shape[0])):
                raise ValueError(
                    f"{name}: {argument} must be an int, 0-d or of the length of the first dimension; "
                    f"got shape {tuple(value.shape)} for {tuple(shape)}"
                )
            if value.device.type != device.type:
                raise ValueError(f"{name}: {argument} must be on {device}; got {value.device}")
    # jit.trace knows no op with a device argument; plain torch code it records.
    if _dispatch.transforms_active() or torch.jit.is_tracing():
        if distribution == "normal":
            return reference.normal(shape, seed, offset, device).to(dtype)
        return reference.uniform(shape, seed, offset, device, dtype)
    if _dispatch.direct_allowed(seed, offset):
        out = torch.empty(shape, dtype=dtype, device=device)
        if not out.is_meta:
            _dispatch.backend("random", out).random(out, seed, offset, distribution)
        return out
    return random_op(
        list(shape), *split_counter(seed), *split_counter(offset), distribution, dtype, device
    )


def _random_kernel(shape, seed, seed_tensor, offset, offset_tensor, distribution, dtype, device):
    out = torch.empty(shape, dtype=dtype, device=device)
    module = _dispatch.backend("random", out)
    module.random(out, join(seed, seed_tensor), join(offset, offset_tensor), distribution)
    return out


def _random_fake(shape, seed, seed_tensor, offset, offset_tensor, distribution, dtype, device):
    return torch.empty(shape, dtype=dtype, device=device)


def _random_autograd(*args):
    with _registry.below_autograd():
        return random_op(*args)


random_op = _registry.register(
    "random",
    "(SymInt[] shape, SymInt seed, Tensor? seed_tensor, SymInt offset, Tensor? offset_tensor, str distribution, "
    "ScalarType dtype, Device device) -> Tensor",
    kernel=_random_kernel,
    fake=_random_fake,
    autograd=_random_autograd,
)
