"""Handwritten digits by label: a conditional flow, drawn with classifier-free guidance.

    python examples/02_digits.py            # under a minute on two cores
    python examples/02_digits.py --quick    # a few seconds, for a look

Writes digits.png when Pillow is installed: one row per digit, drawn at three guidance scales.
"""

import argparse

import torch

import rfkernels as rf
from rfkernels import data, models, training


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small budget, for a test")
    quick = parser.parse_args().quick

    digits = data.digits()  # 1797 images (1, 8, 8) in [-1, 1] with labels 0-9
    network = models.build(
        "mlp", seed=0, sample_shape=digits.sample_shape, width=384, num_classes=10
    )
    config = training.TrainConfig(
        steps=200 if quick else 2000,
        batch_size=128,
        learning_rate=1e-3,
        label_dropout=0.1,  # a tenth of the labels is hidden, so that the network also learns "any digit"
    )
    result = training.train_flow(network, digits, config, progress=True)
    print(f"held-out loss {result.metrics[-1]['holdout_loss']:.4f}")

    # Four noises for every digit, the same ones at every scale.
    labels = torch.arange(10).repeat_interleave(4)
    noise = rf.randn(4, 1, 8, 8, seed=1).repeat(10, 1, 1, 1)
    drawn = [
        rf.sample(
            result.ema,
            noise,
            steps=16,
            solver="heun",
            guidance_scale=scale,
            condition={"y": labels},
            uncondition={},  # no label
        )
        for scale in (1.0, 2.0, 4.0)
    ]
    # How far the samples of a class are from the mean of that class: guidance draws them in.
    means = torch.stack([digits.x[digits.labels == k].mean(0) for k in range(10)])
    for scale, x in zip((1, 2, 4), drawn, strict=True):
        print(
            f"guidance {scale}: distance to the class mean {(x - means[labels]).flatten(1).norm(dim=1).mean():.2f}"
        )
    rows = torch.cat([x.reshape(10, 4, 1, 8, 8) for x in drawn], dim=1)
    save_picture(rows.flatten(0, 1), 12, "digits.png")


if __name__ == "__main__":
    main()
