"""What attention hands over to PyTorch, and what it counts."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from cells import same_bits
from tensors import normal
from tolerances import BF16, F16, F32, F64

import rfkernels as rf
from rfkernels._dispatch import unavailable_reason
from rfkernels.ops import _attention_early as early
from rfkernels.ops import _attention_handover as rule
from rfkernels.ops import _attention_route as route

sdpa = torch.nn.functional.scaled_dot_product_attention
NATIVE = unavailable_reason("native", "cpu", "attention")
needs_native = pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))


@pytest.fixture(autouse=True)
def fresh_counters(request):
    """Counters at zero; no region of small calls or slow machines unless a test asks for the rule as it is."""
    if "measured_rule" not in request.fixturenames:
        request.getfixturevalue("no_small_handover")
    rf.attention_stats(reset=True)
    yield
    rf.attention_stats(reset=True)


@pytest.fixture
def measured_rule():
    """The rule as users have it."""


def qkv(dtype=F32, dim=16, channels=None, length=20):
    return tuple(
        normal(2, 3, length, n, dtype=dtype, key=i)
        for i, n in enumerate((dim, dim, channels or dim))
    )


# The rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "precision", "reason"),
    [
        ({"dtype": F64}, "int8", rule.FLOAT64),
        ({"dtype": F64}, "bf16", rule.FLOAT64),
        ({"dtype": F16}, "bf16", rule.FLOAT16),
        ({"dim": 257}, "int8", rule.HEAD_SIZE),
        ({"channels": 300}, "int8_bf16", rule.HEAD_SIZE),
    ],
)
def test_calls_by_rule_are_pytorchs_and_counted(options, precision, reason):
    q, k, v = qkv(**options)
    mask = torch.where(normal(20, 20) < 1, 0.0, -1e30)
    mask[4] = -1e30
    out, lse = rf.attention(q, k, v, attn_mask=mask, precision=precision, return_lse=True)
    truth = sdpa(q, k, v, attn_mask=mask.masked_fill(mask == -1e30, -torch.inf).to(q.dtype))
    same_bits(out, truth)
    assert lse.dtype == F32
    assert (lse[:, :, 4] == -torch.inf).all()
    scores = (q.double() @ k.double().mT) * q.shape[3] ** -0.5 + mask.double()
    torch.testing.assert_close(lse[:, :, 5], scores.logsumexp(-1)[:, :, 5].float())
    same_bits(rf.attention(q, k, v, precision=precision), sdpa(q, k, v))
    stats = rf.attention_stats()
    assert stats.handovers == {(precision, reason): 2}
    assert not stats.calls
    assert reason in repr(stats)
    assert reason[0].islower()


def test_float16_runs_in_the_int8_schemes():
    q, k, v = qkv(F16)
    assert rule.handover_reason(20, 20, 16, 16, "none", F16, "cpu", 1, "int8_u8") is None
    with rf.use_backend("reference"):
        assert rf.attention(q, k, v).dtype == F16
        assert rf.attention(q, k, v, precision="bf16").dtype == F16  # forced: the rule is off
    assert rf.attention_stats().calls == {
        ("int8", "int8_u8", "reference"): 1, ("bf16", "bf16", "reference"): 1,
    }  # fmt: skip


def test_a_forced_backend_is_never_left():
    for options in ({"dtype": F64}, {"dim": 257}):
        q, k, v = qkv(**options)
        with (
            rf.use_backend("reference"),
            pytest.raises(
                rf.BackendUnavailableError,
                match=r"^attention: backend 'reference' cannot serve this call: .*leave use_backend",
            ),
        ):
            rf.attention(q, k, v)
    assert not rf.attention_stats().handovers


def small(scores: int = 16, **options) -> dict:
    row = {
        "device": "cpu", "scheme": "int8_u8", "dtype": F32, "mask": None, "threads": (1, 64), "head_dim": (1, 256),
        "queries": 0, "scores": scores, "reason": "few scores run faster in PyTorch", **options,
    }  # fmt: skip
    return {(row["device"], row["scheme"]): (rule.Small(**row),)}


@needs_native
def test_rows_of_measured_regions(everything_small):
    for table, wanted in (
        (small(400), True),
        (small(399), False),
        (small(400, mask="none"), True),
        (small(400, mask="bool"), False),
        (small(400, dtype=BF16), False),
        (small(400, threads=(65, 99)), False),
        (small(400, head_dim=(17, 64)), False),
        (small(400, scheme="bf16"), False),
        (small(0, queries=20), True),
        (small(0, queries=19), False),
    ):
        rule.SMALL.clear()
        rule.SMALL.update(table)
        early.forget()
        rf.attention_stats(reset=True)
        q, k, v = qkv()
        out = rf.attention(q, k, v)
        stats = rf.attention_stats()
        assert bool(stats.handovers) == wanted, table
        assert bool(stats.calls) != wanted
        if wanted:
            same_bits(out, sdpa(q, k, v))


@pytest.fixture
def everything_small():
    before = dict(rule.SMALL)
    rule.SMALL.clear()
    rule.SMALL.update(small(10**9))
    early.forget()
    yield
    rule.SMALL.clear()
    rule.SMALL.update(before)
    early.forget()


@needs_native
def test_early_hand_over_changes_nothing(everything_small):
    q, k, v = qkv()
    count = lambda: sum(rf.attention_stats().handovers.values())  # noqa: E731
    same_bits(rf.attention(q, k, v), sdpa(q, k, v))
    same_bits(
        rf.attention(q, k, v, is_causal=True, scale=0.3), sdpa(q, k, v, is_causal=True, scale=0.3)
    )
    assert count() == 2
    out, lse = rf.attention(q, k, v, return_lse=True)
    same_bits(out, sdpa(q, k, v))
    assert lse.shape == (2, 3, 20)
    seconds = [t.transpose(1, 2) for t in (q, k, v)]
    same_bits(rf.attention(*seconds, layout="bshd"), sdpa(q, k, v).transpose(1, 2))
    same_bits(
        rf.attention(q, k[:, :1], v[:, :1], enable_gqa=True),
        sdpa(q, k[:, :1], v[:, :1], enable_gqa=True),
    )
    assert count() == 5
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    rf.attention(*leaves).sum().backward()
    others = [t.clone().requires_grad_() for t in (q, k, v)]
    sdpa(*others).sum().backward()
    for a, b in zip(leaves, others, strict=True):
        same_bits(a.grad, b.grad)
    assert count() == 6
    # Refusals are the same as without it.
    for args, options, kind in (
        ((q, k, v.half()), {}, TypeError), ((q, k[:1], v[:1]), {}, ValueError), ((q, k, None), {}, TypeError),
        ((q, k[:, :1], v[:, :1]), {}, ValueError), ((q, k, v), {"scale": "1"}, TypeError),
        ((q, k, v), {"is_causal": 1}, TypeError), ((q, k, v), {"precision": "int4"}, ValueError),
        ((q[0], k[0], v[0]), {}, ValueError), ((q.long(), k.long(), v.long()), {}, TypeError),
        ((q, k, v), {"precision": ["int8"]}, ValueError), ((q, k, v), {"scale": torch.inf}, ValueError),
        ((q[..., :0], k[..., :0], v[..., :0]), {}, ValueError),
        ((q, k, v), {"attn_mask": torch.ones(20, 19) > 0}, ValueError),
        ((q, k, v), {"attn_mask": torch.ones(20, 20).long()}, TypeError),
        ((q, k, v), {"attn_mask": torch.ones(20) > 0}, ValueError), ((q, k, v), {"attn_mask": True}, TypeError),
    ):  # fmt: skip
        with pytest.raises(kind, match=r"^attention: "):
            rf.attention(*args, **options)
    assert count() == 6
    with rf.use_backend("native"):
        rf.attention(q, k, v)
    assert rf.attention_stats().calls == {("int8", "int8_u8", "native"): 1}
    _, tangent = torch.func.jvp(lambda q: rf.attention(q, k, v), (q,), (q,))
    assert tangent.isfinite().all()


@pytest.fixture
def early_calls(monkeypatch):
    """What the early path answered, call by call: True where it handed over."""
    answers = []

    def spy(*args):
        found = early.early_handover(*args)
        answers.append(found is not None)
        return found

    monkeypatch.setattr(sys.modules["rfkernels.ops.attention"], "early_handover", spy)
    return answers


@needs_native
@pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="torch before 2.10 has no early path",
)
def test_the_early_path_takes_plain_calls_and_leaves_the_others(everything_small, early_calls):
    q, k, v = qkv()
    masks = [
        normal(*shape, key=4) < 0.5
        for shape in ((20, 20), (2, 1, 1, 20), (3, 1, 20), (1, 3, 20, 20))
    ]
    plain = [
        {},
        {"is_causal": True},
        {"scale": 0.1},
        {"precision": "bf16"},
        *({"attn_mask": m} for m in masks),
    ]
    rule.SMALL.update(small(10**9, scheme="bf16"))
    for _ in range(2):  # decided, then remembered
        for options in plain:
            torch_options = {n: o for n, o in options.items() if n != "precision"}
            same_bits(rf.attention(q, k, v, **options), sdpa(q, k, v, **torch_options))
    assert early_calls == [True] * 2 * len(plain)
    assert sum(rf.attention_stats(reset=True).handovers.values()) == 2 * len(plain)

    early_calls.clear()
    for options in (
        {"attn_mask": masks[0], "is_causal": True}, {"attn_mask": normal(20, 20)}, {"scale": 1},
    ):  # fmt: skip
        rf.attention(q, k, v, **options)
    rf.attention(q, k, torch.nn.Parameter(v))
    rf.attention(q.double(), k.double(), v.double())
    with torch.overrides.BaseTorchFunctionMode():
        rf.attention(q, k, v)
    with rf.use_backend("reference"):
        rf.attention(q, k, v)
    torch.vmap(lambda q: rf.attention(q, k, v))(q[None])
    assert early_calls == [False] * 8
    assert sum(rf.attention_stats().handovers.values()) == 7


@needs_native
def test_decisions_are_bounded_and_follow_the_threads(everything_small, threads):
    for length in range(1, early._MOST + 20):
        rf.attention(*(torch.zeros(1, 1, length, 1),) * 3)
    assert 0 < len(early._decisions) <= early._MOST
    rule.SMALL.clear()
    rule.SMALL.update(small(10**9, threads=(2, 2)))
    early.forget()
    q, k, v = qkv()
    for count, wanted in ((1, 0), (2, 1), (1, 1), (2, 2)):
        threads(count)
        rf.attention_stats(reset=wanted == 0)
        rf.attention(q, k, v)
        assert sum(rf.attention_stats().handovers.values()) == wanted


def test_what_no_kernel_serves_goes_to_pytorch_but_a_scheme_without_any_kernel_is_refused(
    monkeypatch,
):
    monkeypatch.setattr(route, "_found", {})
    monkeypatch.setattr(
        route._dispatch, "unavailable_reason", lambda *args: "there is none in this test"
    )
    q, k, v = qkv()
    same_bits(rf.attention(q, k, v), sdpa(q, k, v))
    ((precision, reason),) = rf.attention_stats().handovers
    assert (precision, reason) == (
        "int8",
        "no kernel can run here (native: there is none in this test)",
    )
    for scheme in ("fp8", "int8_fp8"):
        with pytest.raises(
            rf.BackendUnavailableError, match=f"precision '{scheme}' has no kernel for cpu"
        ):
            rf.attention(q, k, v, precision=scheme)
    with pytest.raises(rf.BackendUnavailableError, match="quantize: no kernel can run here"):
        rf.quantize(k, v)
    with (
        rf.use_backend("native"),
        pytest.raises(
            rf.BackendUnavailableError, match="attention: backend 'native' cannot run int8_u8"
        ),
    ):
        rf.attention(q, k, v)


@needs_native
def test_the_alias_resolves_and_the_float64_reference_is_never_automatic():
    q, k, v = qkv()
    rf.attention(q, k, v)
    for scheme in ("int8_u8", "int8_bf16", "bf16"):
        rf.attention(q, k, v, precision=scheme)
    assert rf.attention_stats().calls == {
        ("int8", "int8_u8", "native"): 1, ("int8_u8", "int8_u8", "native"): 1,
        ("int8_bf16", "int8_bf16", "native"): 1, ("bf16", "bf16", "native"): 1,
    }  # fmt: skip
    with rf.use_backend("native"), pytest.raises(rf.BackendUnavailableError, match="not fp8"):
        rf.attention(q, k, v, precision="fp8")


def test_the_alias_on_cuda():
    from rfkernels.backends.attention_schemes import resolve

    assert resolve("int8", "cuda", 64, (9, 0)) == "int8_bf16"
    assert resolve("int8", "cuda", 65, (9, 0)) == "int8_fp8"
    assert resolve("int8", "cuda", 128, (8, 9)) == "int8_fp8"
    assert resolve("int8", "cuda", 128, (8, 6)) == "int8_bf16"
    assert resolve("int8", "cpu", 128, None) == "int8_u8"
    assert resolve("fp8", "cuda", 64, (9, 0)) == "fp8"


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_measured_rule_hands_over_few_queries_and_keeps_many(dtype, measured_rule, monkeypatch):
    monkeypatch.setattr(rule, "_slow_level", lambda scheme: None)

    def reason(queries, keys, dim=64):
        return rule.handover_reason(queries, keys, dim, dim, "none", dtype, "cpu", 2, "int8_u8")

    assert reason(1, 4096) == reason(16, 16) == rule.FEW
    assert reason(1024, 1024) is None
    assert reason(4096, 77, 128) is None


@pytest.mark.parametrize(
    ("level", "scheme", "wanted"),
    [
        ("baseline", "int8_u8", rule.PORTABLE), ("avx2", "int8_u8", None), ("avx512", "bf16", rule.NO_TILES),
        ("avx2", "int8_bf16", rule.NO_TILES), ("amx", "bf16", None), (None, "int8_u8", None),
    ],
)  # fmt: skip
def test_levels_that_are_slower_than_pytorch(level, scheme, wanted, measured_rule, monkeypatch):
    monkeypatch.setattr(rule, "_cpu_level", lambda: level)
    found = rule.handover_reason(1024, 1024, 64, 64, "none", BF16, "cpu", 2, scheme)
    assert found == wanted
    assert wanted is None or wanted in rule.rules()


# Counters --------------------------------------------------------------------------------------------------------


def test_counters_are_exact_under_threads_and_read_as_sentences():
    q, k, v = qkv(length=3)
    bad = q.clone()
    bad[0, 1, 2, 3] = torch.nan

    def work():
        for _ in range(40):
            with rf.use_backend("reference"):
                rf.attention(bad, k, v, precision="int8_bf16")
            rf.attention(q.double(), k.double(), v.double())

    pool = [threading.Thread(target=work) for _ in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    stats = rf.attention_stats(reset=True)
    key = ("int8_bf16", "int8_bf16", "reference")
    assert stats.calls == {key: 160}
    assert stats.exact_heads == {key: 160}
    assert stats.handovers == {("int8", rule.FLOAT64): 160}
    text = repr(stats)
    assert "int8_bf16 (reference): 160 calls, 160 exact heads" in text
    assert f"int8 handed over to PyTorch: 160 calls, since {rule.FLOAT64}" in text
    assert "no calls" in repr(rf.attention_stats())
    assert not rf.attention_stats().calls


def test_resets_lose_no_handover():
    q, k, v = (t.double() for t in qkv(length=3))
    seen = []

    def work():
        for _ in range(200):
            rf.attention(q, k, v)

    pool = [threading.Thread(target=work) for _ in range(3)]
    for thread in pool:
        thread.start()
    while any(thread.is_alive() for thread in pool):
        seen.append(rf.attention_stats(reset=True).handovers.get(("int8", rule.FLOAT64), 0))
    seen.append(rf.attention_stats(reset=True).handovers.get(("int8", rule.FLOAT64), 0))
    assert sum(seen) == 600
    assert not rf.attention_stats().handovers
