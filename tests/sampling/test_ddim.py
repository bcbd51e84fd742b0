"""DDIM against diffusers' scheduler, and the property of Rectified Diffusion: with noise and data that
belong together every number of steps gives the same sample."""

import pytest
import torch
from torch import nn

import rfkernels as rf
from rfkernels.flow import LinearBetas, ScaledLinearBetas, get_schedule
from rfkernels.models import NoisePrediction
from rfkernels.sampling.ddim import DDIMGrid, ddim


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 2)).double()

    def forward(self, x, k, label=0.0):
        extra = torch.stack([k / 1000, torch.full_like(k, label)], 1)
        return self.layers(torch.cat([x, extra], 1).double()).to(x.dtype)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x1"])
@pytest.mark.parametrize("end", ["data", "first-index"])
def test_diffusers_takes_the_same_steps(prediction, end):
    from diffusers import DDIMScheduler

    kind = {"epsilon": "epsilon", "v": "v_prediction", "x1": "sample"}[prediction]
    model = NoisePrediction(Network(), ScaledLinearBetas(), prediction)
    noise = rf.randn(8, 2, seed=1, dtype=torch.float64)
    for steps in (
        1,
        2,
        4,
        25,
    ):  # where the indices are evenly spaced, as their step takes them to be
        theirs = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=end == "data",
            timestep_spacing="trailing",
            prediction_type=kind,
        )
        theirs.set_timesteps(steps)
        assert theirs.timesteps.tolist() == DDIMGrid("scaled-linear").indices(steps)
        x = noise
        with torch.no_grad():
            for k in theirs.timesteps:
                answer = model.network(x, torch.full((8,), float(k), dtype=torch.float64))
                x = theirs.step(answer, k, x).prev_sample
        found = ddim(model, noise, steps=steps, end=end)
        # Their table is float32.
        torch.testing.assert_close(found, x, rtol=2e-5, atol=2e-5)
        narrow = ddim(model, noise.float(), steps=steps, end=end)
        torch.testing.assert_close(narrow, x.float(), rtol=1e-4, atol=1e-4)


def test_guidance_is_that_of_the_answers():
    model = NoisePrediction(Network(), "linear")
    noise = rf.randn(4, 2, seed=1, dtype=torch.float64)
    found = ddim(
        model, noise, steps=2, guidance_scale=3.0, condition={"label": 1.0}, uncondition={}
    )
    schedule, x = LinearBetas(), noise
    for k, after in ((999, 499), (499, None)):
        answers = [
            model.network(x, torch.full((4,), float(k), dtype=torch.float64), label=label)
            for label in (1.0, 0.0)
        ]
        noise_estimate = answers[1] + 3.0 * (answers[0] - answers[1])
        data = (x - schedule.sigma[k] * noise_estimate) / schedule.alpha[k]
        x = data
        if after is not None:
            x = schedule.alpha[after] * data + schedule.sigma[after] * noise_estimate
    torch.testing.assert_close(found, x.detach(), rtol=1e-11, atol=1e-11)


class Matched(nn.Module):
    """The noise that each row's data belong to, wherever the state is: a first-order flow."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, x, k):
        return self.noise


@pytest.mark.parametrize("name", ["linear", "scaled-linear", "sub-vp"])
def test_matched_noise_and_data_need_one_step(name):
    schedule = get_schedule(name)
    noise, data = (rf.randn(64, 3, seed=s, dtype=torch.float64) for s in (1, 2))
    model = NoisePrediction(Matched(noise), schedule)
    start = schedule.alpha[-1] * data + schedule.sigma[-1] * noise
    ends = {n: ddim(model, start, steps=n) for n in (1, 2, 4, 25)}
    # Rounding is amplified by the noise ratio of the first index: 1e-13 for "linear".
    most = 4e-15 * float(schedule.noise_ratio[-1])
    for end in ends.values():
        assert (end - ends[1]).abs().max() < most
        assert (end - data).abs().max() < 10 * most


def test_the_path_of_matched_pairs_is_straight_in_the_noise_ratio_only():
    """x_k bends away from its chord by 0.4 rms; y = x / alpha has one slope against sigma / alpha."""
    schedule = LinearBetas()
    noise, data = (rf.randn(4000, seed=s, dtype=torch.float64) for s in (1, 2))
    model = NoisePrediction(Matched(noise[:, None]), schedule)
    start = schedule.alpha[-1] * data + schedule.sigma[-1] * noise
    info = ddim(model, start[:, None], steps=40, return_info=True, end="first-index")
    visited = torch.tensor([*DDIMGrid(schedule).indices(40), 0])
    total = (schedule.alpha + schedule.sigma)[visited]
    x = info.trajectory[..., 0] * total[:, None]
    torch.testing.assert_close(x[-1], info.x[:, 0])
    alpha, ratio = schedule.alpha[visited], schedule.noise_ratio[visited]
    share = (visited - visited[0]) / (visited[-1] - visited[0])
    bend = (x - torch.lerp(x[0], x[-1], share.double()[:, None])).square().mean(1).sqrt()
    assert 0.3 < bend.max() < 0.5
    slopes = (x / alpha[:, None]).diff(dim=0) / ratio.diff()[:, None]
    assert (slopes - noise).abs().max() < 1e-11


def test_times_and_errors():
    grid = DDIMGrid("linear", "first-index")
    times = grid.times(4, 0.0, 1.0)
    assert times == sorted(times)
    assert times == LinearBetas().linear_times[[999, 749, 499, 249, 0]].tolist()
    assert DDIMGrid("linear").times(1, 0.0, 1.0) == [times[0], 1.0]
    noise = torch.zeros(2, 2)
    model = NoisePrediction(Network(), LinearBetas(steps=10))
    assert ddim(model, noise, steps=10).shape == (2, 2)
    for call, message in (
        (lambda: DDIMGrid(end="last"), "DDIMGrid: end must be one of data, first-index"),
        (lambda: ddim(model, noise, steps=11), r"DDIMGrid: steps must be in \[1, 10\]; got 11"),
        (lambda: ddim(model, noise, steps=10, end="first-index"), r"steps must be in \[1, 9\]"),
        (lambda: ddim(lambda x, t: x, noise, steps=2), "schedule must be given for a function"),
        (lambda: grid.times(None, 0.0, 1.0), "steps must be given"),
        (lambda: grid.times(4, 0.0, 0.5), "must be left out; got 0.0 and 0.5"),
        (lambda: ddim(model, noise, steps=4, t_start=0.3), "must be left out; got 0.3 and 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
