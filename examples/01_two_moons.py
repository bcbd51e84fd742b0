"""Two moons: learn a flow from noise to points, straighten it, and compare what one Euler step gives.

    python examples/01_two_moons.py            # about half a minute on two cores
    python examples/01_two_moons.py --quick    # a few seconds, for a look

Writes two_moons.png when matplotlib is installed.
"""

import argparse

import rfkernels as rf
from rfkernels import data, metrics, models, training


def one_step_quality(velocity, noise, real):
    """Energy distance of one-step and of 100-step samples to real points; 0 is perfect."""
    few = rf.sample(velocity, noise, steps=1)
    many = rf.sample(velocity, noise, steps=100)
    return few, many, metrics.energy_distance(few, real), metrics.energy_distance(many, real)


def plot(columns, file):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(3 * len(columns), 3), layout="constrained")
    for panel, (title, points) in zip(
        figure.subplots(1, len(columns)), columns.items(), strict=True
    ):
        panel.scatter(points[:, 0], points[:, 1], s=2, alpha=0.5)
        panel.set(
            title=title, xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal", xticks=[], yticks=[]
        )
    figure.savefig(file, dpi=120)
    print(f"wrote {file}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small budget, for a test")
    quick = parser.parse_args().quick

    moons = data.toy("moons")  # endless: every index is a point of its own
    network = models.build("mlp", seed=0, sample_shape=(2,), width=128, depth=3)

    # 1-RF: noise and points are paired at random, so straight lines cross and the flow must bend.
    steps = 400 if quick else 2500
    config = training.TrainConfig(steps=steps, batch_size=256, learning_rate=2e-3)
    first = training.train_flow(network, moons, config, progress=True)

    # 2-RF: each noise is paired with the point that the 1-RF carries it to. These lines hardly cross.
    config = training.ReflowConfig(
        pairs=2000 if quick else 20_000,
        train=training.TrainConfig(
            steps=steps // 2, batch_size=256, learning_rate=1e-3, time_distribution="u-shaped"
        ),
    )
    second = training.reflow(first, config, progress=True)

    noise = rf.randn(2000, 2, seed=7)
    real = data.toy("moons", size=2000, seed=1).x
    columns = {"real": real}
    print(f"{'':6}{'1 step':>10}{'100 steps':>12}{'straightness':>15}")
    for name, flow in (("1-RF", first.ema), ("2-RF", second.ema)):
        few, many, at_1, at_100 = one_step_quality(flow, noise, real)
        s = metrics.straightness(flow, noise, steps=50)
        print(f"{name:6}{at_1:10.4f}{at_100:12.4f}{s:15.4f}")
        columns |= {f"{name}, 1 step": few, f"{name}, 100 steps": many}
    plot(columns, "two_moons.png")


if __name__ == "__main__":
    main()
