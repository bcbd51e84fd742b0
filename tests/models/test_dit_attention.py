"""DiT(attention=...): the kernel in every block, one set of parameters, configurations of before."""

import pytest
import torch

import rfkernels as rf
from rfkernels import models

OPTIONS = {"sample_shape": (1, 8, 8), "width": 32, "depth": 3, "heads": 2}


@pytest.fixture(autouse=True)
def fresh_counters():
    """The counters are the process's: whatever ran before has left its calls in them."""
    rf.attention_stats(reset=True)


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([0.2, 0.9])


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def calls(precision):
    stats = rf.attention_stats(reset=True)
    assert not stats.handovers
    return sum(n for (asked, _, _), n in stats.calls.items() if asked == precision)


@pytest.mark.parametrize("attention", ["int8", "int8_u8", "int8_bf16", "bf16"])
def test_every_block_takes_the_kernel(attention):
    exact = randomised(models.build("dit", **OPTIONS)).eval()
    model = models.build("dit", **OPTIONS, attention=attention).eval()
    model.load_state_dict(exact.state_dict())
    with torch.no_grad(), rf.use_backend("reference"):
        expected = exact(*inputs())
        assert calls(attention) == 0
        found = model(*inputs())
        model(*inputs())
        assert calls(attention) == 3 * 2
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.02


def test_trains_with_a_quantized_forward_pass():
    model = randomised(models.build("dit", **OPTIONS, attention="int8")).train()
    with rf.use_backend("reference"):
        model(*inputs()).square().mean().backward()
        assert calls("int8") == 3
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    exact = models.build("dit", **OPTIONS)
    exact.load_state_dict(model.state_dict())
    exact(*inputs()).square().mean().backward()
    mine, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, exact))
    assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.999


def test_dropout_cannot_be_trained_through_it():
    model = models.build("dit", **OPTIONS, attention="int8", dropout=0.1)
    with pytest.raises(
        ValueError, match=r"dropout: must be 0 to train with attention='int8'; got 0\.1"
    ):
        model(*inputs())
    with torch.no_grad():
        model.eval()(*inputs())  # no dropout is applied here


def test_the_configuration_round_trips_and_old_ones_load():
    model = randomised(models.build("dit", **OPTIONS, attention="bf16"))
    described = models.describe(model)
    assert described["options"]["attention"] == "bf16"
    assert models.describe(models.build(described["name"], **described["options"])) == described
    del described["options"]["attention"]  # as written before the option existed
    old = models.build(described["name"], **described["options"])
    assert old.options["attention"] == "sdpa"
    assert old.state_dict().keys() == model.state_dict().keys()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"attention: must be one of sdpa, int8, .*; got 'flash'"):
        models.build("dit", **OPTIONS, attention="flash")
