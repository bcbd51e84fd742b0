"""Digits by label in one step, without guidance at sampling (InstaFlow): guided reflow, then distillation.

    python examples/07_one_step_labels.py            # under two minutes on two cores
    python examples/07_one_step_labels.py --quick    # a few seconds, for a look

Writes one_step_labels.png when Pillow is installed: one row per digit, four images of each network.
"""

import argparse

import torch

import rfkernels as rf
from rfkernels import data, metrics, models, training
from rfkernels.metrics import PerceptualDistance
from rfkernels.training.recipes import InstaFlowDistill


def save_picture(x, columns, file):
    """Images (N, 1, 8, 8) in [-1, 1], `columns` in a row, enlarged six times."""
    try:
        from PIL import Image
    except ImportError:
        return
    rows = x.reshape(-1, columns, 8, 8).transpose(1, 2).reshape(-1, columns * 8)
    pixels = ((rows.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    picture.resize((picture.width * 6, picture.height * 6), Image.Resampling.NEAREST).save(file)
    print(f"wrote {file}")


def right_label(x, labels, digits):
    """Share of images whose nearest training image has the label that was asked for."""
    nearest = torch.cdist(x.flatten(1), digits.x.flatten(1)).argmin(1)
    return (digits.labels[nearest] == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small budget, for a test")
    quick = parser.parse_args().quick
    scale = 10 if quick else 1
    digits = data.digits()

    network = models.build(
        "mlp", seed=0, sample_shape=digits.sample_shape, width=256, num_classes=10
    )
    loop = {"batch_size": 128, "learning_rate": 1e-3}
    config = training.TrainConfig(steps=2000 // scale, label_dropout=0.1, **loop)
    first = training.train_flow(network, digits, config, progress=True)

    # Guidance costs two evaluations a step. It is paid once, while the pairs are made, and learnt.
    config = training.ReflowConfig(
        pairs=8000 // scale,
        pair_steps=10,
        guidance_scale=2.0,
        train=training.TrainConfig(steps=1500 // scale, label_dropout=0.1, **loop),
    )
    second = training.reflow(first, config, progress=True)

    # One step to the ends of the 2-RF: first the pixels' squares, then a perceptual distance. Latents would be
    # decoded before it, by `decoder=`.
    recipe = InstaFlowDistill(
        pairs=8000 // scale,
        pair_steps=4,
        guidance_scale=1.5,
        distance=PerceptualDistance("random-conv"),
        train=training.TrainConfig(steps=1000 // scale, **loop),
    )
    student = training.train_recipe(recipe, teacher=second, progress=True)

    # The mean image of a digit has the right label too, so the labels count only beside the Frechet distance.
    # That is to the digits themselves: guidance, here applied twice, moves samples away from the rarer ones.
    labels = torch.arange(10).repeat_interleave(100)
    noise = rf.randn(1000, 1, 8, 8, seed=1)
    print(f"{'':24}{'right label':>12}{'pixel Frechet distance':>25}")
    rows = []
    for name, result, steps in (
        ("1-RF, 20 steps", first, 20),
        ("1-RF, 1 step", first, 1),
        ("guided 2-RF, 1 step", second, 1),
        ("distilled, 1 step", student, 1),
    ):
        x = rf.sample(result.ema, noise, steps=steps, condition={"y": labels})
        distance = metrics.frechet_distance(x, digits.x)
        print(f"{name:24}{right_label(x, labels, digits):12.3f}{distance:25.3f}")
        rows.append(x.reshape(10, 100, 1, 8, 8)[:, :4])
    save_picture(torch.cat(rows, dim=1).flatten(0, 1), 16, "one_step_labels.png")


if __name__ == "__main__":
    main()
