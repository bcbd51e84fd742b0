"""dopri5 against SciPy, torchdiffeq and closed forms; independence of samples; failures."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import RK45, solve_ivp

from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.sampling import Dopri5, dopri5, invert, sample

RING = GaussianMixtureFlow.ring()


def decay(x, t, rate):
    """Stiffer for larger rates; plain arithmetic only, so equal in every batch."""
    shape = (-1, *[1] * (x.ndim - 1))
    t, rate = t.reshape(shape), rate.reshape(shape)
    return rate * (t * t - x) + x * (t - 0.5) / (1 + x * x)


def problem(count=7, size=(5,), dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn(count, *size, generator=generator, dtype=dtype)
    rate = torch.tensor([0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0] * (count // 7 + 1), dtype=dtype)
    return x0, rate[:count].clone()


def scipy_solution(x0, rtol, atol, **options):
    return solve_ivp(
        lambda t, x: RING(torch.from_numpy(x)[None], float(t))[0].numpy(),
        (0, 1),
        x0.numpy(),
        method="RK45",
        rtol=rtol,
        atol=atol,
        **options,
    )


def test_the_coefficients_are_those_of_scipy():
    kept = [0, 2, 3, 4, 5]
    for ours, theirs in zip(dopri5._STAGES, RK45.A[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs[: len(ours)])
    np.testing.assert_array_equal([*dopri5._NODES, 1], RK45.C[1:])
    np.testing.assert_array_equal(dopri5._RESULT, RK45.B[kept])
    np.testing.assert_allclose(dopri5._ERROR, -RK45.E[[*kept, 6]], rtol=1e-15)
    np.testing.assert_array_equal(dopri5._DENSE, RK45.P[[*kept, 6]])


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_scipy_takes_the_same_path(tolerance):
    x0 = torch.from_numpy(np.random.default_rng(1).standard_normal((6, 2)))
    info = sample(
        RING, x0, steps=8, solver="dopri5", rtol=tolerance, atol=tolerance, return_info=True
    )
    exact = sample(RING, x0, steps=1000, solver="rk4")
    evaluations = []
    for row in range(6):
        theirs = scipy_solution(x0[row], tolerance, tolerance, t_eval=np.linspace(0, 1, 9))
        evaluations.append(theirs.nfev)
        gap = np.abs(theirs.y.T - info.trajectory[:, row].numpy()).max()
        assert gap < 100 * tolerance
    # One attempt more or less where an error is close to the limit.
    assert info.nfe.double().mean().item() == pytest.approx(np.mean(evaluations), rel=0.1)
    assert (info.x - exact).abs().max() < 200 * tolerance


def test_torchdiffeq_agrees_at_a_fine_tolerance():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    x0 = torch.from_numpy(np.random.default_rng(2).standard_normal((16, 2)))
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    theirs = torchdiffeq.odeint(
        lambda t, x: RING(x, t), x0, times, method="dopri5", rtol=1e-10, atol=1e-10
    )
    info = sample(RING, x0, steps=4, solver=Dopri5(rtol=1e-10, atol=1e-10), return_info=True)
    torch.testing.assert_close(info.trajectory, theirs, rtol=0, atol=1e-7)


def test_the_error_follows_the_tolerance_and_evaluations_grow():
    x0 = torch.from_numpy(np.random.default_rng(0).standard_normal((32, 2)))
    exact = sample(RING, x0, steps=1000, solver="rk4")
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        info = sample(RING, x0, solver="dopri5", rtol=tolerance, atol=tolerance, return_info=True)
        errors.append((info.x - exact).square().mean().sqrt().item())
        evaluations.append(info.nfe.double().mean().item())
    assert all(b < a / 10 for a, b in pairwise(errors))
    assert all(b > a for a, b in pairwise(evaluations))
    # Fifth order: 100 times the accuracy for 100^(1/5) = 2.5 times the work.
    assert evaluations[-1] / evaluations[-2] < 3


@pytest.mark.parametrize("size", [(1,), (5,), (3, 4, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("direction", [sample, invert])
def test_a_sample_does_not_depend_on_its_neighbours(size, dtype, direction):
    x0, rate = problem(size=size, dtype=dtype)
    if direction is invert:
        rate = rate / 20
    options = {"solver": "dopri5", "steps": 5, "rtol": 1e-4, "atol": 1e-4, "return_info": True}
    together = direction(decay, x0, condition={"rate": rate}, **options)
    assert together.nfe.max() > together.nfe.min()  # the batch did shrink on the way
    for row in range(len(x0)):
        one = slice(row, row + 1)
        alone = direction(decay, x0[one], condition={"rate": rate[one]}, **options)
        assert torch.equal(alone.x, together.x[one])
        assert torch.equal(alone.trajectory, together.trajectory[:, one])
        assert torch.equal(alone.nfe, together.nfe[one])


def test_keeping_finished_samples_changes_nothing():
    x0, rate = problem(count=20)

    def captured(x, t):
        return decay(x, t, rate)

    dropped = sample(decay, x0, solver="dopri5", condition={"rate": rate}, return_info=True)
    kept = sample(captured, x0, solver=Dopri5(finished="keep"), return_info=True)
    assert torch.equal(dropped.x, kept.x)
    assert torch.equal(dropped.nfe, kept.nfe)
    with pytest.raises((RuntimeError, ValueError)):  # never silently wrong
        sample(captured, x0, solver="dopri5")


def test_tensors_that_all_samples_share_stay_whole():
    """Also where the batch shrinks to their number of rows on its way."""
    x0, rate = problem(count=7)

    def pushed(x, t, rate, table):
        return decay(x, t, rate) + table.sum()

    for rows in range(1, 7):
        condition = {"rate": rate, "table": torch.ones(rows, dtype=torch.float64)}
        dropped = sample(pushed, x0, solver="dopri5", condition=condition)
        kept = sample(pushed, x0, solver=Dopri5(finished="keep"), condition=condition)
        assert torch.equal(dropped, kept)


@pytest.mark.parametrize("guided", [False, True])
def test_every_sample_is_evaluated_as_often_as_reported(guided):
    x0, rate = problem(count=14)
    made = torch.zeros(14, dtype=torch.int64)

    def counted(x, t, rate, index, note):
        assert len(x) == len(t) == len(rate) == len(index)
        assert note == "as it is"
        made[index] += 1
        return decay(x, t, rate)

    condition = {"rate": rate, "index": torch.arange(14), "note": "as it is"}
    guidance = {}
    if guided:
        scale = torch.linspace(0, 2, 14, dtype=torch.float64)
        guidance = {"guidance_scale": scale, "uncondition": {**condition, "rate": rate / 2}}
    info = sample(counted, x0, solver="dopri5", condition=condition, return_info=True, **guidance)
    assert info.nfe.dtype == torch.int64
    assert torch.equal(info.nfe, made)
    # 2 to begin, then 6 an attempt; twice that with guidance
    factor = 2 if guided else 1
    assert torch.equal((info.nfe // factor - 2) % 6, torch.zeros_like(info.nfe))


def test_guidance_per_sample_is_that_of_each_alone():
    x0, rate = problem()
    scale = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0], dtype=torch.float64)
    options = {"solver": "dopri5", "return_info": True}
    together = sample(
        decay, x0, guidance_scale=scale, condition={"rate": rate}, uncondition={"rate": rate / 2},
        **options,
    )  # fmt: skip
    for row, g in enumerate(scale.tolist()):
        one = slice(row, row + 1)
        mixed = rate[one] / 2 + g * (rate[one] - rate[one] / 2)
        alone = sample(decay, x0[one], condition={"rate": mixed}, **options)
        torch.testing.assert_close(together.x[one], alone.x, rtol=0, atol=1e-10)


def test_the_reported_times_do_not_change_the_solution():
    x0, rate = problem()
    condition = {"rate": rate}
    plain = sample(decay, x0, solver="dopri5", condition=condition, return_info=True)
    dense = sample(decay, x0, solver="dopri5", steps=97, condition=condition, return_info=True)
    assert torch.equal(plain.x, dense.x)
    assert torch.equal(plain.nfe, dense.nfe)
    assert torch.equal(plain.trajectory[0], x0)
    assert torch.equal(plain.trajectory[1], plain.x)
    assert torch.equal(sample(decay, x0, solver="dopri5", condition=condition), plain.x)
    fine = sample(decay, x0, steps=97 * 20, solver="rk4", condition=condition, return_info=True)
    torch.testing.assert_close(dense.trajectory, fine.trajectory[::20], rtol=0, atol=5e-4)


def test_a_not_a_number_stays_in_its_row():
    x0, rate = problem()

    def broken(x, t, rate):
        value = decay(x, t, rate)
        return torch.where((rate[:, None] == 3.0) & (t[:, None] > 0.6), math.nan, value)

    info = sample(broken, x0, solver="dopri5", steps=4, condition={"rate": rate}, return_info=True)
    healthy = sample(
        decay, x0, solver="dopri5", steps=4, condition={"rate": rate}, return_info=True
    )
    others = torch.arange(7) != 3
    assert info.x[3].isnan().all()
    assert info.trajectory[:3, 3].isfinite().all()  # up to t = 0.5, the field breaks at 0.6
    assert info.trajectory[3:, 3].isnan().all()
    assert torch.equal(info.trajectory[:, others], healthy.trajectory[:, others])
    assert torch.equal(info.nfe[others], healthy.nfe[others])


def test_a_not_a_number_in_the_source():
    x0, rate = problem()
    x0[2, 1] = math.nan
    x0[4, 0] = math.inf
    result = sample(decay, x0, solver="dopri5", condition={"rate": rate})
    assert result[[2, 4]].isnan().all()
    assert result[[0, 1, 3, 5, 6]].isfinite().all()


def test_a_singular_field_is_an_error_that_says_where():
    def singular(x, t):
        return 1 / (0.5 - t[:, None]).abs() ** 1.5 * torch.ones_like(x)

    with pytest.raises(RuntimeError, match=r"sample 0 stuck at t = 0\.[45]"):
        sample(singular, torch.zeros(1, 2), solver="dopri5")


def test_too_many_steps_are_an_error():
    with pytest.raises(RuntimeError, match="max_steps, 3; got sample 0"):
        sample(RING, torch.randn(2, 2), solver=Dopri5(max_steps=3, rtol=1e-6))


def test_low_precision_samples_read_low_precision_inputs():
    seen = set()

    def velocity(x, t):
        seen.add((x.dtype, t.dtype))
        return 1 - x

    x0 = torch.randn(4, 8, dtype=torch.bfloat16)
    info = sample(velocity, x0, solver="dopri5", rtol=1e-2, atol=1e-2, steps=3, return_info=True)
    assert seen == {(torch.bfloat16, torch.float32)}
    assert info.x.dtype == info.trajectory.dtype == torch.bfloat16
    exact = 1 + (x0.double() - 1) * math.exp(-1)
    torch.testing.assert_close(info.x.double(), exact, rtol=0, atol=0.03)


def test_gradients_reach_the_source():
    """d x1 / d x0 of dx/dt = a x is e^a; the samples finish at different times."""
    rate = torch.tensor([0.1, 1.0, -2.0], dtype=torch.float64)
    x0 = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    x1 = sample(lambda x, t, a: a[:, None] * x, x0, solver="dopri5", condition={"a": rate})
    x1.sum().backward()
    torch.testing.assert_close(x0.grad, rate.exp()[:, None].expand(3, 2), rtol=1e-4, atol=1e-4)


def test_the_callback_sees_whole_batches_at_their_own_times():
    x0, rate = problem()
    seen = []

    def note(index, t, x):
        seen.append((index, t.clone(), x.clone()))
        t.zero_()  # a tensor of its own

    info = sample(
        decay,
        x0,
        solver="dopri5",
        condition={"rate": rate},
        callback=note,
        return_info=True,
    )
    assert [index for index, _, _ in seen] == list(range(len(seen)))
    assert all(t.shape == (7,) and x.shape == x0.shape for _, t, x in seen)
    assert all((b[1] >= a[1]).all() for a, b in pairwise(seen))
    assert torch.equal(seen[-1][1], torch.ones(7, dtype=torch.float64))
    assert torch.equal(seen[-1][2], info.x)
    assert torch.equal(info.x, sample(decay, x0, solver="dopri5", condition={"rate": rate}))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rtol": -1.0}, ValueError, "rtol must be finite and not negative"),
        ({"atol": 0.0}, ValueError, "atol must be positive"),
        ({"rtol": float("nan")}, ValueError, "rtol must be finite"),
        ({"rtol": "1e-5"}, TypeError, "rtol must be a number"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1"),
        ({"finished": "mask"}, ValueError, "'drop' or 'keep'"),
    ],
)
def test_refused_options(options, error, message):
    with pytest.raises(error, match=message):
        Dopri5(**options)


def test_tolerances_of_the_call_replace_those_of_the_solver():
    x0, rate = problem()
    options = {"condition": {"rate": rate}, "return_info": True}
    coarse = Dopri5(rtol=1e-2, atol=1e-2)
    by_call = sample(decay, x0, solver=coarse, rtol=1e-7, atol=1e-7, **options)
    by_object = sample(decay, x0, solver=Dopri5(rtol=1e-7, atol=1e-7), **options)
    assert torch.equal(by_call.x, by_object.x)
    assert (by_call.nfe > sample(decay, x0, solver=coarse, **options).nfe).all()
