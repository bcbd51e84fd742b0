"""Your own network, path and loop: the kernels alone are enough to train a flow.

    python examples/04_custom_network.py            # about half a minute on two cores
    python examples/04_custom_network.py --quick    # a few seconds, for a look

Any torch.nn.Module called as velocity(x, t) works, with the ready-made loop (training.train_flow) as with this one.
"""

import argparse

import torch
from torch import nn

import rfkernels as rf
from rfkernels import data, flow, metrics


class ConvVelocity(nn.Module):
    """A small convolutional velocity field for images (B, 1, 8, 8); the time is a channel of its own."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=4),
            nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 2),
            nn.SiLU(),
            nn.ConvTranspose2d(4 * width, width, 8),
            nn.SiLU(),
        )
        self.head = nn.Conv2d(width + 4, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t[:, None, None, None].expand_as(x)
        inputs = torch.cat([x, t, torch.cos(torch.pi * t), t * x], dim=1)
        return self.head(torch.cat([self.body(inputs), inputs], dim=1))


def train(network, x, steps, path, times, seed=0):
    """One optimizer step per batch: x_t and its target from one kernel, the loss and its gradient from another."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    noise_seed, row_seed, time_seed = (
        rf.derive_seed(seed, purpose) for purpose in ("noise", "rows", "time")
    )
    for step in range(steps):
        rows = (rf.rand(128, seed=row_seed, offset=step) * len(x)).long()
        t = times.sample(128, seed=time_seed, offset=step)
        # The noise is drawn inside the kernel from (seed, offset) and never stored.
        point = rf.interpolate(x[rows], t, seed=noise_seed, offset=step, path=path)
        loss = rf.flow_loss(network(point.xt, t), point.target, kind="mse")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // 4) == 0:
            print(f"step {step + 1:5}  loss {loss.item():.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small budget, for a test")
    quick = parser.parse_args().quick
    digits = data.digits()

    torch.manual_seed(0)
    network = ConvVelocity()
    # A path of your own: x_t = alpha(t) x1 + sigma(t) x0, here a quarter circle; derivatives are found by autograd.
    path = flow.CustomPath(
        lambda t: torch.sin(torch.pi / 2 * t), lambda t: torch.cos(torch.pi / 2 * t)
    )
    train(network, digits.x, 100 if quick else 1500, path, flow.LogitNormal(mean=0.0, std=1.0))

    network.eval()
    noise = rf.randn(1000, 1, 8, 8, seed=1)
    for solver, steps in (("euler", 32), ("heun", 16), ("dopri5", None)):
        # return_info tells how many times the network was evaluated.
        info = rf.sample(network, noise, steps=steps, solver=solver, return_info=True)
        evaluations = torch.as_tensor(info.nfe, dtype=torch.float32).mean()
        distance = metrics.frechet_distance(info.x, digits.x)
        print(f"{solver:7} {evaluations:6.1f} evaluations  Frechet distance {distance:.2f}")


if __name__ == "__main__":
    main()
