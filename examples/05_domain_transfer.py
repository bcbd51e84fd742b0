"""Domain transfer: one network turns upright digits into slanted ones, and, walked backwards, slanted ones upright.

    python examples/05_domain_transfer.py            # about half a minute on two cores
    python examples/05_domain_transfer.py --quick    # a few seconds, for a look

The two sets share no digit, so nobody tells the network which goes with which. Its loss looks through the features of a
classifier that was trained to tell the sets apart. Writes domain_transfer.png when matplotlib is installed.
"""

import argparse
import math

import torch
from torch import nn

import rfkernels as rf
from rfkernels import data, metrics, models, training
from rfkernels.training.recipes import FeatureWeighted


def slanted(x, degrees=30.0):
    """The images turned about their centre, black outside."""
    a = math.radians(degrees)
    turn = torch.tensor([[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0]])
    grid = nn.functional.affine_grid(turn.expand(len(x), 2, 3), x.shape, align_corners=False)
    return nn.functional.grid_sample(x + 1, grid, align_corners=False) - 1


def domain_features(upright, tilted, steps):
    """The convolutional features of a classifier: upright or slanted?"""
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 16, 3, padding=1), nn.SiLU()
    )
    classifier = nn.Sequential(features, nn.Flatten(), nn.Linear(16 * 64, 1), nn.Flatten(0))
    x = torch.cat([upright, tilted])
    y = torch.cat([torch.zeros(len(upright)), torch.ones(len(tilted))])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    for step in range(steps):
        rows = (rf.rand(128, seed=0, offset=step) * len(x)).long()
        loss = nn.functional.binary_cross_entropy_with_logits(classifier(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return features


def plot(rows, file):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 1.1 * len(rows)), layout="constrained")
    for panel, (title, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        panel.imshow(torch.cat(list(images[:16, 0]), dim=1), cmap="gray", vmin=-1, vmax=1)
        panel.set_title(title, fontsize=8, loc="left")
        panel.set_axis_off()
    figure.savefig(file, dpi=120)
    print(f"wrote {file}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small budget, for a test")
    quick = parser.parse_args().quick

    train, test = data.split(data.digits(), 0.2, seed=0)
    half = train.size // 2
    upright, tilted = train.x[:half], slanted(train.x[half:])

    features = domain_features(upright, tilted, 40 if quick else 150)
    recipe = FeatureWeighted(
        features=features,
        train=training.TrainConfig(
            steps=80 if quick else 800,
            batch_size=128,
            learning_rate=1e-3,
            ema_decay=0.99,
            coupling="ot",  # within a batch, near digits are paired with near ones
        ),
    )
    network = models.build("mlp", seed=0, sample_shape=(1, 8, 8), width=256, depth=3)
    result = training.train_recipe(recipe, network, tilted, x0=upright, progress=True)

    # Digits that neither the flow nor the classifier has seen, in both directions and back again.
    steps = 20 if quick else 100
    there = rf.sample(result.ema, test.x, steps=steps)
    home = rf.invert(result.ema, slanted(test.x), steps=steps)
    returned = rf.invert(result.ema, there, steps=steps)
    print("pixel Frechet distance (lower is nearer)")
    for name, before, after, real, goal in (
        ("upright -> slanted", test.x, there, slanted(test.x), tilted),
        ("slanted -> upright", slanted(test.x), home, test.x, upright),
    ):
        cells = [float(metrics.frechet_distance(x, goal)) for x in (before, after, real)]
        print(f"{name}: before {cells[0]:.2f}, after {cells[1]:.2f}, real ones {cells[2]:.2f}")
    miss = (returned - test.x).square().mean().sqrt()
    moved = (there - test.x).square().mean().sqrt()
    print(
        f"there and back: {miss:.3f} away from the start, after a way of {moved:.3f} (rms a pixel)"
    )
    rows = {
        "upright digits": test.x,
        "slanted by the network": there,
        "and back": returned,
        "slanted digits": slanted(test.x),
        "set upright by the same network": home,
    }
    plot(rows, "domain_transfer.png")


if __name__ == "__main__":
    main()
