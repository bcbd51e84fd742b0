"""diffusers models on rf.attention, counted: layers times evaluations, by both ways."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from relative_error import relative

pytest.importorskip(
    "diffusers", minversion="0.42", reason="needs diffusers 0.42, whose models the table is of"
)

import diffusers_direct
import diffusers_direct_video
import diffusers_dispatched
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_processor import AttnProcessor
from diffusers_family import build, evaluate

from rfkernels.integrations import diffusers as rfd
from rfkernels.integrations import sdpa, set_precision

FAMILIES = {
    **diffusers_dispatched.FAMILIES,
    **diffusers_direct.FAMILIES,
    **diffusers_direct_video.FAMILIES,
}
REACHED = {row.cls: row for row in rfd.coverage()}
BOUND = 0.03  # relative error of a whole model's output; 0.0007 to 0.008 were seen


@pytest.fixture(autouse=True)
def _diffusers_is_as_it_was(monkeypatch):
    """`set_attention_backend` also sets a default for the whole process."""
    registry = dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    dispatch.logger.setLevel("ERROR")
    rfd.attention_stats(reset=True)


def test_the_table_lists_what_is_tested():
    assert {f.cls for f in FAMILIES.values()} == set(REACHED)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model(kernel, name):
    family = FAMILIES[name]
    model, inputs = build(family)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    own = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
    exact = evaluate(model, inputs)

    reached = rfd.set_attention(model)
    found = evaluate(model, inputs)
    evaluate(model, inputs)
    assert kernel.calls() == 2 * family.calls
    assert rfd.attention_stats(reset=True)["fallbacks"] == {}
    assert 0 < relative(found, exact) < BOUND
    taken = [n for n, how in reached.items() if not how.startswith("none: ")]
    assert len(taken) >= 3
    if family.mask is not None:
        unmasked = {**inputs, family.mask: torch.ones_like(inputs[family.mask])}
        assert relative(evaluate(model, unmasked), exact) > BOUND
    assert model.state_dict().keys() == state.keys()

    rfd.reset_attention(model)
    kernel.calls()
    assert torch.equal(evaluate(model, inputs), exact)
    assert kernel.calls() == 0
    assert {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")} == own


@pytest.mark.parametrize("name", FAMILIES)
def test_the_backend_alone_reaches_what_the_table_says(kernel, name):
    family = FAMILIES[name]
    model, inputs = build(family)
    exact = evaluate(model, inputs)
    rfd.register_attention_backend()
    if not hasattr(model, "set_attention_backend"):
        pytest.skip("this diffusers has no set_attention_backend")
    model.set_attention_backend("rfkernels")
    found = evaluate(model, inputs)
    calls = kernel.calls()
    how = {0: "none", family.calls: "all"}.get(calls, "some")
    assert how == REACHED[family.cls].backend
    assert (relative(found, exact) > 0) == (calls > 0)
    model.reset_attention_backend()


def flux():
    return build(FAMILIES["Flux"])


def test_the_context_manager_of_diffusers(kernel):
    model, inputs = flux()
    rfd.register_attention_backend()
    exact = evaluate(model, inputs)
    with dispatch.attention_backend("rfkernels"):
        evaluate(model, inputs)
    assert kernel.calls() == 4
    assert torch.equal(evaluate(model, inputs), exact)
    assert kernel.calls() == 0


def test_registering_again_replaces_the_precision(kernel):
    model, inputs = flux()
    rfd.register_attention_backend()
    members = list(dispatch.AttentionBackendName)
    rfd.register_attention_backend(precision="bf16")
    assert list(dispatch.AttentionBackendName) == members
    with dispatch.attention_backend("rfkernels"):
        evaluate(model, inputs)
    assert kernel.calls("bf16") == 4
    rfd.register_attention_backend()
    member = dispatch.AttentionBackendName("rfkernels")
    assert member is dispatch.AttentionBackendName.RFKERNELS is pickle.loads(pickle.dumps(member))
    assert (member.name, member.value, member) == ("RFKERNELS", "rfkernels", "rfkernels")


def test_the_checks_of_diffusers(kernel, monkeypatch):
    model, inputs = build(FAMILIES["QwenImage"])
    rfd.register_attention_backend()
    monkeypatch.setattr(dispatch._AttentionBackendRegistry, "_checks_enabled", True)
    with dispatch.attention_backend("rfkernels"):
        evaluate(model, inputs)
        assert kernel.calls() == 3
        q = torch.randn(1, 4, 2, 8)
        with pytest.raises(
            ValueError, match="rfkernels: query, key and value must be on one device"
        ):
            dispatch.dispatch_attention_fn(q, q.to("meta"), q)


def test_masks_of_the_dispatcher(kernel):
    rfd.register_attention_backend()
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 9, 4, 16), torch.randn(2, 24, 4, 16), torch.randn(2, 24, 4, 16)
    masks = [
        torch.arange(24) < torch.tensor([[24], [5]]),
        torch.rand(9, 24) > 0.5,
        torch.rand(2, 1, 9, 24) > 0.5,
        torch.randn(2, 4, 9, 24),
    ]
    for mask in masks:
        expected = dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask)
        with dispatch.attention_backend("rfkernels"):
            found = dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask)
        assert relative(found, expected) < 0.02
        assert kernel.calls() == 1
    with dispatch.attention_backend("rfkernels"):
        with pytest.raises(ValueError, match="rfkernels: return_lse"):
            dispatch.dispatch_attention_fn(q, k, v, attention_kwargs={"return_lse": True})
        with pytest.raises(ValueError, match="rfkernels: context parallelism"):
            dispatch.dispatch_attention_fn(q, k, v, parallel_config=object())


@pytest.mark.parametrize("name", ["Flux", "SD3"])
def test_compiled_as_one_graph(kernel, name):
    family = FAMILIES[name]
    model, inputs = build(family)
    rfd.set_attention(model)
    expected = evaluate(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    kernel.calls()
    assert torch.equal(evaluate(compiled, inputs), expected)
    evaluate(compiled, inputs)
    assert kernel.calls() == 2 * family.calls


def test_gradients(kernel):
    model, inputs = build(FAMILIES["SD3"])
    model.requires_grad_(True)
    rfd.set_attention(model)
    out = model(**inputs, return_dict=False)[0]
    assert kernel.calls() == 0
    assert rfd.attention_stats(reset=True)["fallbacks"] == {
        "a gradient is needed (training=True takes these calls)": 3
    }
    rfd.set_attention(model, training=True)
    model(**inputs, return_dict=False)[0].backward(out.detach())
    assert kernel.calls() == 3
    assert all(p.grad is not None for n, p in model.named_parameters() if "to_q" in n)
    set_precision(model, {"transformer_blocks.0.*": "bf16"})  # training stays as it was
    model(**inputs, return_dict=False)[0].sum().backward()
    assert kernel.calls("bf16") == 1
    flux_model, flux_inputs = flux()
    flux_model.requires_grad_(True)
    rfd.set_attention(flux_model, training=True)
    flux_model(**flux_inputs, return_dict=False)[0].sum().backward()
    assert kernel.calls() == 4


def test_copies_keep_it(kernel):
    for name in ("SD3", "Flux"):
        model, inputs = build(FAMILIES[name])
        rfd.set_attention(model, "bf16")
        expected = evaluate(model, inputs)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            kernel.calls()
            assert torch.equal(evaluate(again, inputs), expected)
            assert kernel.calls("bf16") == FAMILIES[name].calls


class WithWeights(torch.nn.Module):
    """A processor with parameters, as an IP-Adapter's."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.5))

    def __call__(self, attn, hidden_states, **kwargs):
        split = [
            layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        ]
        out = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        return attn.to_out[0](out) * self.gain


