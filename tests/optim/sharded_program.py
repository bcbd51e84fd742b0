"""What `test_sharded.py` starts by torchrun in two processes: parameters sharded along dimension 0 against whole ones.

FSDP2 (`fully_shard`) over a small network, and DTensors of all placements, by gloo on the CPU. Each process compares its
sharded parameters, gathered, with a copy of the network that it trains by itself on the whole batch.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import rfkernels as rf
from rfkernels.training.processes import leave_processes


def orthogonal(g: torch.Tensor, w: torch.Tensor, kind: str) -> torch.Tensor:
    rows = (w.shape[0], -1) if kind == "rows" else (1, -1)
    a, b = g.reshape(rows), w.reshape(rows)
    return (a - b * ((a * b).sum(1, keepdim=True) / (b * b).sum(1, keepdim=True))).reshape(w.shape)


def make(name: str, params, **more):
    options = {"AdamP": {"lr": 0.02}, "SGDP": {"lr": 0.1, "momentum": 0.9}}[name]
    return getattr(rf.optim, name)(params, weight_decay=0.1, **options, **more)


def compare(got: DTensor, expected: torch.Tensor, bound: float, what: object) -> None:
    torch.testing.assert_close(
        got.full_tensor(), expected, rtol=bound, atol=bound, msg=lambda m: f"{what}: {m}"
    )


def by_placement(mesh) -> None:
    """Every test outcome: all rows pass, one row of the other shard does not, the layer passes, nothing does."""
    for name in ("AdamP", "SGDP"):
        for kind in ("rows", "layer", "any", "one bad row"):
            generator = torch.Generator().manual_seed(5)
            draw = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64)  # noqa: B023, E731
            # Five rows: three and two. One row: the second process has none.
            whole = [draw(5, 40), draw(1, 30), draw(7), draw(4, 3, 3, 3)]
            mean = [draw(*w.shape) for w in whole]
            plain = [nn.Parameter(w.clone()) for w in whole]
            placements = [[Shard(0)], [Shard(0)], [Shard(0)], [Replicate()]]

            def shared(tensors, placements=placements):
                pairs = zip(tensors, placements, strict=True)
                return [distribute_tensor(t.clone(), mesh, place) for t, place in pairs]

            split, means = [nn.Parameter(w) for w in shared(whole)], shared(mean)
            one = make(name, plain, ema=mean, ema_decay=0.9)
            two = make(name, split, ema=means, ema_decay=0.9)
            for _ in range(3):
                for p, s, place in zip(plain, split, placements, strict=True):
                    g = draw(*p.shape)
                    w = p.detach()
                    if p.ndim > 1 and kind != "any":
                        g = orthogonal(g, w, "layer" if kind == "layer" else "rows")
                        if kind == "one bad row":
                            g[-1] = w[-1]
                    p.grad = g
                    s.grad = distribute_tensor(g.clone(), mesh, place)
                one.step()
                two.step()
            for s, p, a, e in zip(split, plain, means, mean, strict=True):
                compare(s, p.detach(), 1e-12, (name, kind))
                compare(a, e, 1e-12, (name, kind, "average"))
            assert two.state[split[0]][two._moments[0]].placements == split[0].placements


def by_fsdp(mesh) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 3, bias=False))
    split = copy.deepcopy(plain)
    for layer in split:
        fully_shard(layer, mesh=mesh)
    fully_shard(split, mesh=mesh)
    one, two = make("AdamP", plain.parameters()), make("AdamP", split.parameters())
    rank = dist.get_rank()
    for _ in range(5):
        x, y = torch.randn(8, 6), torch.randn(8, 3)
        for model, optimizer, part in ((plain, one, slice(None)), (split, two, slice(4 * rank, 4 * rank + 4))):  # fmt: skip
            optimizer.zero_grad()
            (model(x[part]) - y[part]).square().mean().backward()
            optimizer.step()
    for s, p in zip(split.parameters(), plain.parameters(), strict=True):
        compare(s, p.detach(), 1e-5, "fsdp")


def refused(mesh) -> None:
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    p.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    q = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    q.grad = distribute_tensor(torch.ones(4, 4), mesh, [Replicate()])
    for parameter, text in ((p, "along dimension 0"), (q, "placements of its parameter")):
        try:
            make("AdamP", [parameter]).step()
        except ValueError as error:
            assert text in str(error), error  # noqa: PT017
        else:
            raise AssertionError(f"not refused: {text}")


def main() -> None:
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    by_placement(mesh)
    by_fsdp(mesh)
    refused(mesh)
    if dist.get_rank() == 0:
        print("sharded: passed")
    leave_processes()


if __name__ == "__main__":
    main()
