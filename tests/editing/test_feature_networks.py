"""Features of networks that are not the plain case: blocks that run twice, share memory, fail, are compiled, or serve
several threads; and guidance whose two calls get the same arguments."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from rfkernels.editing import Bank, Features, Key, RFEdit, attention_blocks, edit
from rfkernels.models import DiT
from rfkernels.ops.random import randn
from rfkernels.sampling import CFGZero, Euler, sample

SOURCE, TARGET = {"y": torch.tensor([0, 1])}, {"y": torch.tensor([1, 0])}
OPTIONS = {"source": SOURCE, "target": TARGET, "method": "rf-edit", "steps": 4}


def transformer(depth=3):
    torch.manual_seed(0)
    network = DiT((3, 8, 8), patch=2, width=16, depth=depth, heads=2, num_classes=2)
    for parameter in network.parameters():
        if parameter.ndim == 1 or not parameter.any():  # the gates start at zero
            nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network():
    return transformer()


@pytest.fixture(scope="module")
def x1():
    return randn(2, 3, 8, 8, seed=1)


class Attention(nn.Module):
    """Without projections, on (B, S, D): q, k and v are one tensor, or copies, or expanded to two heads, or q is a
    parameter."""

    exchange = None

    def __init__(self, kind):
        super().__init__()
        self.kind, self.query = kind, nn.Parameter(randn(1, 1, 5, 6, seed=9))

    def forward(self, x):
        q = k = v = x[:, None]
        if self.kind == "copies":
            q, k, v = q.clone(), k.clone(), v.clone()
        elif self.kind == "expanded":
            q, k, v = (h.expand(-1, 2, -1, -1) for h in (q, k, v))
        elif self.kind == "parameter":
            q = self.query.expand(len(x), -1, -1, -1)
        if self.exchange is not None:
            q, k, v = self.exchange(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Small(nn.Module):
    """Attention layers on (B, S, D) behind linear ones; ``tokens`` are put before those of x."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.attentions = nn.ModuleList(Attention(kind) for _ in range(3))

    def forward(self, x, t, shift=0.0, tokens=0):
        h = torch.cat((x[:, :1].expand(-1, tokens, -1), x * (1 + t[:, None, None]) + shift), 1)
        for layer, attention in zip(self.layers, self.attentions, strict=True):
            h = attention(torch.tanh(layer(h)))
        return h[:, tokens:]


@pytest.mark.parametrize("what", ["v", "k", "q", "qkv"])
@pytest.mark.parametrize("mode", [{}, {"mode": "mix", "weight": 0.5}, {"mode": "add"}])
@pytest.mark.parametrize("kind", ["one", "expanded"])
def test_features_that_share_memory(what, mode, kind):
    x1, features = randn(2, 5, 6, seed=2), Features(2, what=what, **mode)
    options = {"source": {}, "target": {"shift": 0.5}, "method": "rf-edit", "steps": 4}
    expected = edit(Small("copies"), x1, **options, features=features)
    found = edit(Small(kind), x1, **options, features=features)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-5, atol=1e-6)
    plain = edit(Small("copies"), x1, **options)
    assert (expected.x - plain.x).abs().max() > 1e-3


def test_parameters_as_features_are_not_written_to():
    network, x1 = Small("parameter"), randn(2, 5, 6, seed=2)
    before = copy.deepcopy(network.state_dict())
    options = {"source": {}, "target": {"shift": 0.5}, "method": "rf-edit", "steps": 4}
    edit(network, x1, **options, features=Features(2, what="q", mode="add"))
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())


@pytest.mark.parametrize(
    ("source", "target", "uncondition"), [(1, 2, 1), (2, 1, 1), (2, 2, 3), (0, 1, 0)]
)
def test_sequences_of_other_lengths_are_refused(source, target, uncondition):
    with pytest.raises(ValueError, match=r"v of block 0 must have the shape that inversion kept"):
        edit(
            Small("copies"), randn(2, 5, 6, seed=2), source={"tokens": source},
            target={"tokens": target}, uncondition={"tokens": uncondition}, method="rf-edit",
            target_guidance_scale=2.0, steps=4, features=Features(2),
        )  # fmt: skip


def test_no_broadcasting():
    bank = Bank(Features(1))
    bank.record(Key(0, False, False, 0, "v"), torch.ones(2, 1, 1, 6))
    with pytest.raises(ValueError, match=r"kept, \(2, 1, 1, 6\); got \(2, 1, 5, 6\)"):
        bank.inject(Key(0, False, False, 0, "v"), torch.zeros(2, 1, 5, 6))