def test_processors_with_weights_stay_in_the_model(kernel):
    model, inputs = build(FAMILIES["DiT"])
    for block in model.transformer_blocks:
        block.attn1.set_processor(WithWeights().requires_grad_(False))
    exact, state = evaluate(model, inputs), model.state_dict()
    own = [block.attn1.processor for block in model.transformer_blocks]
    rfd.set_attention(model)
    assert relative(evaluate(model, inputs), exact) < BOUND
    assert kernel.calls() == 3
    assert model.state_dict().keys() == state.keys()
    # The weights are the same objects: training or loading reaches both.
    model.transformer_blocks[1].attn1.processor.gain.zero_()
    assert own[1].gain == 0
    rfd.reset_attention(model)
    assert [block.attn1.processor for block in model.transformer_blocks] == own


def test_a_processor_shared_by_layers_and_precisions_per_layer(kernel):
    model, inputs = build(FAMILIES["DiT"])
    shared = model.transformer_blocks[0].attn1.processor
    for block in model.transformer_blocks:
        block.attn1.set_processor(shared)
    found = set_precision(model, {"transformer_blocks.[12].*": "bf16", "*.2.*": "int8"})
    assert list(found.values()) == ["sdpa", "bf16", "int8"]
    evaluate(model, inputs)
    assert kernel.calls("bf16") == 1
    evaluate(model, inputs)
    assert kernel.calls("int8") == 1
    assert not vars(shared)
    set_precision(model, {"*": "sdpa"})
    assert all(block.attn1.processor is shared for block in model.transformer_blocks)


