"""The feature bank on a small transformer with labels: what is kept under which key, that putting it back is
exact, what it costs, and how wrong the quantized stores are."""

import copy
import math

import pytest
import torch

from rfkernels.editing import Bank, Features, FireFlowEdit, Key, RFEdit, attention_blocks, edit
from rfkernels.editing.features import TappedField
from rfkernels.editing.storage import STORES, keep
from rfkernels.models import DiT
from rfkernels.ops.random import randn
from rfkernels.sampling import FireFlow, Midpoint, Run, invert, sample
from rfkernels.sampling.field import Field

BATCH, TOKENS, HEADS, SIZE, DEPTH = 2, 16, 2, 8, 3
ONE = BATCH * TOKENS * HEADS * SIZE * 4  # bytes of V of one block and evaluation in float32
SOURCE, TARGET = {"y": torch.tensor([0, 1])}, {"y": torch.tensor([1, 0])}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = DiT((3, 8, 8), patch=2, width=16, depth=DEPTH, heads=HEADS, num_classes=2)
    for parameter in network.parameters():
        if parameter.ndim == 1 or not parameter.any():  # the gates start at zero
            torch.nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def x1():
    return randn(BATCH, 3, 8, 8, seed=1)


def run(times):
    return Run(tuple(times), False, None, lambda done: None)


def tapped(network, bank, steps, *, recording, backwards=False, condition=SOURCE):
    times = tuple(i / steps for i in range(steps + 1))
    field = Field(network, torch.float32, BATCH, condition=condition)
    tap = TappedField.of(field, bank=bank, times=times, backwards=backwards, recording=recording)
    return tap, run(times[::-1] if backwards else times)


@pytest.mark.parametrize("solver", [Midpoint(), FireFlow()])
@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("what", ["v", "qkv"])
def test_putting_back_what_the_same_run_computed_changes_no_bit(network, x1, solver, store, what):
    bank = Bank(Features(steps=5, what=what, store=store))
    expected = sample(network, x1, steps=5, solver=solver, condition=SOURCE)
    field, times = tapped(network, bank, 5, recording=True)
    assert torch.equal(solver.integrate(field, x1, times).x, expected)
    field, times = tapped(network, bank, 5, recording=False)
    assert torch.equal(solver.integrate(field, x1, times).x, expected)
    assert bank.missed == 0
    assert bank.error == 0
    # And it is put back, not left out: under another label V is the source's still.
    field, times = tapped(network, bank, 5, recording=False, condition=TARGET)
    injected = solver.integrate(field, x1, times).x
    assert not torch.equal(injected, sample(network, x1, steps=5, solver=solver, condition=TARGET))


@pytest.mark.parametrize("attention", ["sdpa", "int8"])
def test_features_put_back_by_hand(network, x1, attention):
    """Against a network whose blocks are given the kept V by a replaced projection."""
    network = copy.deepcopy(network)
    for block in network.blocks:
        block.attention = attention
    t = torch.full((BATCH,), 0.5)
    kept = {}
    for number, block in enumerate(network.blocks):
        block.exchange = lambda q, k, v, n=number: (q, k, kept.setdefault(n, v.clone()))
    network(x1, t, **SOURCE)
    for block in network.blocks:
        del block.exchange

    class Fixed(torch.nn.Module):
        def __init__(self, layer, v):
            super().__init__()
            self.layer, self.v = layer, v

        def forward(self, h):
            qk = self.layer(h)[..., : 2 * HEADS * SIZE]
            return torch.cat((qk, self.v.transpose(1, 2).flatten(2)), -1)

    by_hand = copy.deepcopy(network)
    by_hand.blocks[1].qkv = Fixed(by_hand.blocks[1].qkv, kept[1])
    bank = Bank(Features(steps=2, blocks=[1]))
    recording = TappedField.of(
        Field(network, torch.float32, BATCH, condition=SOURCE),
        bank=bank, times=(0.0, 0.5, 1.0), backwards=True, recording=True,
    )  # fmt: skip
    recording(recording.start(x1), 0.5)
    assert list(bank.kept) == [Key(0, False, False, 1, "v")]
    assert torch.equal(bank.kept[Key(0, False, False, 1, "v")].restored(), kept[1])
    injecting = TappedField.of(
        Field(network, torch.float32, BATCH, condition=TARGET), bank=bank, times=(0.0, 0.5, 1.0)
    )
    start = torch.zeros(BATCH)  # interval 0 of sampling begins at t = 0
    got = injecting(injecting.start(x1), 0.0).conditional
    torch.testing.assert_close(got, by_hand(x1, start, **TARGET), rtol=1e-5, atol=1e-6)
    assert (got - network(x1, start, **TARGET)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("method", "middles_only"), [(RFEdit(), False), (FireFlowEdit(), True), ("rf-solver", False)]
)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("blocks", [None, [2], range(1, 3)])
def test_sizes_and_what_is_missed(network, x1, method, middles_only, steps, blocks):
    features = Features(steps=steps, blocks=blocks)
    result = edit(
        network, x1, source=SOURCE, target=TARGET, method=method, steps=6, features=features
    )
    count = DEPTH if blocks is None else len(blocks)
    assert result.bank_bytes == steps * count * ONE * (1 if middles_only else 2)
    # FireFlow's first evaluation of sampling has no counterpart in inversion.
    assert result.bank_missed == (count if middles_only else 0)
    plain = edit(network, x1, source=SOURCE, target=TARGET, method=method, steps=6)
    assert result.nfe == plain.nfe
    assert not torch.equal(result.x, plain.x)
    assert all(block.exchange is None for block in network.blocks)


