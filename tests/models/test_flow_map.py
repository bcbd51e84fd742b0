"""Networks with flow_map=True: the span is felt, can be differentiated forward, and changes nothing
for networks without it; and every network in bfloat16."""

import importlib.util
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import rfkernels as rf
from rfkernels import models
from rfkernels.models.embeddings import TimeFeatures

IMAGE = (1, 8, 8)
NETWORKS = [
    ("mlp", {"sample_shape": IMAGE, "width": 16, "depth": 2}),
    ("dit", {"sample_shape": IMAGE, "patch": 2, "width": 16, "depth": 2, "heads": 2}),
    ("unet", {"sample_shape": IMAGE, "width": 8, "multipliers": (1, 2), "heads": 2}),
]


def randomised(model, scale=0.2):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def inputs(dtype=torch.float32):
    x = rf.randn(3, *IMAGE, seed=1).to(dtype)
    return x, torch.tensor([0.1, 0.5, 0.0]), torch.tensor([0.2, 0.4, 1.0])


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_the_span_is_felt_and_none_is_zero(name, options):
    model = randomised(models.build(name, num_classes=2, flow_map=True, **options))
    x, t, span = inputs()
    out = model(x, t, span=span)
    out.square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        assert not torch.equal(model(x, t, span=0.9 * span), out)
        assert not torch.equal(model(x, t, span=-span), out)
        assert torch.equal(model(x, t), model(x, t, span=torch.zeros(3)))
        torch.testing.assert_close(model(x[1:2], t[1:2], span=span[1:2]), out[1:2])
    with pytest.raises(ValueError, match=r"span: must have the shape of t, \(3,\); got \(1,\)"):
        model(x, t, span=span[:1])


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_networks_without_it_are_as_they_were(name, options):
    plain = models.build(name, seed=0, **options)
    mapped = models.build(name, seed=0, flow_map=True, **options)
    assert "flow_map" not in models.describe(plain)["options"]  # so that old runs resume
    own = [n for n in mapped.state_dict() if n.startswith("span.")]
    assert own
    assert [*plain.state_dict(), *own] == list(mapped.state_dict())
    for key, value in plain.state_dict().items():  # the span's weights are drawn last
        assert torch.equal(value, mapped.state_dict()[key])
    assert plain.features.frequency.max() == pytest.approx(64 * math.pi)
    assert mapped.features.frequency.max() == pytest.approx(4 * math.pi)
    described = models.describe(mapped)
    again = models.build(described["name"], **described["options"])
    again.load_state_dict(mapped.state_dict())
    x, t, span = inputs()
    with pytest.raises(ValueError, match=r"span: this \w+ was built without flow_map=True"):
        plain(x, t, span=span)


def test_a_new_flow_map_does_not_depend_on_the_span():
    model = models.build("mlp", seed=0, sample_shape=(2,), width=16, depth=1, flow_map=True)
    with torch.no_grad():
        model.leave.weight.normal_(generator=torch.Generator().manual_seed(0))
    x, t = rf.randn(3, 2, seed=1), torch.tensor([0.1, 0.5, 0.0])
    assert model(x, t).any()
    assert torch.equal(model(x, t, span=torch.ones(3)), model(x, t))


@pytest.mark.parametrize(
    ("name", "options", "attention"),
    [(*network, None) for network in NETWORKS] + [(*NETWORKS[1], a) for a in ("int8", "bf16")],
)
def test_the_forward_derivative_is_that_of_differences(name, options, attention):
    """Along (direction, 1, -1), as MeanFlow asks. A quantized forward pass has the derivative of
    exact attention, so it is compared with the differences of that."""
    exact = randomised(models.build(name, flow_map=True, **options)).double()
    x, t, span = (value.double() for value in inputs())
    direction = rf.randn(3, *IMAGE, seed=2, dtype=torch.float64)

    def at(step):
        with torch.no_grad():
            return exact(x + step * direction, t + step, span=span - step)

    expected = (8 * (at(1e-4) - at(-1e-4)) - (at(2e-4) - at(-2e-4))) / 12e-4
    model = exact
    if attention is not None:
        model = models.build(name, flow_map=True, attention=attention, **options).eval()
        model.load_state_dict(exact.float().state_dict())
        x, t, span, direction = (value.float() for value in (x, t, span, direction))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(
            lambda x, t, span: model(x, t, span=span),
            (x, t, span),
            (direction, torch.ones_like(t), -torch.ones_like(t)),
        )
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-7 if attention is None else 0.02)


@pytest.mark.parametrize("flow_map", [False, True])
@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_bfloat16(name, options, flow_map):
    model = randomised(models.build(name, num_classes=2, flow_map=flow_map, **options), 0.1)
    x, t, span = inputs()
    y = torch.tensor([0, 1, 2])
    given = {"span": span} if flow_map else {}
    with torch.no_grad():
        expected = model(x, t, y, **given)
        found = model.to(torch.bfloat16)(x.bfloat16(), t, y, **given)
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 0.03
    model(x.bfloat16(), t, y, **given).float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_frequencies_keep_their_digits():
    features, t = TimeFeatures(), rf.rand(100, seed=0)
    expected = features(t)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(features.to(dtype)(t), expected)
    assert torch.equal(features.float()(t), expected)
    assert features(t, torch.bfloat16).dtype == torch.bfloat16
    exact = torch.cat(
        [f(features.frequency.double() * t.double()[:, None]) for f in (torch.sin, torch.cos)], 1
    )
    torch.testing.assert_close(features.double()(t.double()), exact, rtol=0, atol=1e-15)


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_diffusers_unet_in_bfloat16():
    model = models.build(
        "diffusers-unet",
        sample_shape=IMAGE,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    x, t, _ = inputs()
    with torch.no_grad():
        expected = model(x, t)
        found = model.to(torch.bfloat16)(x.bfloat16(), t)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 0.05
    with pytest.raises(ValueError, match="flow_map: DiffusersUNet is a velocity"):
        models.build("diffusers-unet", sample_shape=IMAGE, flow_map=True)
