"""Runs of a second, and a network of the user's own that notes what it was given."""

import torch
from torch import nn

from rfkernels import models
from rfkernels.data import toy
from rfkernels.training import TrainConfig

SMALL = {
    "steps": 12,
    "batch_size": 16,
    "warmup_steps": 3,
    "learning_rate": 1e-2,
    "log_every": 4,
    "checkpoint_every": 6,
}


def small(**options):
    return TrainConfig(**{**SMALL, **options})


def network(classes=None, **options):
    return models.build(
        "mlp", seed=1, sample_shape=(2,), width=16, depth=1, num_classes=classes, **options
    )


def data(size=60):
    return toy("moons", size=size)


def weights(module):
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])


class Recorder(nn.Module):
    """A conditional network that remembers the labels it was given."""

    null_label = 5

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.labels, self.times = [], []

    def forward(self, x, t, y):
        if self.training:
            self.labels.append(y)
            self.times.append(t)
        return self.inner(x)
