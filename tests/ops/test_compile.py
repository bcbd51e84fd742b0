"""torch.compile on the public functions: whole graphs that hold the kernels, dynamic shapes, no needless compilation."""

from __future__ import annotations

import pytest
import torch
from cells import results, same_bits
from tensors import normal
from tolerances import BF16

import rfkernels as rf


def counted():
    """A backend for torch.compile that runs AOT graphs eagerly, and the list of graphs it was given."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs = []

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return aot_eager(graph, inputs, **options)

    return backend, graphs


PUBLIC = {
    "euler": lambda x, v, s: rf.euler_step(x, v, s),
    "guided": lambda x, v, s: rf.euler_step(x, v, 0.1, v_uncond=x, guidance_scale=s),
    "cast": lambda x, v, s: rf.euler_step(x, v, s, cast=torch.bfloat16),
    "taylor": lambda x, v, s: rf.taylor_step(x, (v, x, v), s),
    "linear": lambda x, v, s: rf.linear_step(
        x, (v, x), (s, 0.5), noise_scale=0.3, seed=11, offset=2
    ),
    "interpolate": lambda x, v, s: rf.interpolate(x, s, x0=v, path="vp"),
    "drawn": lambda x, v, s: rf.interpolate(x, s, seed=11, return_x0=True),
    "loss": lambda x, v, s: rf.flow_loss(x, v, kind="pseudo_huber"),
    "drawn loss": lambda x, v, s: rf.flow_loss(x, x1=v, seed=4, reduction="none"),
    "randn": lambda x, v, s: x + rf.randn(x.shape, seed=3),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_compile_whole_graph_dynamic_shapes(name):
    torch._dynamo.reset()
    backend, graphs = counted()
    compiled = torch.compile(PUBLIC[name], fullgraph=True, dynamic=True, backend=backend)
    first = 0
    for rows, columns in ((3, 7), (5, 300), (4, 11)):
        x, v, s = (
            normal(rows, columns),
            normal(rows, columns, key=1),
            torch.linspace(0.1, 0.8, rows),
        )
        for a, e in zip(results(compiled(x, v, s)), results(PUBLIC[name](x, v, s)), strict=True):
            same_bits(a, e, name)
        first = first or len(graphs)  # dynamo may start over once within the first call
    assert len(graphs) == first, f"{len(graphs)} compilations for three shapes"
    targets = {str(node.target) for node in graphs[-1].graph.nodes}
    assert any(target.startswith("rfkernels.") for target in targets), (
        "the graph has the formula instead of the kernel"
    )


def test_compile_records_gradients():
    torch._dynamo.reset()

    def loss(p, x1, t):
        point = rf.interpolate(x1, t, seed=3)
        return rf.flow_loss(rf.euler_step(point.xt, p, 0.5), point.target)

    x1, t = normal(4, 33), torch.rand(4)
    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")):
        p, data = normal(4, 33, key=1).requires_grad_(), x1.clone().requires_grad_()
        function(p, data, t).backward()
        grads.append((p.grad, data.grad))
    same_bits(grads[1][0], grads[0][0])
    same_bits(grads[1][1], grads[0][1])


def test_compile_with_out_and_cast_tensors():
    torch._dynamo.reset()

    def in_place(x, v, copy):
        rf.euler_step(x, v, 0.25, out=x, cast=copy)
        return x * 2

    x, v, copy = normal(3, 40), normal(3, 40, key=1), torch.empty(3, 40, dtype=BF16)
    expected = x + 0.25 * v
    compiled = torch.compile(in_place, fullgraph=True, dynamic=True, backend="aot_eager")
    same_bits(compiled(x, v, copy), 2 * expected)
    same_bits(x, expected)
    same_bits(copy, expected.to(BF16))


def test_new_numbers_do_not_compile_anew():
    torch._dynamo.reset()
    backend, graphs = counted()

    def step(x, v, dt, seed, offset):
        return rf.linear_step(x, (v,), (dt,), noise_scale=dt, seed=seed, offset=offset)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    x, v, first = normal(3, 40), normal(3, 40, key=1), 0
    for i in range(6):
        dt, seed, offset = torch.tensor(0.1 * i), torch.tensor(i * 2**40), torch.tensor([i, 2, 3])
        same_bits(compiled(x, v, dt, seed, offset), step(x, v, dt, seed, offset))
        first = first or len(graphs)
    assert len(graphs) == first, "tensor arguments must not specialise"
    torch._dynamo.reset()
    graphs.clear()
    for i in range(6):
        same_bits(compiled(x, v, 0.3, 5 + i, 7 * i + 2), step(x, v, 0.3, 5 + i, 7 * i + 2))
        if i == 1:  # ints may become symbols at the second value
            first = len(graphs)
    assert len(graphs) == first, f"{len(graphs)} compilations for six seeds"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_inductor():
    torch._dynamo.reset()

    def step(x, v, s):
        return rf.euler_step(x.sin(), v, s).cos()

    x, v, s = normal(3, 40), normal(3, 40, key=1), torch.rand(3)
    try:
        found = torch.compile(step, fullgraph=True, dynamic=True)(x, v, s)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"inductor has no working C++ compiler here: {str(error).splitlines()[0]}")
    torch.testing.assert_close(found, step(x, v, s))
