"""The concrete schemes of quantized attention and every constant that their kernels share.

A scheme says in which numbers the products Q K^T and P V are taken and over how many keys one softmax block runs. K is
always quantized in blocks of 64 keys. All backends read the numbers from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LOG2_E = math.log2(math.e)
KEY_BLOCK = 64  # keys that share a scale, and whose float32 sum enters the mean of K as one term
FLOOR = 40.0  # log2 units that a block's softmax reference may lie below the running maximum
KEY_SCALE_MIN = 2.0**-40  # the least scale of a V row relative to the channels' constants
MASKED = -1e30  # a float mask's value up to which a key counts as masked
TINY = 2.0**-100  # groups whose largest magnitude is below are stored as zeros
LARGEST_SCORE = 1e30  # heads whose scores or mask might pass it take the exact path
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Scheme:
    """One way to quantize attention.

    Attributes:
        name: what ``precision=`` calls it.
        qk: type of the Q and K codes: ``int8``, ``e4m3`` or ``bf16``.
        pv: type of P and V: ``u8`` (unsigned P, signed V), ``e4m3`` or ``bf16``.
        softmax_block: keys between two changes of the softmax reference.
    """

    name: str
    qk: str
    pv: str
    softmax_block: int
    key_block: int = KEY_BLOCK

    @property
    def rotated(self) -> bool:
        """True where K is smoothed and Q and K are rotated before they are quantized."""
        return self.qk != "bf16"

    @property
    def code_max(self) -> float:
        """The largest code of Q and K."""
        return 448.0 if self.qk == "e4m3" else 127.0

    @property
    def p_scale(self) -> float:
        """What a softmax weight of 1 is stored as."""
        return {"u8": 255.0, "e4m3": 448.0, "bf16": 1.0}[self.pv]

    @property
    def v_max(self) -> float:
        """The largest code of V."""
        return 448.0 if self.pv == "e4m3" else 127.0


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8_u8", "int8", "u8", 256),
        Scheme("int8_bf16", "int8", "bf16", 128),
        Scheme("int8_fp8", "int8", "e4m3", 128),
        Scheme("fp8", "e4m3", "e4m3", 128),
        Scheme("bf16", "bf16", "bf16", 128),
    )
}
PRECISIONS = ("int8", *SCHEMES)  # "int8" is an alias, see resolve

# Bit d % 32 of word d // 32 set: channel d changes its sign. The words are philox4x32-10 of the counters (0, 0, 0, 0) and
# (1, 0, 0, 0) under the key (0, 0): fixed for ever, since stored codes depend on them.
SIGN_WORDS = (
    0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8, 0xF8E4CCA4, 0x5CB200DB, 0xB1A574EB, 0x097EFF67,
)  # fmt: skip


def sign_vector(dim: int) -> tuple[float, ...]:
    """The +-1 that the first ``dim`` channels are multiplied by before the Hadamard transform."""
    return tuple(-1.0 if SIGN_WORDS[d // 32] >> (d % 32) & 1 else 1.0 for d in range(dim))


def padded_dim(dim: int) -> int:
    """The next power of two, the length of the Hadamard transform."""
    return 1 << (dim - 1).bit_length()


def resolve(
    precision: str, device_type: str, head_dim: int, capability: tuple[int, int] | None
) -> str:
    """The concrete scheme of a precision; only ``"int8"`` depends on the rest.

    On the CPU ``"int8"`` is ``int8_u8``. On CUDA it is ``int8_bf16`` up to a head size of 64, where the softmax is the
    limit and 16-bit P V costs no time, and on devices before 8.9, which have no fp8; else ``int8_fp8``.

    Raises:
        KeyError: an unknown precision.
    """
    if precision != "int8":
        return SCHEMES[precision].name
    if device_type != "cuda":
        return "int8_u8"
    if head_dim <= 64 or capability is None or capability < (8, 9):
        return "int8_bf16"
    return "int8_fp8"
