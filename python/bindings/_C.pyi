"""Native kernels of rfkernels; the public functions are in rfkernels.ops."""

from collections.abc import Sequence

from torch import Tensor, dtype

MAX_DIMS: int

_Scalar = float | Tensor
_Counter = int | Tensor

def euler_step(
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    dt: _Scalar,
    guidance: _Scalar | None,
    out: Tensor,
    cast: Tensor | None,
    /,
) -> None: ...
def taylor_step(
    x: Tensor, derivatives: tuple[Tensor, ...], dt: _Scalar, out: Tensor, cast: Tensor | None, /
) -> None: ...
def linear_step(
    x: Tensor,
    tensors: tuple[Tensor, ...],
    x_coefficient: _Scalar,
    coefficients: tuple[_Scalar, ...],
    noise: tuple[_Scalar, _Counter, _Counter] | None,
    out: Tensor,
    cast: Tensor | None,
    /,
) -> None: ...
def interpolate(
    x1: Tensor,
    x0: Tensor | None,
    t: _Scalar | None,
    path: int,
    custom: Sequence[_Scalar] | None,
    seed: _Counter | None,
    offset: _Counter | None,
    xt: Tensor,
    target: Tensor,
    x0_out: Tensor | None,
    /,
) -> None: ...
def flow_loss(
    prediction: Tensor,
    target: Tensor | None,
    x0: Tensor | None,
    x1: Tensor | None,
    seed: _Counter | None,
    offset: _Counter | None,
    weight: Tensor | None,
    kind: int,
    c: float,
    grad_scale: float,
    losses: Tensor,
    grad: Tensor | None,
    workspace: int,
    /,
) -> None: ...
def random(out: Tensor, seed: _Counter, offset: _Counter, distribution: int, /) -> None: ...
def projected_update(
    weights: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    averages: list[Tensor | None],
    projected: list[bool],
    totals: list[int],
    options: tuple[int, bool, _Scalar, float, float, float, float, float, float, float],
    phase: int,
    summary: int,
    workspace: int,
    /,
) -> None: ...
def projected_update_workspace(shapes: list[tuple[int, int, bool]], /) -> int: ...
def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    packed: int,
    keys: int,
    value_channels: int,
    key_heads: int,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    scheme: int,
    out: Tensor,
    lse: Tensor | None,
    /,
) -> list[int]: ...
def quantize_keys(k: Tensor, v: Tensor, valid: int, scheme: int, packed: int, /) -> None: ...
def quantize_queries(q: Tensor, scheme: int, codes: int, scale: int, finite: int, /) -> None: ...
def quantize_keys_cuda(
    k: Tensor,
    v: Tensor | None,
    valid: Tensor | None,
    scheme: int,
    codes: int,
    scale: int,
    mean: int,
    value_codes: int,
    value_scale: int,
    finite: int,
    workspace: int,
    /,
) -> None: ...
def quantize_workspace(batch_heads: int, keys: int, channels: int, value_channels: int, /) -> int: ...
def quantized_layout(
    scheme: int, keys: int, channels: int, value_channels: int, /
) -> tuple[int, dict[str, int]]: ...
def handover_key(
    q: object, k: object, v: object, attn_mask: object, is_causal: object, /
) -> int: ...
def attention_isa() -> str: ...
def fast_step(
    form: int,
    x: Tensor,
    tensors: tuple[Tensor, ...],
    coefficients: tuple[_Scalar, ...],
    x_coefficient: _Scalar,
    out: Tensor | None,
    cast: dtype | Tensor | None,
    /,
) -> Tensor | tuple[Tensor, Tensor] | None: ...
def fast_interpolate(
    x1: Tensor,
    x0: Tensor | None,
    t: _Scalar,
    path: int,
    seed: int | None,
    offset: int,
    xt: Tensor,
    target: Tensor,
    /,
) -> bool: ...
def flow_loss_workspace(samples: int, elements_per_sample: int, /) -> int: ...
def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int], /) -> tuple[int, int, int, int]: ...
def launch_counts() -> dict[tuple[str, str], int]: ...
def isa_detected() -> str: ...
def isa_used() -> str: ...
def cap_isa(level: str, /) -> None: ...
def max_threads() -> int: ...
def has_openmp() -> bool: ...
def has_cuda() -> bool: ...
def cuda_archs() -> str: ...
def use_exchange_api(enabled: bool, /) -> None: ...
def exchange_api_in_use() -> bool: ...