def test_the_keys_of_every_step(network, x1):
    """The last 2 of 4 inversion steps: intervals 1 and 0, the end that inversion comes from and the
    middle of each."""
    features = Features(steps=2, what="qv", blocks=[0, 2])
    bank = Bank(features)
    field, times = tapped(network, bank, 4, recording=True, backwards=True)
    Midpoint().integrate(field, x1, times)
    expected = [
        Key(interval, middle, False, block, name)
        for interval in (1, 0)
        for middle in (False, True)
        for block in (0, 2)
        for name in "qv"
    ]
    assert list(bank.kept) == expected
    with pytest.raises(ValueError, match="every key must be recorded once"):
        Midpoint().integrate(field, x1, times)
    assert [field.locate(t) for t in (0.25, 0.3, 0.5, 1.0)] == [
        (0, False),
        (1, True),
        (1, False),
        (3, False),
    ]
    field, _ = tapped(network, bank, 4, recording=False)
    assert [field.locate(t) for t in (0.0, 0.1, 0.25, 0.75)] == [
        (0, False),
        (0, True),
        (1, False),
        (3, False),
    ]


@pytest.mark.parametrize("method", ["rf-edit", "fireflow"])
def test_no_steps_share_nothing(network, x1, method):
    options = {"source": SOURCE, "target": TARGET, "method": method, "steps": 5}
    result = edit(network, x1, **options, features=Features(steps=0))
    plain = edit(network, x1, **options)
    assert torch.equal(result.x, plain.x)
    assert result.bank_bytes == 0
    inverted = invert(
        network, x1, solver="midpoint" if method == "rf-edit" else method, steps=5, condition=SOURCE
    )
    forward = sample(
        network, inverted, solver="midpoint" if method == "rf-edit" else method, steps=5,
        condition=TARGET,
    )  # fmt: skip
    assert torch.equal(plain.x, forward)


def test_sharing_keeps_reconstruction_and_brings_the_edit_nearer_to_it(network, x1):
    def error(target, **options):
        result = edit(
            network, x1, source=SOURCE, target=target, method="rf-edit", steps=24, **options
        )
        return (result.x - x1).square().mean().sqrt().item()

    plain, shared = error(SOURCE), error(SOURCE, features=Features(steps=8))
    edited = error(TARGET)
    assert plain < 0.02 * edited
    # Half of what is put back was computed one grid point away, hence not the plain error.
    assert shared < 0.2 * edited
    every = error(TARGET, features=Features(steps=24, what="qkv"))
    assert every < edited


def test_mix_and_add(network, x1):
    options = {"source": SOURCE, "target": TARGET, "method": "rf-edit", "steps": 4}

    def shared(**features):
        return edit(network, x1, **options, features=Features(steps=2, **features)).x

    plain = edit(network, x1, **options).x
    replaced = shared()
    assert torch.equal(shared(mode="mix", weight=0.0), plain)
    torch.testing.assert_close(shared(mode="mix", weight=1.0), replaced, rtol=1e-4, atol=1e-5)
    assert torch.equal(shared(mode="add", weight=0.0), plain)
    bank = Bank(Features(steps=1, mode="mix", weight=0.25))
    key = Key(0, False, False, 0, "v")
    bank.record(key, torch.full((2, 3), 8.0))
    assert bank.inject(key, torch.zeros(2, 3)).unique().tolist() == [2.0]
    bank = Bank(Features(steps=1, mode="add", weight=0.5))
    bank.record(key, torch.full((2, 3), 8.0))
    assert bank.inject(key, torch.ones(2, 3)).unique().tolist() == [5.0]


def test_guided_sampling_takes_the_conditional_features_in_both_calls(network, x1):
    options = {
        "source": SOURCE, "target": TARGET, "method": "rf-edit", "steps": 4, "uncondition": {},
        "target_guidance_scale": 2.0,
    }  # fmt: skip
    once = edit(network, x1, **options, features=Features(steps=2))
    assert once.bank_missed == 0
    assert once.bank_bytes == 2 * 2 * DEPTH * ONE
    both = edit(network, x1, **options, features=Features(steps=2), source_guidance_scale=1.5)
    assert both.bank_missed == 0
    assert both.bank_bytes == 2 * once.bank_bytes


