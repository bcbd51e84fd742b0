"""torch.library registration: one schema, one fake and one kernel per op.

torch.library.define / impl / register_fake rather than custom_op, whose eager call costs 9 to 16 microseconds (2-core CPU)
against 2. The kernel serves every device key and picks the backend itself; the Autograd key holds a function that calls an
``autograd.Function`` with ``setup_context``, which is what opcheck and AOTAutograd accept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("rfkernels", "DEF")


def register(
    name: str,
    schema: str,
    *,
    kernel: Callable[..., object],
    fake: Callable[..., object],
    autograd: Callable[..., object],
) -> Callable[..., object]:
    """Define ``rfkernels::name`` and return the overload to call.

    Args:
        name: the op's name.
        schema: its arguments and results in torch's schema language, e.g. ``"(Tensor x) -> Tensor"``.
        kernel: runs on tensors of any device, no gradient recorded.
        fake: shapes and dtypes only.
        autograd: called where a gradient may be needed.
    """
    _library.define(name + schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"rfkernels::{name}", fake, lib=_library)
    return getattr(torch.ops.rfkernels, name).default


def below_autograd() -> torch._C._AutoDispatchBelowAutograd:
    """Context in which calls of registered ops skip the Autograd key."""
    return torch._C._AutoDispatchBelowAutograd()
