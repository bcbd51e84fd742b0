"""A source of fixed float64 pairs and a network that exists in torch and in NumPy, for comparing an
objective with its formulas written out."""

import numpy as np
import torch
from torch import nn

import rfkernels as rf
from rfkernels.training.sources import ALL, Draw


class Table:
    """Position p of a run is row p; x0 is given."""

    def __init__(self, shape, count):
        self.sample_shape, self.device = shape, torch.device("cpu")
        self.x1 = 2.0 + rf.randn(count, *shape, seed=1, dtype=torch.float64)
        self.x0 = rf.randn(count, *shape, seed=2, dtype=torch.float64)

    def draw(self, start, count, part=ALL):
        rows = torch.arange(start, start + count)[part]
        return Draw(self.x1[rows], self.x0[rows], None, None, {})

    def held_out(self):
        return self.draw(0, 8)


class Tiny(nn.Module):
    """a x + b tanh(x) + c t, in the precision of x; `numpy` is the same function."""

    def __init__(self, a=0.3, b=-1.0, c=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([a, b, c], dtype=torch.float64))

    def forward(self, x, t):
        a, b, c = self.weight
        return a * x + b * torch.tanh(x) + c * t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))

    def numpy(self, x, t):
        a, b, c = self.weight.detach().numpy()
        return a * x + b * np.tanh(x) + c * column(t, x)


def column(values, x):
    """(B,) values against (B, ...) samples."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def uniform_middles(seed, purpose, step, count):
    """The uniforms that times are made of: the middles of 2^24 cells, float64."""
    drawn = rf.rand(count, seed=rf.derive_seed(seed, purpose), offset=step)
    return drawn.double().numpy() + 2.0**-25