def test_precisions_per_layer_through_the_dispatcher(kernel):
    model, inputs = flux()
    rfd.set_attention(model)
    found = set_precision(model, {"single_*": "bf16", "transformer_blocks.0.attn": "sdpa"})
    assert sorted(found.values()) == ["bf16", "bf16", "int8", "sdpa"]
    evaluate(model, inputs)
    assert kernel.calls("bf16") == 2
    evaluate(model, inputs)
    assert kernel.calls("int8") == 1
    with pytest.raises(ValueError, match=r"pattern 'blocks\.\*' must match an attention layer"):
        set_precision(model, {"single_*": "int8", "blocks.*": "int8"})
    assert sorted(set_precision(model, {"single_*.1.*": "sdpa"}).values()) == [
        "bf16", "int8", "sdpa", "sdpa",
    ]  # fmt: skip


def test_a_model_that_would_take_no_call_is_refused():
    model, _ = build(FAMILIES["UNet2D"])
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())
    with pytest.raises(
        ValueError,
        match=r"UNet2DModel has no attention layer that could take rf\.attention; .*: none: AttnProcessor",
    ):
        rfd.set_attention(model)
    with pytest.raises(ValueError, match="no attention layer was found"):
        rfd.set_attention(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"e\.g\. pipe\.transformer; got object"):
        rfd.set_attention(object())


def test_what_is_left_alone_is_named(kernel):
    model, inputs = build(FAMILIES["Sana"])
    reached = rfd.set_attention(model)
    left = {how for how in reached.values() if how.startswith("none: ")}
    assert left == {"none: SanaLinearAttnProcessor2_0 does not call torch's function"}
    mochi, inputs = build(FAMILIES["Mochi"])
    reached = rfd.set_attention(mochi)
    assert "rf.integrations.sdpa() takes it" in reached["time_embed.pooler"]
    evaluate(mochi, inputs)
    assert kernel.calls() == 6
    with sdpa():
        evaluate(mochi, inputs)
    assert kernel.calls() == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sage"}, "name must not be a backend of diffusers; got 'sage'"),
        ({"name": "RF"}, "name must be lower-case letters, digits and underscores; got 'RF'"),
        ({"precision": "int4"}, "precision must be one of int8, .*; got 'int4'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"register_attention_backend: {message}"):
        rfd.register_attention_backend(**options)
