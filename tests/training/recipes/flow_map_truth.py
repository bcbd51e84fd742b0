"""What the tests of flow maps compare with: a tiny float64 network with its twin in NumPy, a source
of fixed samples, and the Gaussian flow whose average velocity is known exactly."""

import numpy as np
import torch
from torch import nn

import rfkernels as rf
from rfkernels.training.sources import ALL, Draw

D, CLASSES = 3, 4  # the null label is CLASSES


def _constants(*shape, seed):
    return 0.7 * rf.randn(*shape, seed=seed, dtype=torch.float64)


class TinyFlowMap(nn.Module):
    """u(x, t, h, y) = B tanh(A x + a t + b h + e_y) + c + g h x, in float64."""

    null_label = CLASSES
    names = ("A", "a", "b", "e", "B", "c", "g")

    def __init__(self, seed=0):
        super().__init__()
        shapes = ((6, D), (6,), (6,), (CLASSES + 1, 6), (D, 6), (D,), ())
        for i, (name, shape) in enumerate(zip(self.names, shapes, strict=True)):
            self.register_parameter(name, nn.Parameter(_constants(*shape, seed=100 * seed + i)))

    def forward(self, x, t, y=None, span=None):
        t = t.to(x.dtype)[:, None]
        span = torch.zeros_like(t) if span is None else span.to(x.dtype)[:, None]
        inner = x @ self.A.T + t * self.a + span * self.b
        if y is not None:
            inner = inner + self.e[y]
        return torch.tanh(inner) @ self.B.T + self.c + self.g * span * x

    def numpy(self, x, t, h, y=None):
        """The same function; complex arguments give complex values."""
        p = {name: getattr(self, name).detach().numpy() for name in self.names}
        t, h = t[:, None], h[:, None]
        inner = x @ p["A"].T + t * p["a"] + h * p["b"]
        if y is not None:
            inner = inner + p["e"][y]
        return np.tanh(inner) @ p["B"].T + p["c"] + p["g"] * h * x

    def derivative(self, x, t, h, dx, dt, dh, y=None):
        """The directional derivative by a complex step, exact to rounding."""
        step = 1e-30j
        b = np.ones(len(x))
        return self.numpy(x + step * dx, t + step * dt * b, h + step * dh * b, y).imag / 1e-30


class Table:
    """A source of fixed float64 samples; row i is position i. `labels`: with classes."""

    def __init__(self, count, labels=False, held=False):
        self.sample_shape, self.device, self._held = (D,), torch.device("cpu"), held
        self.x1 = 1.5 + rf.randn(count, D, seed=1, dtype=torch.float64)
        self.x0 = rf.randn(count, D, seed=2, dtype=torch.float64)
        self.y = torch.arange(count) % CLASSES if labels else None

    def draw(self, start, count, part=ALL):
        rows = torch.arange(start, start + count)[part]
        condition = {} if self.y is None else {"y": self.y[rows]}
        return Draw(self.x1[rows], self.x0[rows], None, None, condition)

    def held_out(self):
        return self.draw(0, 8) if self._held else None


class GaussianMap:
    """The flow from N(0, I) to N(m, c^2 I), independent, which moves every point along

        x_T = T m + (q_T / q_t) (x_t - t m),   q_t = sqrt((1 - t)^2 + t^2 c^2),

    so that its average velocity is (x_{t+h} - x_t) / h. For torch tensors of any dtype.
    """

    def __init__(self, mean=2.0, std=0.5):
        self.mean, self.std = mean, std

    def width(self, t):
        return ((1 - t) ** 2 + t**2 * self.std**2).sqrt()

    def moved(self, x, t, end):
        t, end = t.to(x.dtype)[:, None], end.to(x.dtype)[:, None]
        return end * self.mean + self.width(end) / self.width(t) * (x - t * self.mean)

    def velocity(self, x, t):
        t = t.to(x.dtype)[:, None]
        slope = (t * self.std**2 - (1 - t)) / self.width(t) ** 2
        return self.mean + slope * (x - t * self.mean)

    def average(self, x, t, span):
        """The average velocity over [t, t + span], the velocity itself where span is 0."""
        safe = torch.where(span == 0, torch.ones_like(span), span)
        average = (self.moved(x, t, t + safe) - x) / safe.to(x.dtype)[:, None]
        return torch.where((span == 0)[:, None], self.velocity(x, t), average)

    def sample(self, n, seed, dtype=torch.float64):
        """(x0, x1), (n, 1) each."""
        x0, x1 = (rf.randn(n, 1, seed=rf.derive_seed(seed, p), dtype=dtype) for p in "01")
        return x0, self.mean + self.std * x1
