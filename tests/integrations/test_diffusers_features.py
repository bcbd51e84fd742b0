"""Features of diffusers' attention layers shared by `rfkernels.editing`: what is kept is what the projections
computed, what is put back is what attention takes, and other backends are refused."""

import copy

import pytest
import torch
from diffusers_direct import FAMILIES as DIRECT
from diffusers_dispatched import FAMILIES as DISPATCHED
from diffusers_family import build, images, text, video

from rfkernels.editing import Bank, Features, Key, attention_blocks, edit
from rfkernels.editing.features import TappedField
from rfkernels.integrations import sdpa
from rfkernels.integrations.diffusers import (
    allow_exchange,
    forbid_exchange,
    set_attention,
    velocity_from_pretrained,
)
from rfkernels.models import DiT
from rfkernels.sampling import Midpoint, Run, sample
from rfkernels.sampling.field import Field

FAMILIES = {**DIRECT, **DISPATCHED}
NETWORKS = ["Flux", "Flux2", "SD3", "Wan", "LTX"]


def made(name):
    family = FAMILIES[name]
    if name == "Flux":
        family = type(family)(family.cls, {**family.options, "in_channels": 16}, family.inputs, 0)
    network = build(family)[0].requires_grad_(False)
    torch.manual_seed(2)
    x1 = video() if name in ("Wan", "LTX") else images()
    pair = []
    for _ in range(2):
        condition = {"encoder_hidden_states": text()}
        if name in ("Flux", "SD3"):
            condition["pooled_projections"] = torch.randn(2, 32)
        pair.append(condition)
    return velocity_from_pretrained(network, prediction="velocity"), x1, *pair


@pytest.mark.parametrize("name", NETWORKS)
def test_allowing_changes_nothing_and_is_undone(name):
    velocity, x1, source, _ = made(name)
    t = torch.tensor([0.3, 0.8])
    classes = [type(module) for module in velocity.modules()]
    expected, keys = velocity(x1, t, **source), list(velocity.state_dict())
    names = allow_exchange(velocity)
    assert torch.equal(velocity(x1, t, **source), expected)
    assert list(velocity.state_dict()) == keys
    blocks = [velocity.get_submodule(layer) for layer in names]
    assert blocks == attention_blocks(velocity)
    assert len(blocks) >= 3
    assert not any("attn2" in layer for layer in names) or name == "SD3"
    assert allow_exchange(velocity) == names  # twice is once
    assert torch.equal(copy.deepcopy(velocity)(x1, t, **source), expected)
    forbid_exchange(velocity)
    assert [type(module) for module in velocity.modules()] == classes


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("what", ["v", "qkv"])
def test_putting_back_what_the_same_run_computed_changes_no_bit(name, what):
    velocity, x1, source, _ = made(name)
    allow_exchange(velocity)
    expected = sample(velocity, x1, steps=2, solver="midpoint", condition=source)
    bank, times = Bank(Features(steps=2, what=what)), (0.0, 0.5, 1.0)
    for recording in (True, False):
        field = TappedField.of(
            Field(velocity, torch.float32, 2, condition=source),
            bank=bank, times=times, recording=recording,
        )  # fmt: skip
        run = Run(times, False, None, lambda done: None)
        assert torch.equal(Midpoint().integrate(field, x1, run).x, expected)
    assert bank.missed == 0
    assert len(bank.kept) == 2 * 2 * len(what) * len(attention_blocks(velocity))


def test_layers_in_their_order():
    """Double blocks before single ones; no cross-attention, whether or not the layer says that it is one."""
    names = allow_exchange(made("Flux2")[0])
    blocks = [f"{kind}transformer_blocks.{i}.attn" for kind in ("", "single_") for i in (0, 1)]
    assert names == [f"network.network.{block}" for block in blocks]
    for name in ("Wan", "LTX"):
        blocks = "blocks" if name == "Wan" else "transformer_blocks"
        assert allow_exchange(made(name)[0]) == [
            f"network.network.{blocks}.{i}.attn1" for i in range(3)
        ]
    crossed = allow_exchange(made("LTX")[0], r"attn2$")
    assert crossed == [f"network.network.transformer_blocks.{i}.attn2" for i in range(3)]
    kandinsky = allow_exchange(build(FAMILIES["Kandinsky5"])[0])
    assert all(name.endswith(".self_attention") for name in kandinsky)


