"""The attention function and the override for ComfyUI, called as ComfyUI calls them."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from relative_error import relative

from rfkernels.integrations import comfyui

HEADS, DIM = 4, 16


def wrap_attn(function):
    """What ComfyUI's wrapper does around each of its attention functions."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        options = kwargs.get("transformer_options") or {}
        override = options.get("optimized_attention_override")
        if override is None or "_inside_attn_wrapper" in kwargs:
            return function(*args, **kwargs)
        return override(function, *args, **{**kwargs, "_inside_attn_wrapper": True})

    return wrapper


calls = []


@wrap_attn
def attention_pytorch(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):  # fmt: skip
    calls.append(kwargs)
    if not skip_reshape:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=kwargs.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@pytest.fixture(autouse=True)
def _nothing_counted():
    calls.clear()
    comfyui.attention_stats(reset=True)


def qkv(apart=False, queries=10, keys=24):
    g = torch.Generator().manual_seed(4)
    tensors = [torch.randn(2, n, HEADS * DIM, generator=g) for n in (queries, keys, keys)]
    if apart:
        tensors = [t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in tensors]
    return tensors


MASKS = {
    "none": None,
    "(Sq, Sk)": torch.arange(24) < torch.arange(4, 14)[:, None],
    "(B, 1, Sk)": torch.where(torch.arange(24) < torch.tensor([24, 6])[:, None], 0.0, -1e4)[
        :, None
    ],
    "(B, 1, 1, Sk)": (torch.arange(24) < torch.tensor([24, 6])[:, None])[:, None, None],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_the_override_computes_what_comfyui_computes(
    kernel, mask, skip_reshape, skip_output_reshape
):
    q, k, v = qkv(skip_reshape)
    arguments = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    expected = attention_pytorch(q, k, v, HEADS, MASKS[mask], **arguments)
    plain = attention_pytorch(q, k, v, HEADS, None, **arguments)
    calls.clear()
    options = {"optimized_attention_override": comfyui.attention_override()}
    found = attention_pytorch(
        q, k, v, HEADS, mask=MASKS[mask], **arguments, transformer_options=options
    )
    assert (kernel.calls("int8"), len(calls)) == (1, 0)
    assert found.shape == expected.shape
    assert relative(found, expected) < 0.03
    assert MASKS[mask] is None or relative(plain, expected) > 0.1


def test_a_model_of_three_blocks(kernel):
    options = {"optimized_attention_override": comfyui.attention_override("bf16")}
    x = qkv(queries=24)[0]
    for _ in range(3):
        x = attention_pytorch(x, x, x, heads=HEADS, transformer_options=options)
    assert kernel.calls("bf16") == 3
    assert comfyui.attention_stats() == {"calls": 3, "routed": 3, "fallbacks": {}}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"low_precision_attention": False}, "low_precision_attention=False"),
        ({"window": 3}, "the option window"),
    ],
)
def test_what_goes_back_to_comfyui(kernel, options, reason):
    q, k, v = qkv()
    expected = attention_pytorch(q, k, v, HEADS)
    override = {"optimized_attention_override": comfyui.attention_override()}
    found = attention_pytorch(q, k, v, HEADS, transformer_options=override, **options)
    assert torch.equal(found, expected)
    assert calls[-1].items() >= options.items()
    assert comfyui.attention_stats()["fallbacks"] == {reason: 1}
    q.requires_grad_()
    attention_pytorch(q, k, v, HEADS, transformer_options=override).sum().backward()
    assert (
        "a gradient is needed (training=True takes these calls)"
        in (comfyui.attention_stats()["fallbacks"])
    )
    assert kernel.calls() == 0


def test_the_function_itself(kernel):
    q, k, v = qkv()
    k, v = k[..., : 2 * DIM], v[..., : 2 * DIM]
    found = comfyui.attention(q, k, v, HEADS, enable_gqa=True, scale=0.5)
    heads = [t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in (q, k, v)]
    exact = F.scaled_dot_product_attention(*heads, scale=0.5, enable_gqa=True)
    assert kernel.calls() == 1
    assert relative(found, exact.transpose(1, 2).flatten(2)) < 0.03
    with pytest.raises(
        TypeError, match=r"attention: options must be known ones, .*; got is_causal"
    ):
        comfyui.attention(q, k, v, HEADS, is_causal=True)
    with pytest.raises(ValueError, match="attention_override: precision must be one of"):
        comfyui.attention_override("int3")
