"""A small one-step generator of digits from a large teacher (SlimFlow): annealed reflow, then distillation.

    python examples/06_small_student.py            # under two minutes on two cores
    python examples/06_small_student.py --quick    # a few seconds, for a look

Writes small_student.png when Pillow is installed: the teacher at 20 Heun steps, then each network at one step.
"""

import argparse
import tempfile

import torch

import rfkernels as rf
from rfkernels import data, metrics, models, training
from rfkernels.training.recipes import SlimFlowDistill, SlimFlowReflow


def size(network):
    return sum(p.numel() for p in network.parameters())


def save_picture(rows, file):
    """Rows of images (N, 1, 8, 8) in [-1, 1], enlarged six times."""
    try:
        from PIL import Image
    except ImportError:
        return
    pixels = torch.cat([x.squeeze(1).permute(1, 0, 2).flatten(1) for x in rows])
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    picture.resize((picture.width * 6, picture.height * 6), Image.Resampling.NEAREST).save(file)
    print(f"wrote {file}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small budget, for a test")
    quick = parser.parse_args().quick
    scale = 10 if quick else 1
    digits = data.digits()
    noise = rf.randn(1000, 1, 8, 8, seed=1)

    teacher = models.build("mlp", seed=0, sample_shape=digits.sample_shape, width=384)
    config = training.TrainConfig(steps=2000 // scale, batch_size=128, learning_rate=1e-3)
    teacher = training.train_flow(teacher, digits, config, progress=True).ema

    with tempfile.TemporaryDirectory() as folder:
        # Both stages learn the same pairs (noise, where the teacher's flow takes it).
        pairs = training.make_pairs(
            teacher, 8000 // scale, (1, 8, 8), folder=folder, steps=10, progress=True
        )
        # The small network starts from scratch: fresh noise is mixed into the pairs and fades out, so that it
        # first learns an easy flow and then the teacher's own. Mirrored digits are no digits, so no `flip`.
        small = models.build("mlp", seed=1, sample_shape=(1, 8, 8), width=96, depth=2)
        recipe = SlimFlowReflow(
            anneal="linear",
            train=training.TrainConfig(steps=3000 // scale, batch_size=128, learning_rate=2e-3),
        )
        second = training.train_recipe(recipe, small, teacher=teacher, pairs=pairs, progress=True)
        # One step must land on the teacher's image, and also where two steps of the small flow land.
        recipe = SlimFlowDistill(
            train=training.TrainConfig(steps=1500 // scale, batch_size=128, learning_rate=1e-3)
        )
        final = training.train_recipe(recipe, teacher=second, pairs=pairs, progress=True)

    drawn = {"teacher, 20 Heun steps": rf.sample(teacher, noise, steps=20, solver="heun")}
    print(f"{'':24}{'weights':>9}{'pixel Frechet distance':>25}")
    for name, network in (
        ("teacher, 1 step", teacher),
        ("small 2-RF, 1 step", second.ema),
        ("distilled, 1 step", final.ema),
    ):
        drawn[name] = rf.sample(network, noise, steps=1)
    sizes = (size(teacher), size(teacher), size(second.ema), size(final.ema))
    for (name, x), count in zip(drawn.items(), sizes, strict=True):
        print(f"{name:24}{count:9}{metrics.frechet_distance(x, digits.x):25.3f}")
    save_picture([x[:16] for x in drawn.values()], "small_student.png")


if __name__ == "__main__":
    main()