@pytest.mark.parametrize(
    ("name", "layers", "projection", "part"),
    [
        ("Flux", r"single_transformer_blocks\.\d+\.attn$", "to_v", slice(0, 32)),
        # q, k and v of width 32, then what the feedforward takes, in one product
        ("Flux2", r"single_transformer_blocks\.\d+\.attn$", "to_qkv_mlp_proj", slice(64, 96)),
        ("Wan", r"\.attn1$", "to_v", slice(0, 32)),
        ("LTX", r"\.attn1$", "to_v", slice(0, 32)),
    ],
)
def test_by_hand_through_the_projection(name, layers, projection, part):
    """In these layers V is the answer of a projection, or a part of it, heads apart."""
    velocity, x1, source, target = made(name)
    names = allow_exchange(velocity, layers)
    layer = velocity.get_submodule(names[1]).get_submodule(projection)
    kept = []

    def put_back(module, inputs, out):
        return torch.cat((out[..., : part.start], kept[0], out[..., part.stop :]), dim=-1)

    with layer.register_forward_hook(lambda module, inputs, out: kept.append(out[..., part])):
        velocity(x1, torch.full((2,), 0.5), **source)
    with layer.register_forward_hook(put_back):
        expected = velocity(x1, torch.zeros(2), **target)

    bank = Bank(Features(steps=1, blocks=[1]))
    common = {"bank": bank, "times": (0.0, 0.5, 1.0)}
    first = Field(velocity, torch.float32, 2, condition=source)
    recording = TappedField.of(first, **common, backwards=True, recording=True)
    recording(recording.start(x1), 0.5)
    stored = bank.kept[Key(0, False, False, 1, "v")].restored()
    torch.testing.assert_close(stored.transpose(1, 2).flatten(2), kept[0], rtol=0, atol=0)
    injecting = TappedField.of(Field(velocity, torch.float32, 2, condition=target), **common)
    got = injecting(injecting.start(x1), 0.0).conditional
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (got - velocity(x1, torch.zeros(2), **target)).abs().max() > 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_edits_share_features(name):
    velocity, x1, source, target = made(name)
    count = len(allow_exchange(velocity))
    options = {"source": source, "target": target, "method": "fireflow", "steps": 3}
    plain = edit(velocity, x1, **options)
    shared = edit(velocity, x1, **options, features=Features(steps=1))
    assert shared.bank_missed == count
    assert shared.bank_bytes > 0
    assert shared.nfe == plain.nfe == 8
    assert not torch.equal(shared.x, plain.x)
    small = edit(velocity, x1, **options, features=Features(steps=1, store="int8"))
    assert small.bank_bytes < 0.4 * shared.bank_bytes
    assert 0 < small.bank_error < 0.02


def test_refusals():
    velocity, x1, source, target = made("Flux")
    options = {"source": source, "target": target, "method": "rf-edit", "steps": 2}
    with pytest.raises(ValueError, match="must have attention blocks that exchange"):
        edit(velocity, x1, **options, features=Features(steps=1))
    with pytest.raises(ValueError, match="names like 'nowhere'; got none"):
        allow_exchange(velocity, "nowhere")
    with pytest.raises(ValueError, match="must have attention layers with processors; got none"):
        allow_exchange(DiT((1, 4, 4), width=8, depth=1, heads=1))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        allow_exchange("pipe")
    allow_exchange(velocity)
    with sdpa(), pytest.raises(ValueError, match=r"the end of rf\.integrations\.sdpa\(\)"):
        edit(velocity, x1, **options, features=Features(steps=1))
    set_attention(velocity, "int8")
    with pytest.raises(ValueError, match="attention must be torch's scaled_dot_product_attention"):
        edit(velocity, x1, **options, features=Features(steps=1))
    assert edit(velocity, x1, **options).nfe == 8
