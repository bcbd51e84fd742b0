"""rf.integrations.sdpa: what it takes, what it leaves to torch, and that it leaves no trace."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from relative_error import relative

import rfkernels as rf
from rfkernels import integrations, models

TORCH = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _torch_has_its_function_back():
    yield
    assert F.scaled_dot_product_attention is TORCH


def qkv(heads=4, kv_heads=4, queries=24, keys=40, dim=16, value_dim=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    q = torch.randn(2, heads, queries, dim, generator=g)
    k = torch.randn(2, kv_heads, keys, dim, generator=g)
    v = torch.randn(2, kv_heads, keys, value_dim, generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def dit(**options):
    """A DiT of three blocks with weights that are nowhere zero."""
    model = models.build("dit", sample_shape=(1, 8, 8), width=32, depth=3, heads=2, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval().requires_grad_(False)


def test_a_model_takes_the_kernel_in_every_block(kernel):
    model, x, t = dit(), torch.randn(2, 1, 8, 8), torch.rand(2)
    exact = model(x, t)
    with integrations.sdpa() as patch:
        found = model(x, t)
        model(x, t)
    assert kernel.calls() == 3 * 2
    assert patch.stats() == {"calls": 6, "routed": 6, "fallbacks": {}}
    assert 0 < relative(found, exact) < 0.02
    assert torch.equal(model(x, t), exact)
    assert kernel.calls() == 0


MASKS = {
    "none": lambda: None,
    "bool (Sq, Sk)": lambda: torch.rand(24, 40) > 0.3,
    "bool (B, 1, 1, Sk)": lambda: torch.arange(40) < torch.tensor([40, 9]).view(2, 1, 1, 1),
    "float (H, Sq, Sk)": lambda: torch.randn(4, 24, 40),
    "float (1, 1, Sq, Sk)": lambda: torch.zeros(1, 1, 24, 40).masked_fill(
        torch.rand(24, 40) > 0.7, -torch.inf
    ),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dims", [3, 4])
def test_the_arguments_mean_what_they_mean_in_torch(kernel, mask, dims):
    torch.manual_seed(0)
    attn_mask = MASKS[mask]()
    if dims == 3 and attn_mask is not None and attn_mask.ndim == 4:
        attn_mask = attn_mask[-1]
    q, k, v = (t[1] if dims == 3 else t for t in qkv(value_dim=24))
    exact = TORCH(q, k, v, attn_mask, 0.0, False, scale=0.3)
    with integrations.sdpa():
        found = F.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, False, scale=0.3)
        plain = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert kernel.calls() == 2
    assert found.shape == exact.shape
    assert relative(found, exact) < 0.03
    # A mask that had been dropped would show.
    assert attn_mask is None or relative(plain, exact) > 0.2


def test_causal_and_grouped_queries(kernel):
    q, k, v = qkv(heads=8, kv_heads=2)
    with integrations.sdpa("int8"):
        found = F.scaled_dot_product_attention(
            query=q, key=k, value=v, is_causal=True, enable_gqa=True
        )
    exact = TORCH(q, k, v, is_causal=True, enable_gqa=True)
    assert kernel.calls() == 1
    assert relative(found, exact) < 0.03
    assert relative(TORCH(q, k, v, enable_gqa=True), exact) > 0.2


def grad_needed():
    q, k, v = qkv()
    return (q, k.requires_grad_(), v), {}


FALLBACKS = {
    "dropout": lambda: (qkv(), {"dropout_p": 0.5}),
    "a gradient is needed (training=True takes these calls)": grad_needed,
    "a dtype other than float32, bfloat16 and float16": lambda: (qkv(dtype=torch.float64), {}),
    "a head_dim outside 1..256": lambda: (qkv(dim=257), {}),
    "fewer than 3 or more than 4 dimensions": lambda: ([t.unsqueeze(0) for t in qkv()], {}),
    "shapes that only torch can broadcast": lambda: (qkv(kv_heads=1), {}),
    "a mask that is neither bool nor float32 nor of the query's dtype": lambda: (
        qkv(),
        {"attn_mask": torch.zeros(24, 40, dtype=torch.float64)},
    ),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_goes_to_torch_and_why(kernel, reason):
    tensors, options = FALLBACKS[reason]()

    def call():
        torch.manual_seed(5)
        try:
            return F.scaled_dot_product_attention(*tensors, **options)
        except RuntimeError as error:  # torch refuses: so does the patch, in the same words
            return str(error)

    expected = call()
    with integrations.sdpa() as patch:
        found = call()
    assert kernel.calls() == 0
    assert patch.stats() == {"calls": 1, "routed": 0, "fallbacks": {reason: 1}}
    assert type(found) is type(expected)
    assert torch.equal(found, expected) if torch.is_tensor(found) else found == expected


def test_a_mask_and_is_causal_mean_both(kernel):
    q, k, v = qkv()
    mask = torch.rand(24, 40, generator=torch.Generator().manual_seed(1)) > 0.3
    both = mask & torch.ones(24, 40).bool().tril()
    with integrations.sdpa():
        found = F.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    assert kernel.calls() == 1
    exact = TORCH(q, k, v, both).where(both.any(-1)[:, None], torch.zeros(()))
    assert relative(found, exact) < 0.03


def test_transforms_go_to_torch(kernel):
    q, k, v = qkv()
    with integrations.sdpa() as patch:
        found = torch.vmap(F.scaled_dot_product_attention)(q, k, v)
    torch.testing.assert_close(found, TORCH(q, k, v))
    assert patch.stats()["routed"] == 0
    assert kernel.calls() == 0


def test_training_runs_quantized_with_torchs_gradient(kernel):
    tensors = [t.requires_grad_() for t in qkv()]
    exact = TORCH(*tensors)
    expected = torch.autograd.grad(exact.square().sum(), tensors)
    with integrations.sdpa(training=True) as patch:
        out = F.scaled_dot_product_attention(*tensors)
        found = torch.autograd.grad((2 * exact.detach() * out).sum(), tensors)
    assert kernel.calls() == 1
    assert patch.stats()["routed"] == 1
    assert 0 < relative(out.detach(), exact.detach()) < 0.03
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_gives_the_dtype_that_torch_gives(kernel):
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = TORCH(q, k.bfloat16(), v)
        with integrations.sdpa():
            found = F.scaled_dot_product_attention(q, k.bfloat16(), v)
    assert kernel.calls() == 1
    assert found.dtype == expected.dtype == torch.bfloat16
    assert relative(found, expected) < 0.03


def test_multihead_attention_is_taken_along(kernel):
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True).requires_grad_(False)
    x, padding = torch.randn(2, 12, 32), torch.arange(12) >= torch.tensor([[12], [5]])
    expected = layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    with integrations.sdpa():
        found = layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        plain = layer(x, x, x, need_weights=False)[0]
    assert kernel.calls() == 2
    assert relative(found, expected) < 0.03 < relative(plain, expected)


def test_tensor_subclasses_go_to_torch_and_a_default_device_does_not(kernel):
    class Tagged(torch.Tensor):
        pass

    q, k, v = qkv()
    with integrations.sdpa() as patch:
        found = F.scaled_dot_product_attention(q.as_subclass(Tagged), k, v)
        assert kernel.calls() == 0
        with torch.device("cpu"):
            F.scaled_dot_product_attention(q, k, v)
    assert isinstance(found, Tagged)
    assert torch.equal(found.as_subclass(torch.Tensor), TORCH(q, k, v))
    assert patch.stats() == {"calls": 2, "routed": 1, "fallbacks": {"a tensor subclass": 1}}


def test_calls_that_the_kernel_hands_over_do_not_come_back():
    q, k, v = qkv(dtype=torch.float64)
    rf.attention_stats(reset=True)
    with integrations.sdpa() as patch:
        found = rf.attention(q, k, v)
    assert torch.equal(found, TORCH(q, k, v))
    assert patch.stats()["calls"] == 0
    assert sum(rf.attention_stats(reset=True).handovers.values()) == 1


@pytest.mark.parametrize("reason", [None, *FALLBACKS])
def test_small_calls_given_back_are_counted_as_large_ones_are(reason):
    tensors, options = FALLBACKS[reason]() if reason else (qkv(), {})
    mask = torch.rand(24, 40) > 0.3
    rf.attention_stats(reset=True)
    with integrations.sdpa() as patch:
        for extra in ({}, {"attn_mask": mask}) if reason is None else ({},):
            try:
                found = F.scaled_dot_product_attention(*tensors, **options, **extra)
            except RuntimeError:  # torch's refusal
                continue
            if "dropout_p" not in options:
                assert torch.equal(found, TORCH(*tensors, **options, **extra))
    calls = 1 if reason else 2
    routed = 0 if reason else 2
    fallbacks = {reason: 1} if reason else {}
    assert patch.stats() == {"calls": calls, "routed": routed, "fallbacks": fallbacks}
    stats = rf.attention_stats(reset=True)
    assert sum(stats.handovers.values()) == routed
    assert not stats.calls


def test_small_calls_under_autocast_and_in_training():
    q, k, v = qkv()
    leaf = q.clone().requires_grad_()
    with integrations.sdpa(training=True) as patch:
        with torch.autocast("cpu", torch.bfloat16):
            assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        F.scaled_dot_product_attention(leaf, k, v).sum().backward()
    other = q.clone().requires_grad_()
    TORCH(other, k, v).sum().backward()
    assert torch.equal(leaf.grad, other.grad)
    assert patch.stats() == {"calls": 2, "routed": 2, "fallbacks": {}}


def test_undone_when_an_error_passes():
    with pytest.raises(KeyError), integrations.sdpa():
        raise KeyError
    assert F.scaled_dot_product_attention is TORCH


def test_until_disabled(kernel):
    patch = integrations.sdpa("bf16").enable()
    try:
        F.scaled_dot_product_attention(*qkv())
        with pytest.raises(RuntimeError, match="sdpa: this patch is enabled already"):
            patch.enable()
    finally:
        patch.disable()
    assert kernel.calls("bf16") == 1
    assert not patch.enabled
    with pytest.raises(RuntimeError, match="sdpa: this patch is not enabled"):
        patch.disable()


def test_the_newest_patch_decides_and_any_may_be_undone_first(kernel):
    q, k, v = qkv()
    outer, inner = integrations.sdpa("int8").enable(), integrations.sdpa("bf16").enable()
    F.scaled_dot_product_attention(q, k, v)
    assert (kernel.calls("bf16"), outer.stats()["calls"]) == (1, 0)
    outer.disable()
    F.scaled_dot_product_attention(q, k, v)
    assert kernel.calls("bf16") == 1
    inner.disable()
    assert F.scaled_dot_product_attention is TORCH
    patches = [integrations.sdpa(p).enable() for p in ("int8", "bf16", "int8_bf16")]
    for precision in ("int8_bf16", "bf16", "int8"):
        F.scaled_dot_product_attention(q, k, v)
        assert kernel.calls(precision) == 1
        patches.pop().disable()
    with integrations.sdpa("int8"):
        with integrations.sdpa("bf16"):
            pass
        F.scaled_dot_product_attention(q, k, v)
        assert kernel.calls("int8") == 1


def test_somebody_elses_patch_survives(kernel, monkeypatch):
    q, k, v = qkv()
    seen = []
    patch = integrations.sdpa().enable()
    ours = F.scaled_dot_product_attention

    def theirs(*args, **kwargs):
        seen.append(1)
        return ours(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    with integrations.sdpa("bf16"):  # on top of theirs
        F.scaled_dot_product_attention(q, k, v)
        assert kernel.calls("bf16") == 1
        assert not seen
    assert F.scaled_dot_product_attention is theirs
    with pytest.warns(RuntimeWarning, match=r"was replaced while this patch was enabled .*theirs"):
        patch.disable()
    assert F.scaled_dot_product_attention is theirs
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), TORCH(q, k, v))  # exact again
    assert seen
    assert kernel.calls() == 0
    monkeypatch.undo()  # they give the name back to a function that has nothing to do any more
    with integrations.sdpa():
        F.scaled_dot_product_attention(q, k, v)
    assert kernel.calls() == 1
    assert F.scaled_dot_product_attention is TORCH


def test_a_patch_from_before_is_what_fallbacks_go_to(kernel, monkeypatch):
    seen = []

    def theirs(*args, **kwargs):
        seen.append(kwargs["dropout_p"])
        return TORCH(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    with integrations.sdpa():
        F.scaled_dot_product_attention(*qkv())
        F.scaled_dot_product_attention(*qkv(), dropout_p=0.25)
    assert seen == [0.25]
    assert F.scaled_dot_product_attention is theirs
    monkeypatch.undo()


def test_every_thread_sees_it_and_counts_are_exact():
    q, k, v = qkv()
    with integrations.sdpa() as patch:
        threads = [
            threading.Thread(
                target=lambda: [
                    F.scaled_dot_product_attention(q, k, v, dropout_p=0.1) for _ in range(50)
                ]
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert patch.stats()["fallbacks"] == {"dropout": 200}


def test_compiled_models_trace_into_it_and_out_again(kernel):
    model, x, t = dit(), torch.randn(2, 1, 8, 8), torch.rand(2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exact = compiled(x, t)
    with integrations.sdpa():
        found = compiled(x, t)
        compiled(x, t)
        assert kernel.calls() == 3 * 2
        assert torch.equal(found, model(x, t))
    kernel.calls()
    assert torch.equal(compiled(x, t), exact)
    assert kernel.calls() == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int7"}, ValueError, "sdpa: precision must be one of int8, .*; got 'int7'"),
        ({"precision": 8}, TypeError, "sdpa: precision must be a string; got int"),
        ({"training": 1}, TypeError, "sdpa: training must be a bool; got int"),
        ({"presicion": "int8"}, TypeError, "presicion"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        integrations.sdpa(**options)
