"""The perceptual distance: its formula written out, zero for equal images only, gradients, use as a loss."""

import numpy as np
import pytest
import torch

from rfkernels.data import digits
from rfkernels.metrics import PerceptualDistance
from rfkernels.metrics.features import Vgg16
from rfkernels.training import DistillConfig, TrainConfig, distill, train_flow


def images(count=4, channels=1, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, side, side, generator=generator) * 2 - 1


def test_the_formula_written_out():
    def network(x):
        return [torch.cat((x, x**2), 1), torch.cat((x, 1 + x), 1)]

    a, b = images(seed=1), images(seed=2)
    expected = np.zeros(4)
    for weight, layer in zip((1.0, 3.0), (0, 1), strict=True):
        fa, fb = (network(x)[layer].double().numpy() for x in (a, b))
        fa, fb = (f / np.sqrt((f**2).sum(1, keepdims=True) + 1e-10) for f in (fa, fb))
        expected += weight * ((fa - fb) ** 2).sum(1).mean((1, 2))
    ours = PerceptualDistance(network, weights=(1, 3))(a, b)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5)
    even = PerceptualDistance(network)(a, b)
    torch.testing.assert_close(even, PerceptualDistance(network, weights=(0.5, 0.5))(a, b))


def test_lpips_from_files(tmp_path):
    """VGG-16 and weights of channels, with LPIPS's names, scaling and poolings, written out."""
    generator = torch.Generator().manual_seed(0)
    vgg = Vgg16()
    for parameter in vgg.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan) ** 0.5)
    widths = (64, 128, 256, 512, 512)
    lin = {
        f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator)
        for i, w in enumerate(widths)
    }
    torch.save({**vgg.state_dict(), "classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    torch.save(lin, tmp_path / "lin.pth")
    a, b = images(2, 3, 20, seed=1), images(2, 3, 20, seed=2)
    expected = torch.zeros(2)
    places = [0, 2, "M", 5, 7, "M", 10, 12, 14, "M", 17, 19, 21, "M", 24, 26, 28, "M"]
    shift, scale = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ([-0.03, -0.088, -0.188], [0.458, 0.448, 0.45])
    )
    x, layer = [(image - shift) / scale for image in (a, b)], 0
    for place in places:
        if place != "M":
            conv = vgg.features[str(place)]
            x = [torch.relu(torch.conv2d(y, conv.weight, conv.bias, padding=1)) for y in x]
            continue
        unit = [y / (y.square().sum(1, keepdim=True).sqrt() + 1e-10) for y in x]
        squares = (unit[0] - unit[1]).square()
        expected += (lin[f"lin{layer}.model.1.weight"] * squares).sum(1).mean((1, 2))
        layer += 1
        if layer < 5:
            x = [torch.max_pool2d(y, 2) for y in x]
    made = {"network": f"vgg16:{tmp_path / 'vgg.pth'}", "weights": tmp_path / "lin.pth"}
    found = PerceptualDistance(**made, pooling="max")(a, b)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert not torch.allclose(PerceptualDistance(**made)(a, b), expected, rtol=1e-2)
    with pytest.raises(ValueError, match="at least 16 pixels a side; got 8 by 8"):
        PerceptualDistance(**made)(images(), images())
    with pytest.raises(ValueError, match="another network's weights"):
        PerceptualDistance(f"vgg16:{tmp_path / 'lin.pth'}")
    with pytest.raises(ValueError, match="must hold lin0"):
        PerceptualDistance("random-conv", weights=tmp_path / "vgg.pth")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pooling", ["average", "max"])
def test_zero_for_equal_images_only(channels, pooling):
    distance = PerceptualDistance("random-conv", pooling=pooling)
    x = images(6, channels)
    assert distance(x, x).tolist() == [0.0] * 6
    y = x.clone()
    places = ((0, 0), (7, 7), (3, 4), (0, 7), (5, 0), (2, 2))
    for i, (row, column) in enumerate(places):
        y[i, i % channels, row, column] += 0.01
    assert (distance(x, y) > 0).all()
    torch.testing.assert_close(distance(x, y), distance(y, x))
    # Constant images differ too, black from white and grey from grey.
    flat = (
        torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 0.01]).view(-1, 1, 1, 1).expand(-1, channels, 8, 8)
    )
    for i in range(6):
        others = distance(flat, flat[i].expand_as(flat))
        assert others[i] == 0
        assert (others > 0).sum() == 5


