"""transformers models on rf.attention against its own sdpa: padding, causal, grouped queries."""

from __future__ import annotations

import pytest
import torch
from relative_error import relative

from rfkernels.integrations import set_precision
from rfkernels.integrations import transformers as rft

transformers = pytest.importorskip("transformers", minversion="5", reason="needs transformers 5")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
}
LENGTH = 12


@pytest.fixture(autouse=True)
def _registered():
    transformers.logging.set_verbosity_error()
    rft.register_attention()
    rft.attention_stats(reset=True)


def llama(cls="LlamaModel", **options):
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES, **options)
    return getattr(transformers, cls)(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SIZES))


def t5():
    config = transformers.T5Config(
        vocab_size=50, d_model=64, d_kv=16, d_ff=64, num_layers=3, num_heads=4
    )
    return transformers.T5EncoderModel(config)


def vit():
    return transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **SIZES))


def prepared(make):
    """The model with large weights (so that attention matters), its inputs, and the rows that count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.normal_(std=p[0].numel() ** -0.5)
        if make is vit:
            return model, {"pixel_values": torch.randn(2, 3, 16, 16)}, slice(None)
        mask = torch.ones(2, LENGTH, dtype=torch.int64)
        if hasattr(model.config, "num_key_value_heads"):
            mask[1, :5] = 0  # decoders are padded on the left
        else:
            mask[1, -5:] = 0
        ids = torch.randint(0, 50, (2, LENGTH))
    return model, {"input_ids": ids, "attention_mask": mask}, mask.bool()


@pytest.mark.parametrize("make", [llama, bert, t5, vit], ids=lambda make: make.__name__)
def test_a_whole_model_as_under_sdpa(kernel, make):
    model, inputs, rows = prepared(make)
    assert model.config._attn_implementation == "sdpa"
    exact = model(**inputs).last_hidden_state
    model.set_attn_implementation("rfkernels")
    found = model(**inputs).last_hidden_state
    model(**inputs)
    assert kernel.calls() == 3 * 2
    assert rft.attention_stats() == {"calls": 6, "routed": 6, "fallbacks": {}}
    assert 0 < relative(found[rows], exact[rows]) < 0.03
    if "attention_mask" in inputs:
        unmasked = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
        assert relative(model(**unmasked).last_hidden_state[rows], exact[rows]) > 0.05
    model.set_attn_implementation("sdpa")
    kernel.calls()
    assert torch.equal(model(**inputs).last_hidden_state, exact)
    assert kernel.calls() == 0


def test_unpadded_batches_are_causal(kernel):
    model, inputs, _ = prepared(llama)
    inputs["attention_mask"] = None
    exact = model(**inputs).last_hidden_state
    model.set_attn_implementation("rfkernels")
    found = model(**inputs).last_hidden_state
    assert kernel.calls() == 3
    assert relative(found, exact) < 0.03
    # The first tokens do not see the last one.
    inputs["input_ids"][:, -1] = 0
    again = model(**inputs).last_hidden_state
    torch.testing.assert_close(again[:, :-1], found[:, :-1], rtol=0, atol=0.1)


def test_generation_with_a_cache_gives_the_tokens_of_sdpa(kernel):
    model, inputs, _ = prepared(lambda: llama("LlamaForCausalLM"))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation("rfkernels")
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert kernel.calls() == 3 * 5


def test_compiled_as_one_graph(kernel):
    model, inputs, _ = prepared(bert)
    model.set_attn_implementation("rfkernels")
    expected = model(**inputs).last_hidden_state
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    kernel.calls()
    torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected)
    assert kernel.calls() == 3


def test_precisions_per_layer(kernel):
    model, inputs, rows = prepared(llama)
    with pytest.raises(ValueError, match=r"pattern '\*' must match .* none whose precision"):
        set_precision(model, {"*": "bf16"})
    exact = model(**inputs).last_hidden_state
    model.set_attn_implementation("rfkernels")
    found = set_precision(model, {"layers.0.*": "bf16", "layers.2.*": "sdpa"})
    assert found == {
        "layers.0.self_attn": "bf16",
        "layers.1.self_attn": "int8",
        "layers.2.self_attn": "sdpa",
    }
    out = model(**inputs).last_hidden_state
    assert kernel.calls("bf16") == 1
    assert relative(out[rows], exact[rows]) < 0.03
    model(**inputs)
    assert kernel.calls("int8") == 1


def test_gradients(kernel):
    model, inputs, _ = prepared(bert)
    model.requires_grad_(True).set_attn_implementation("rfkernels")
    exact = model(**inputs).last_hidden_state
    assert kernel.calls() == 0
    assert set(rft.attention_stats()["fallbacks"]) == {
        "a gradient is needed (training=True takes these calls)"
    }
    rft.register_attention(training=True)
    model(**inputs).last_hidden_state.backward(exact.detach())
    assert kernel.calls() == 3
    assert model.encoder.layer[0].attention.self.query.weight.grad.any()


def test_models_that_it_cannot_serve_are_refused():
    config = transformers.Gemma2Config(vocab_size=50, num_key_value_heads=2, head_dim=16, **SIZES)
    model = transformers.Gemma2Model(config).eval()
    model.set_attn_implementation("rfkernels")
    with pytest.raises(ValueError, match="rfkernels: Gemma2Attention asks for softcap"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sdpa"}, "name must not be one of transformers' own; got 'sdpa'"),
        ({"name": "eager"}, "name must not be one of transformers' own; got 'eager'"),
        ({"name": "rf kernels"}, "name must be letters, digits and underscores; got 'rf kernels'"),
        ({"precision": "int4"}, "precision must be one of int8, .*; got 'int4'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"register_attention: {message}"):
        rft.register_attention(**options)