@pytest.mark.parametrize(("store", "bound"), [("int8", 0.01), ("fp8", 0.04)])
def test_quantized_stores_are_small_and_say_how_wrong_they_are(network, x1, store, bound):
    options = {"source": SOURCE, "target": TARGET, "method": "rf-edit", "steps": 4}
    exact = edit(network, x1, **options, features=Features(steps=2))
    result = edit(network, x1, **options, features=Features(steps=2, store=store))
    rows = exact.bank_bytes // (4 * SIZE)
    assert result.bank_bytes == exact.bank_bytes // 4 + 4 * rows
    assert 0.001 < result.bank_error < bound
    assert exact.bank_error == 0
    difference = (result.x - exact.x).square().mean().sqrt() / exact.x.square().mean().sqrt()
    assert 0 < difference < bound


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kept_copies(store, dtype):
    tensor = randn(5, 3, 64, seed=3).to(dtype).transpose(0, 1)
    tensor[0, 0], tensor[1, 1] = 0.0, tensor[1, 1] * 1e3
    with torch.device("meta"):  # a default device, which is nobody's here
        stored = keep(tensor, store)
    before = tensor.clone()
    tensor.zero_()
    restored = stored.restored()
    assert restored.dtype == dtype
    assert restored.shape == before.shape
    if store in ("device", "host"):
        assert torch.equal(restored, before)
        assert stored.nbytes == before.numel() * before.element_size()
        return
    assert stored.nbytes == before.numel() + 4 * before.numel() // 64
    greatest = before.abs().amax(-1, keepdim=True).double()
    # Half a unit of the row's 127, or half of e4m3's last bit (1/16) and of its least number; and the dtype.
    half = (
        greatest / 127 / 2
        if store == "int8"
        else before.abs().double() / 16 + greatest / 448 / 1024
    )
    slack = half + before.abs().double() * torch.finfo(dtype).eps + greatest * 1e-6
    assert bool(((restored.double() - before.double()).abs() <= slack).all())
    assert torch.equal(restored[0, 0], torch.zeros(64, dtype=dtype))


def test_compiled_networks_share_features_too(network, x1):
    options = {"source": SOURCE, "target": TARGET, "method": "rf-edit", "steps": 3}
    expected = edit(network, x1, **options, features=Features(steps=2))
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(network), backend="eager")
    result = edit(compiled, x1, **options, features=Features(steps=2))
    torch.testing.assert_close(result.x, expected.x, rtol=1e-5, atol=1e-5)
    assert result.bank_bytes == expected.bank_bytes


def test_hooks_are_taken_away_when_the_network_fails(network, x1):
    bank = Bank(Features(steps=1))
    field, _ = tapped(network, bank, 2, recording=True)
    with pytest.raises(RuntimeError):
        field(field.start(x1[..., :5]), 0.0)
    assert all("exchange" not in vars(block) for block in network.blocks)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -1}, "steps: must be at least 0"),
        ({"steps": 1, "what": "vv"}, "what: must be some of"),
        ({"steps": 1, "what": "x"}, "what: must be some of"),
        ({"steps": 1, "what": ""}, "what: must be some of"),
        ({"steps": 1, "mode": "swap"}, "mode: must be one of"),
        ({"steps": 1, "store": "disk"}, "store: must be one of"),
        ({"steps": 1, "weight": 0.5}, "weight: is for mode"),
        ({"steps": 1, "mode": "mix", "weight": 1.5}, "weight: must be in"),
        ({"steps": 1, "blocks": [1, 1]}, "blocks: must name each block once"),
        ({"steps": 1, "blocks": [-1]}, "blocks: must be at least 0"),
        ({"steps": 1, "weight": math.nan}, "weight: must be finite"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        Features(**options)


def test_what_cannot_share(network, x1):
    options = {"source": SOURCE, "target": TARGET, "steps": 3}
    for method, features, error, words in (
        ("flowedit", Features(1), ValueError, "method 'flowedit' shares none"),
        ("rf-edit", Features(4), ValueError, "steps must be at most those of the grid, 3"),
        ("rf-edit", Features(1, blocks=[3]), ValueError, "blocks must be below 3"),
        (RFEdit("heun"), Features(1), ValueError, "need one of the solvers"),
    ):
        with pytest.raises(error, match=words):
            edit(network, x1, **options, method=method, features=features)
    with pytest.raises(TypeError, match=r"velocity must be a torch\.nn\.Module"):
        edit(lambda x, t, y: x, x1, **options, method="rf-edit", features=Features(1))
    with pytest.raises(ValueError, match="must have attention blocks"):
        attention_blocks(torch.nn.Linear(1, 1))