def test_blocks_that_run_several_times(x1):
    """One block in three places is three blocks of the same weights."""
    apart = transformer()
    apart.blocks = nn.ModuleList(copy.deepcopy(apart.blocks[0]) for _ in range(3))
    looped = transformer()
    looped.blocks = nn.ModuleList([looped.blocks[0]] * 3)
    assert len(attention_blocks(looped)) == 1
    expected = edit(apart, x1, **OPTIONS, features=Features(2, what="vq"))
    found = edit(looped, x1, **OPTIONS, features=Features(2, what="vq", blocks=[0]))
    assert torch.equal(found.x, expected.x)
    assert (found.bank_bytes, found.bank_missed) == (expected.bank_bytes, 0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointed_networks(network, x1, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, t, y):
            return checkpoint(self.network, x, t, y, use_reentrant=reentrant)

    expected = edit(network, x1, **OPTIONS, features=Features(3))
    assert torch.equal(edit(Checkpointed(), x1, **OPTIONS, features=Features(3)).x, expected.x)


def test_both_calls_of_guidance_may_have_the_same_arguments(network, x1):
    same = SOURCE
    options = {"source": same, "target": same, "method": "rf-edit", "steps": 4}
    result = edit(
        network, x1, **options, uncondition=same, source_guidance_scale=2.0,
        target_guidance_scale=3.0, features=Features(2),
    )  # fmt: skip
    plain = edit(network, x1, **options, features=Features(2))
    assert result.bank_bytes == 2 * plain.bank_bytes
    torch.testing.assert_close(result.x, plain.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [7, 10])  # of inversion, of sampling
def test_what_is_left_when_the_network_fails(network, x1, error, call):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.calls = network, 0

        def forward(self, x, t, y):
            self.calls += 1
            answer = self.network(x, t, y)
            if self.calls == call:
                raise error
            return answer

    failing, mine = Failing(), lambda q, k, v: (q, k, v)
    network.blocks[1].exchange = mine
    try:
        with pytest.raises(error):
            edit(failing, x1, **OPTIONS, features=Features(3))
        assert network.blocks[1].exchange is mine
    finally:
        del network.blocks[1].exchange
    assert all("exchange" not in vars(block) for block in network.blocks)
    expected = edit(network, x1, **OPTIONS, features=Features(3))
    assert torch.equal(edit(failing, x1, **OPTIONS, features=Features(3)).x, expected.x)


def test_threads_share_a_network(network, x1):
    names, wrong = ("rf-edit", "fireflow"), []
    options = {"source": SOURCE, "target": TARGET, "steps": 4, "features": Features(3)}
    expected = {name: edit(network, x1, method=name, **options) for name in names}
    plain = sample(network, x1, steps=6, condition=SOURCE)

    def edits(name):
        for _ in range(4):
            found = edit(network, x1, method=name, **options)
            if not torch.equal(found.x, expected[name].x):
                wrong.append(name)
            if found.bank_bytes != expected[name].bank_bytes:
                wrong.append(f"{name}: bytes")

    def samples():
        for _ in range(12):
            if not torch.equal(sample(network, x1, steps=6, condition=SOURCE), plain):
                wrong.append("sample")

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except Exception as error:  # it would be lost in the thread
            wrong.append(repr(error))

    works = [(edits, name) for name in names * 2] + [(samples,)]
    threads = [threading.Thread(target=guarded, args=work) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_compiled_blocks_are_compiled_once_more_not_for_every_block_step_and_edit(x1):
    network = transformer(depth=10)  # deeper than Dynamo's limit of recompilations
    expected = edit(network, x1, **OPTIONS, features=Features(3))
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = copy.deepcopy(network)
    for block in compiled.blocks:
        block.compile(backend=counter)
    sample(compiled, x1, steps=2, condition=SOURCE)
    before = counter.frame_count
    for _ in range(2):
        found = edit(compiled, x1, **OPTIONS, features=Features(3))
        assert torch.equal(found.x, expected.x)
        assert found.bank_bytes == expected.bank_bytes
    assert counter.frame_count - before == 2  # before and after the exchange
    torch.compiler.reset()


def test_blocks_that_never_run_are_refused(network, x1):
    class Unused(nn.Module):
        def __init__(self, threaded):
            super().__init__()
            self.network, self.threaded = network, threaded

        def forward(self, x, t, y):
            if not self.threaded:
                return x * 0.5
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(lambda: torch.no_grad()(self.network)(x, t, y)).result()

    for threaded in (False, True):
        with pytest.raises(ValueError, match="none of them did in the steps that share"):
            edit(Unused(threaded), x1, **OPTIONS, features=Features(2))
        assert edit(Unused(threaded), x1, **OPTIONS, features=Features(2, blocks=[])).nfe == 16
        assert edit(Unused(threaded), x1, **OPTIONS, features=Features(0)).nfe == 16
    # A rest at the start, in which the velocity is not called at all, has nothing to keep.
    rest = {"source_guidance_scale": CFGZero(2.0, zero_steps=2), "uncondition": {}}
    assert edit(network, x1, **OPTIONS, **rest, features=Features(1)).bank_missed > 0


def test_what_does_not_fit(network, x1):
    options = {**OPTIONS, "method": RFEdit(Euler(original_eps=1e-3)), "features": Features(2)}
    with pytest.raises(ValueError, match=r"need one of the solvers .*, with their defaults"):
        edit(network, x1, **options)
    with pytest.raises(TypeError, match="blocks: must be whole numbers or None; got 5"):
        Features(1, blocks=5)
    none = edit(network, x1, **OPTIONS, features=Features(2, blocks=[]))
    assert torch.equal(none.x, edit(network, x1, **OPTIONS).x)
    assert none.bank_bytes == 0
