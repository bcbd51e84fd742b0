"""AdamP and SGDP as optimizers: the authors' package as oracle over whole trainings, state, groups, averages."""

from __future__ import annotations

import copy
import io
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of old packages at import
    adamp = pytest.importorskip("adamp")

PAIRS = {"AdamP": (rf.optim.AdamP, adamp.AdamP), "SGDP": (rf.optim.SGDP, adamp.SGDP)}
OPTIONS = {
    "AdamP": {"lr": 0.01, "weight_decay": 0.1},
    "SGDP": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
}


def draw(*shape: int, key: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(key), dtype=torch.float64).to(
        dtype
    )


NORMS = {
    "rows": lambda w: w / w.flatten(1).norm(dim=1).reshape(-1, *(1,) * (w.ndim - 1)),
    "whole": lambda w: w / w.norm(),
    "none": lambda w: 0.1 * w,
}


class Net(nn.Module):
    """A linear layer, a convolution, a bias and a scalar, the weights behind a normalisation."""

    def __init__(self, norm: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.norm = NORMS[norm]
        self.linear = nn.Parameter(draw(3, 4, key=1, dtype=dtype))
        self.conv = nn.Parameter(draw(4, 2, 3, 3, key=2, dtype=dtype))
        self.bias = nn.Parameter(draw(3, key=3, dtype=dtype))
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.unused = nn.Parameter(draw(2, 2, key=4, dtype=dtype))

    def loss(self, step: int) -> torch.Tensor:
        dtype = self.bias.dtype
        images, target = (
            draw(5, 2, 3, 3, key=10 + step, dtype=dtype),
            draw(5, 3, key=99, dtype=dtype),
        )
        hidden = nn.functional.conv2d(images, self.norm(self.conv)).flatten(1)
        out = hidden @ self.norm(self.linear).T * self.scale + self.bias
        return (out - target).square().mean()


def train(model: Net, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [False, True])
def test_fifty_steps_follow_the_package(name, norm, nesterov, decay):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        options = OPTIONS[name] | {"nesterov": nesterov} | ({} if decay else {"weight_decay": 0})
        models, losses = [Net(norm, dtype) for _ in range(2)], []
        for model, cls in zip(models, PAIRS[name], strict=True):
            optimizer = cls(model.parameters(), **options)
            losses.append(train(model, optimizer, 50))
        assert max(losses[0][40:]) < losses[0][0]
        # float32 carries its roundings on: 50 steps, each within the bound, on a loss that contracts.
        grown = bound if dtype == torch.float64 else 50 * bound
        torch.testing.assert_close(losses[0], losses[1], rtol=grown, atol=grown)
        for a, e in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, e, rtol=grown, atol=grown)