def test_it_grows_with_the_noise():
    distance = PerceptualDistance("random-conv")
    x = digits().x[:50]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    values = [distance(x + s * noise, x).mean().item() for s in (0.02, 0.1, 0.4)]
    assert values[0] < values[1] < values[2]


def test_gradients_are_finite_zero_at_equality_and_right_elsewhere():
    distance = PerceptualDistance("random-conv")
    x = images(3)
    at = x.clone().requires_grad_()
    distance(at, x).sum().backward()
    assert torch.count_nonzero(at.grad) == 0
    y = images(3, seed=5).requires_grad_()
    value = distance(y, x).sum()
    value.backward()
    direction = y.grad / y.grad.norm()
    step = 1e-3
    with torch.no_grad():
        ahead = distance(y + step * direction, x).double().sum()
        behind = distance(y - step * direction, x).double().sum()
    slope = ((ahead - behind) / (2 * step)).item()
    assert slope == pytest.approx(y.grad.norm().item(), rel=1e-2)
    assert all(p.grad is None for p in distance.parameters())


def test_dead_units_leave_the_gradient_finite():
    distance = PerceptualDistance(lambda x: torch.relu(x))
    black = -torch.ones(2, 3, 4, 4)
    x = black.clone().requires_grad_()
    value = distance(x, black)
    value.sum().backward()
    assert value.tolist() == [0, 0]
    assert torch.count_nonzero(x.grad) == 0


def test_descending_it_finds_the_image():
    distance = PerceptualDistance("random-conv")
    target = digits().x[:2]
    x = torch.zeros_like(target).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        distance(x, target).sum().backward()
        optimizer.step()
    assert (x.detach() - target).square().mean() < 0.03 * target.square().mean()


def test_every_sample_by_itself_and_any_precision():
    distance = PerceptualDistance("random-conv", size=16)
    a, b = images(4, 3, 12, seed=1), images(4, 3, 12, seed=2)
    together = distance(a, b)
    alone = torch.cat([distance(x[None], y[None]) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(together, alone)
    assert distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(distance(a.double(), b.double()), together)


def test_efficientnet_ranks_what_people_rank():
    """A photograph shifted by a pixel is nearer than one with noise of the same mean square error."""
    pytest.importorskip("efficientnet_lite_pytorch")
    from sklearn.datasets import load_sample_images

    photograph = torch.from_numpy(load_sample_images().images[0][100:260, 200:360].copy())
    x = photograph.permute(2, 0, 1)[None].float() / 127.5 - 1
    shifted = torch.roll(x, 1, 3)
    error = (shifted - x).square().mean()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * error.sqrt()
    distance = PerceptualDistance("efficientnet-lite0", size=160)
    assert distance(shifted, x).item() < 0.5 * distance(x + noise, x).item()


def test_as_the_loss_of_a_student():
    from rfkernels import models

    network = models.build("mlp", seed=0, sample_shape=(1, 8, 8), width=16, depth=1)
    teacher = train_flow(network, digits(), TrainConfig(steps=2, batch_size=8))
    config = DistillConfig(
        k=1, distance=PerceptualDistance("random-conv"), pairs=16, pair_steps=1,
        train=TrainConfig(steps=3, batch_size=8, log_every=1),
    )  # fmt: skip
    student = distill(teacher, config)
    losses = [line["loss"] for line in student.metrics if "loss" in line]
    assert losses
    assert all(0 < loss < 10 for loss in losses)


def test_errors_name_the_argument():
    x = images()
    for arguments, said in (
        ({"network": "vgg"}, "network: must be efficientnet-lite0"),
        ({"network": "random-conv", "pooling": "sum"}, "pooling must be average or max"),
        (
            {"network": torch.relu, "pooling": "max"},
            "pooling: is an option of random-conv and vgg16",
        ),
        ({"network": "random-conv", "weights": (1, -1)}, "weights: must be numbers >= 0"),
        ({"network": "random-conv", "size": 0}, "size: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            PerceptualDistance(**arguments)
    with pytest.raises(TypeError, match="a name or a callable; got int"):
        PerceptualDistance(3)
    with pytest.raises(ValueError, match=r"target: must have the shape of prediction"):
        PerceptualDistance("random-conv")(x, x[:1])
    with pytest.raises(ValueError, match="weights: must be one a layer, 3; got 2"):
        PerceptualDistance("random-conv", weights=(1, 1))(x, x)
    with pytest.raises(ValueError, match=r"network: must give tensors \(B, C, H, W\)"):
        PerceptualDistance(lambda x: x.flatten(1))(x, x)
