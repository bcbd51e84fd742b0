"""Shared by the tests of recipes for diffusion networks: a source of fixed samples, a small network with its
NumPy twin, a schedule in NumPy, and a mixture's exact denoiser."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import rfkernels as rf
from rfkernels import models
from rfkernels.flow import GaussianMixtureFlow, LinearBetas
from rfkernels.models import NoisePrediction
from rfkernels.training import TrainConfig
from rfkernels.training.sources import ALL, Draw

BATCH, SEED, SHAPE = 64, 5, (2, 3)
TRAIN = TrainConfig(steps=100, batch_size=BATCH, seed=SEED)
MIXTURE = GaussianMixtureFlow([[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]], 0.25)


class Table:
    """A source of fixed pairs, float64, whose rows are the positions; y is the row's parity."""

    def __init__(self, labels=False, shape=SHAPE):
        self.sample_shape, self.device, self.labels = shape, torch.device("cpu"), labels
        self.x1 = 2.0 + rf.randn(10 * BATCH, *shape, seed=1, dtype=torch.float64)
        self.x0 = rf.randn(10 * BATCH, *shape, seed=2, dtype=torch.float64)

    def draw(self, start, count, part=ALL):
        rows = torch.arange(start, start + count)[part]
        condition = {"y": rows % 2} if self.labels else {}
        return Draw(self.x1[rows], self.x0[rows], None, None, condition)

    def held_out(self):
        return self.draw(0, 8)

    def numpy(self, step):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        return self.x0[rows].numpy(), self.x1[rows].numpy(), (np.arange(BATCH) % 2).astype(float)


class Tiny(nn.Module):
    """a x + b tanh(x) + c time + d (1 + y), without the last term for no y; `numpy` is the same."""

    def __init__(self, a, b, c, d=0.2, unit=1000.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([a, b, c, d], dtype=torch.float64))
        self.unit = unit

    def forward(self, x, t, y=None):
        a, b, c, d = self.weight
        extra = c * t.to(x.dtype) / self.unit + (0.0 if y is None else d * (1 + y))
        return a * x + b * torch.tanh(x) + extra.reshape(-1, *[1] * (x.dim() - 1))

    def numpy(self, x, t, y=None):
        a, b, c, d = self.weight.detach().numpy()
        extra = c * t / self.unit + (0.0 if y is None else d * (1 + y))
        return a * x + b * np.tanh(x) + column(extra)


def guided(network, x, t, y, g):
    """A Tiny's answer under guidance, in NumPy."""
    if g is None:
        return network.numpy(x, t, y)
    free = network.numpy(x, t)
    return free + g * (network.numpy(x, t, y) - free)


def uniforms(purpose, step):
    drawn = rf.rand(BATCH, seed=rf.derive_seed(SEED, purpose), offset=step)
    return drawn.double().numpy()


def column(values):
    return np.asarray(values).reshape(-1, *[1] * len(SHAPE))


def linear_schedule():
    """(alpha, sigma) of the linear betas 0.00085 .. 0.012."""
    bar = np.cumprod(1 - np.linspace(0.00085, 0.012, 1000))
    return np.sqrt(bar), np.sqrt(1 - bar)


def ddim(x, a, b, noise):
    """The DDIM step of a noise prediction."""
    alpha, sigma = linear_schedule()
    data = (x - column(sigma[a]) * noise) / column(alpha[a])
    return column(alpha[b]) * data + column(sigma[b]) * noise


def huber(difference, h=1e-3):
    return np.mean(np.sqrt(difference**2 + h**2) - h)


class ExactNoise(nn.Module):
    """The exact noise estimate of a mixture, at states of a schedule."""

    def __init__(self, schedule, flow):
        super().__init__()
        self.schedule, self.flow = schedule, flow
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, k):
        alpha, sigma = self.schedule.coefficients(k)
        t = (alpha / (alpha + sigma)).to(x.dtype)
        state = x / (alpha + sigma).to(x.dtype)[:, None]
        return state - t[:, None] * self.flow(state, t)


def exact_teacher(flow=MIXTURE):
    model = NoisePrediction(ExactNoise(LinearBetas(), flow), LinearBetas())
    model.network.sample_shape = (2,)
    return model


class IndexMLP(nn.Module):
    """The library's MLP, asked at an index."""

    def __init__(self):
        super().__init__()
        self.inner = models.build("mlp", seed=1, sample_shape=(2,), width=64, depth=2)
        self.sample_shape = (2,)

    def forward(self, x, k):
        return self.inner(x, k / 1000)


def student(prediction="v"):
    return NoisePrediction(IndexMLP(), LinearBetas(), prediction)