def norm_growth(make) -> float:
    """Mean row norm after 200 steps on a cosine loss, from rows of mean norm 3.985."""
    generator = torch.Generator().manual_seed(0)
    w, target = (torch.randn(8, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    assert abs(w.norm(dim=1).mean().item() - 3.985) < 5e-4
    p = nn.Parameter(w)
    optimizer = make([p])
    for _ in range(200):
        optimizer.zero_grad()
        (1 - nn.functional.cosine_similarity(p, target, dim=1)).mean().backward()
        optimizer.step()
    return p.detach().norm(dim=1).mean().item()


def test_norms_grow_as_measured_with_the_package():
    assert abs(norm_growth(lambda p: rf.optim.AdamP(p, lr=0.05)) - 4.121) < 5e-4
    assert abs(norm_growth(lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0)) - 4.496) < 5e-4
    assert abs(norm_growth(lambda p: rf.optim.SGDP(p, lr=20, momentum=0.9)) - 5.96) < 5e-3
    assert abs(norm_growth(lambda p: torch.optim.SGD(p, lr=20, momentum=0.9)) - 22.44) < 5e-3


@pytest.mark.parametrize("name", PAIRS)
def test_groups_have_options_of_their_own(name):
    models = [Net("rows") for _ in range(2)]
    for model, cls in zip(models, PAIRS[name], strict=True):
        groups = [
            {"params": [model.linear, model.bias], "lr": 0.03, "delta": 0.5, "nesterov": True},
            {
                "params": [model.conv, model.scale, model.unused],
                "weight_decay": 0.3,
                "wd_ratio": 0.5,
            },
        ]
        train(model, cls(groups, **OPTIONS[name]), 10)
    for a, e in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_state_dict_round_trip_goes_on_to_the_bit(name):
    straight, stopped = Net("rows"), Net("rows")
    cls = PAIRS[name][0]
    optimizer = cls(straight.parameters(), **OPTIONS[name])
    train(straight, optimizer, 8)
    first = cls(stopped.parameters(), **OPTIONS[name])
    train(stopped, first, 5)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = cls(stopped.parameters(), lr=7.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(stopped, second, 3, start=5)
    for a, e in zip(stopped.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, e)
    assert set(second.state[stopped.linear]) == set(optimizer.state[straight.linear])
    assert stopped.unused not in second.state


@pytest.mark.parametrize("name", PAIRS)
def test_a_state_dict_of_the_package_is_taken(name):
    ours, theirs = Net("rows"), Net("rows")
    package = PAIRS[name][1](theirs.parameters(), **OPTIONS[name])
    train(theirs, package, 4)
    ours.load_state_dict(theirs.state_dict())
    optimizer = PAIRS[name][0](ours.parameters(), **OPTIONS[name])
    # torch.optim shares the tensors of a state dict that it loads.
    optimizer.load_state_dict(copy.deepcopy(package.state_dict()))
    for model, one in ((ours, optimizer), (theirs, package)):
        train(model, one, 4, start=4)
    for a, e in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_moments_of_bfloat16_weights_stay_in_float32():
    def once(model, optimizer, start):
        train(model, optimizer, 3, start)
        return optimizer

    model = Net("rows", torch.bfloat16)
    optimizer = once(model, rf.optim.AdamP(model.parameters(), lr=0.01), 0)
    assert optimizer.state[model.conv]["exp_avg"].dtype == torch.float32
    other = copy.deepcopy(model)
    restored = rf.optim.AdamP(other.parameters(), lr=0.01)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for entry in ("exp_avg", "exp_avg_sq"):
        loaded = restored.state[other.conv][entry]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, optimizer.state[model.conv][entry])
        assert loaded.data_ptr() != optimizer.state[model.conv][entry].data_ptr()
    once(model, optimizer, 3)
    once(other, restored, 3)
    for a, e in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", ["adamp", "sgdp"])
def test_a_run_resumes_to_the_bit_through_the_checkpoint_tensors(name):
    config = SimpleNamespace(
        learning_rate=0.02, betas=(0.9, 0.99), weight_decay=0.01, optimizer=name
    )
    straight, stopped = Net("whole", torch.float32), Net("whole", torch.float32)
    train(straight, make_optimizer(list(straight.parameters()), config), 8)
    first = make_optimizer(list(stopped.parameters()), config)
    assert type(first) is {"adamp": rf.optim.AdamP, "sgdp": rf.optim.SGDP}[name]
    assert optimizer_tensors(stopped, first) == {}
    train(stopped, first, 5)
    tensors = {k: v.clone() for k, v in optimizer_tensors(stopped, first).items()}
    assert all(isinstance(v, torch.Tensor) for v in tensors.values())
    second = make_optimizer(list(stopped.parameters()), config)
    load_optimizer(stopped, second, tensors)
    train(stopped, second, 3, start=5)
    for a, e in zip(stopped.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, e)


def test_names_of_optimizers_in_a_config():
    model = Net("none")
    config = SimpleNamespace(
        learning_rate=0.02, betas=(0.9, 0.99), weight_decay=0.01, optimizer="adamw"
    )
    assert type(make_optimizer(list(model.parameters()), config)) is torch.optim.AdamW
    with pytest.raises(
        ValueError, match="optimizer: must be one of adamw, adamp, sgdp; got 'lion'"
    ):
        rf.training.TrainConfig(optimizer="lion")


@pytest.mark.parametrize("name", PAIRS)
def test_averages_follow_the_weights(name):
    plain, averaged = Net("rows"), Net("rows")
    mean = copy.deepcopy(averaged).requires_grad_(False)
    expected = copy.deepcopy(mean)
    cls = PAIRS[name][0]
    one = cls(plain.parameters(), **OPTIONS[name])
    two = cls(averaged.parameters(), **OPTIONS[name], ema=list(mean.parameters()), ema_decay=0.9)
    for step in range(6):
        two.param_groups[0]["ema_decay"] = decay = min(0.9, (1 + step) / (10 + step))
        for model, optimizer in ((plain, one), (averaged, two)):
            train(model, optimizer, 1, start=step)
        with torch.no_grad():
            averaged.unused.add_(0.1)  # without a gradient it is averaged all the same
        for e, w in zip(expected.parameters(), plain.parameters(), strict=True):
            w = averaged.unused - 0.1 if w.shape == (2, 2) else w
            e.lerp_(w.detach(), 1.0 - decay)
    for a, e in zip(averaged.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, e) or a is averaged.unused
    for a, e in zip(mean.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_parameters_of_any_layout():
    plain, odd = Net("rows", torch.float32), Net("rows", torch.float32)
    odd.conv = nn.Parameter(odd.conv.detach().to(memory_format=torch.channels_last))
    wide = torch.zeros(3, 9)
    wide[:, 2:6] = odd.linear.detach()
    odd.linear = nn.Parameter(wide[:, 2:6])
    for model in (plain, odd):
        train(model, rf.optim.AdamP(model.parameters(), **OPTIONS["AdamP"]), 6)
    torch.testing.assert_close(odd.conv, plain.conv, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(odd.linear, plain.linear, rtol=1e-5, atol=1e-6)
    assert wide[:, :2].abs().max() == wide[:, 6:].abs().max() == 0.0


def test_learning_rate_schedules_tensors_closures_and_copies():
    floats, tensors = Net("rows"), Net("rows")
    lr = torch.tensor(0.05, dtype=torch.float64)
    one, two = (
        rf.optim.AdamP(floats.parameters(), lr=0.05),
        rf.optim.AdamP(tensors.parameters(), lr=lr),
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(one, 0.5)
    for step in range(3):
        train(floats, one, 1, start=step)
        schedule.step()

        def closure(step=step):
            two.zero_grad()
            loss = tensors.loss(step)
            loss.backward()
            return loss

        before = tensors.loss(step).item()
        assert two.step(closure).item() == before
        lr.mul_(0.5)
    for a, e in zip(tensors.parameters(), floats.parameters(), strict=True):
        assert torch.equal(a, e)
    model, optimizer = copy.deepcopy((floats, one))
    for m, o in ((floats, one), (model, optimizer)):
        train(m, o, 2, start=3)
    for a, e in zip(model.parameters(), floats.parameters(), strict=True):
        assert torch.equal(a, e)


def test_what_is_refused():
    model = Net("none")
    with pytest.raises(ValueError, match=r"betas\[0\] must be in \[0, 1\); got 1.5"):
        rf.optim.AdamP(model.parameters(), betas=(1.5, 0.9))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'lr'"):
        rf.optim.SGDP(model.parameters())
    with pytest.raises(ValueError, match="AdamP: ema must have one tensor per parameter, 5; got 1"):
        rf.optim.AdamP(model.parameters(), ema=[torch.zeros(3)])
    with pytest.raises(ValueError, match=r"AdamP: ema\[0\] must be a tensor of its own of shape"):
        rf.optim.AdamP([model.bias], ema=[model.bias])
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = rf.optim.SGDP(embedding.parameters(), 0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="SGDP: gradients must be dense; got one of layout"):
        optimizer.step()
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(TypeError, match=r"weights\[0\] must be float32"):
        rf.optim.AdamP([weight]).step()
