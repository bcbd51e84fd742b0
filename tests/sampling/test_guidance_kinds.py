"""Rescaled, interval-limited, CFG-Zero* and projected guidance against their texts in NumPy."""

import numpy as np
import pytest
import torch

import rfkernels as rf
from rfkernels.sampling import (
    CFGZero,
    ClassifierFree,
    Dopri5,
    Interval,
    Projected,
    Rescaled,
    Taylor,
    invert,
    sample,
)

GRID = [0.0, 0.2, 0.4, 0.5, 0.7, 0.9, 0.95]
LABEL = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
SCALES = torch.tensor([1.5, 3.0, 6.0], dtype=torch.float64)


def velocity(x, t, label):
    shaped = [-1, *[1] * (x.ndim - 1)]
    return (label.reshape(shaped) - x) * (1 + t.reshape(shaped)) + (
        3 * x * label.reshape(shaped)
    ).sin()


GIVEN = {"condition": {"label": LABEL}, "uncondition": {"label": torch.full((3,), 0.2).double()}}


@pytest.fixture
def x0():
    return rf.randn(3, 2, 4, seed=0, dtype=torch.float64)


class Text:
    """A kind of guidance as its paper writes it, sample by sample, with its own memory."""

    def __init__(self, rule, scale):
        self.rule, self.scale, self.memory = rule, np.broadcast_to(np.asarray(scale, float), 3), {}

    def __call__(self, x, t):
        c = velocity(x, t, LABEL).numpy()
        u = velocity(x, t, GIVEN["uncondition"]["label"]).numpy()
        rows = [
            self.rule(c[i], u[i], x[i].numpy(), float(t[i]), self.scale[i], self.memory, i)
            for i in range(3)
        ]
        return torch.from_numpy(np.stack(rows))


def rescaled(c, u, x, t, g, memory, i):
    w = u + g * (c - u)
    return 0.6 * w * c.std() / w.std() + 0.4 * w


def zero_star(c, u, x, t, g, memory, i):
    s = (c * u).sum() / (u * u).sum()
    return s * u + g * (c - s * u)


def zero_star_resting(c, u, x, t, g, memory, i):
    return 0 * c if t < 0.2 - 1e-9 else zero_star(c, u, x, t, g, memory, i)


def inside(c, u, x, t, g, memory, i):
    return u + g * (c - u) if 0.3 - 1e-9 <= t <= 0.7 + 1e-9 else c


def projected(momentum, threshold, parallel):
    def rule(c, u, x, t, g, memory, i):
        if t == 1:  # the limit of no past, in which nothing is limited
            unit = x / np.sqrt((x * x).sum())
            along = ((c - u) * unit).sum() * unit
            return c + (g - 1) * ((c - u - along) + parallel * along)
        m_c, m_u = x + (1 - t) * c, x + (1 - t) * u
        d = (m_c - m_u) + momentum * memory.get(i, 0.0)
        memory[i] = d
        if threshold is not None:
            d = d * min(1, threshold / np.sqrt((d * d).sum()))
        unit = m_c / np.sqrt((m_c * m_c).sum())
        along = (d * unit).sum() * unit
        d = (d - along) + parallel * along
        return (m_c + (g - 1) * d - x) / (1 - t)

    return rule


KINDS = {
    "rescaled": (lambda g: Rescaled(g, 0.6), rescaled),
    "CFG-Zero*": (lambda g: CFGZero(g), zero_star),
    "interval": (lambda g: Interval(g, 0.3, 0.7), inside),
    "interval of an object": (lambda g: Interval(ClassifierFree(g), 0.3, 0.7), inside),
    "projected": (lambda g: Projected(g), projected(0.0, None, 0.0)),
    "projected, limited": (lambda g: Projected(g, 0.3, 0.5), projected(0.0, 0.5, 0.3)),
}
MOMENTUM = (lambda g: Projected(g, 0.0, 1.0, -0.5), projected(-0.5, 1.0, 0.0))


@pytest.mark.parametrize("scale", [4.0, SCALES], ids=["one scale", "per sample"])
@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "ab3", "unipc", "fireflow"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text(kind, solver, scale, x0):
    make, rule = KINDS[kind]
    # None at t = 1, where the estimates are the state itself whatever the velocities.
    options = {"steps": 8, "solver": solver, "t_end": 0.8}
    ours = sample(velocity, x0, guidance_scale=make(scale), **GIVEN, **options)
    theirs = sample(Text(rule, scale), x0, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    plain = sample(velocity, x0, guidance_scale=scale, **GIVEN, **options)
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("solver", ["euler", "ab2", "dpm++"])
def test_momentum(solver, x0):
    make, rule = MOMENTUM
    options = {"steps": 5, "solver": solver, "t_end": 0.9}
    ours = sample(velocity, x0, guidance_scale=make(SCALES), **GIVEN, **options)
    torch.testing.assert_close(
        ours, sample(Text(rule, SCALES), x0, **options), rtol=1e-9, atol=1e-9
    )
    # A second run begins without the memory of the first.
    again = sample(velocity, x0, guidance_scale=make(SCALES), **GIVEN, **options)
    assert torch.equal(ours, again)


@pytest.mark.parametrize("solver", ["heun", "rk4", "uni-inv"])
def test_momentum_with_solvers_that_evaluate_at_the_end(solver, x0):
    """At t = 1 the past, over 1 - t, would be infinite."""
    make, rule = MOMENTUM
    ours = sample(velocity, x0, steps=5, solver=solver, guidance_scale=make(SCALES), **GIVEN)
    theirs = sample(Text(rule, SCALES), x0, steps=5, solver=solver)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert ours.abs().max() < 100


@pytest.mark.parametrize("kind", [*(k for k in KINDS if k != "interval of an object"), "a rest"])
def test_adaptive_solvers_whose_samples_have_their_own_times(kind, x0):
    make, rule = KINDS.get(kind, (lambda g: CFGZero(g, zero_until=0.2), zero_star_resting))
    guidance = make(SCALES)
    loose = kind.startswith(("interval", "a rest"))  # jumps in time
    solver = Dopri5(rtol=1e-6, atol=1e-6)
    ours = sample(velocity, x0, guidance_scale=guidance, solver=solver, t_end=0.8, **GIVEN)
    theirs = sample(Text(rule, SCALES), x0, solver=Dopri5(1e-6, 1e-6, finished="keep"), t_end=0.8)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 if loose else 1e-7)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("kind", ["rescaled", "CFG-Zero*", "projected, limited"])
def test_exact_derivatives_of_the_guided_field(kind, order, x0):
    """Against steps so small that the derivatives do not matter."""
    guidance, solver = KINDS[kind][0](SCALES), Taylor(order=order, derivative="jvp")
    options = {"guidance_scale": guidance, "t_start": 0.1, "t_end": 0.2, **GIVEN}
    fine = sample(velocity, x0, steps=200, solver="rk4", **options)
    errors = [
        (sample(velocity, x0, steps=n, solver=solver, **options) - fine).abs().max().item()
        for n in (20, 40)
    ]
    assert errors[0] / errors[1] > 0.85 * 2**order
    with pytest.raises(ValueError, match="momentum has no derivative along the flow"):
        sample(velocity, x0, steps=2, solver=solver, guidance_scale=MOMENTUM[0](2.0), **GIVEN)


def test_exact_derivatives_call_the_unconditional_network_inside_the_interval_only(x0):
    for order in (2, 3):
        solver = Taylor(order=order, derivative="jvp")
        options = {"solver": solver, "steps": 5, "t_end": 0.8, "return_info": True, **GIVEN}
        info = sample(velocity, x0, guidance_scale=Interval(3.0, 0.3, 0.5), **options)
        assert info.nfe == order * (5 + 2)  # at 0.32 and 0.48
        assert sample(velocity, x0, guidance_scale=3.0, **options).nfe == order * 10


@pytest.mark.parametrize("derivative", ["jvp", "finite"])
def test_the_end_of_an_interval_on_a_rounded_time_is_inside_for_derivatives_too(x0, derivative):
    options = {"solver": Taylor(derivative=derivative), "grid": [0.0, 0.1 + 0.2, 1.0], **GIVEN}
    x0 = x0.double()
    rounded = sample(velocity, x0, guidance_scale=Interval(3.0, 0.0, 0.3), **options)
    wide = sample(velocity, x0, guidance_scale=Interval(3.0, 0.0, 0.31), **options)
    assert torch.equal(rounded, wide)


def test_identities(x0):
    options = {"steps": 6, "t_end": 0.9, **GIVEN}
    plain = sample(velocity, x0, guidance_scale=3.0, **options)
    conditional = sample(velocity, x0, steps=6, t_end=0.9, condition=GIVEN["condition"])
    same = [Rescaled(3.0, phi=0.0), Interval(3.0, 0.0, 1.0), Projected(3.0, parallel=1.0)]
    for guidance in (*same, ClassifierFree(3.0)):
        ours = sample(velocity, x0, guidance_scale=guidance, **options)
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    for guidance in (Rescaled(1.0), CFGZero(1.0), Projected(1.0)):
        ours = sample(velocity, x0, guidance_scale=guidance, **options)
        torch.testing.assert_close(ours, conditional, rtol=1e-10, atol=1e-10)


def test_inversion_and_the_ends_stay_finite(x0):
    """At t = 1, where inversion begins, the estimates of projected guidance are the state itself."""
    for guidance in (
        Projected(2.0),
        Projected(2.0, norm_threshold=0.5),
        Rescaled(2.0),
        CFGZero(2.0),
    ):
        back = invert(velocity, x0, steps=20, solver="heun", guidance_scale=guidance, **GIVEN)
        assert back.isfinite().all()
    still = sample(lambda x, t: 0 * x, x0, steps=2, guidance_scale=Rescaled(2.0), uncondition={})
    assert torch.equal(still, x0)  # no spread to bring back


RESTED = ["euler", "midpoint", "heun", "rk4", "taylor", "ab2", "ab3", "fireflow", "uni-inv"]
RESTED += ["dpm++", "unipc", "curved-euler", Taylor(derivative="jvp")]


@pytest.mark.parametrize(
    "guidance",
    [CFGZero(SCALES, zero_steps=2), Interval(CFGZero(SCALES, zero_until=0.4), 0.0, 1.0)],
    ids=["steps", "until, in an interval"],
)
@pytest.mark.parametrize(
    ("direction", "solver"),
    [
        *((sample, solver) for solver in RESTED),
        *((invert, solver) for solver in ("heun", "ab2", "fireflow", "unipc")),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_rest_is_a_run_over_the_other_steps(direction, solver, guidance, x0):
    """Whatever the solver evaluates: at the ends of steps, in the past, ahead."""
    options = {"solver": solver, "return_info": True, **GIVEN}
    whole = direction(velocity, x0, grid=GRID, guidance_scale=guidance, **options)
    part = direction(velocity, x0, grid=GRID[2:], guidance_scale=CFGZero(SCALES), **options)
    torch.testing.assert_close(whole.x, part.x, rtol=1e-12, atol=1e-12)
    assert whole.nfe == part.nfe
    resting = whole.trajectory[:3] if direction is sample else whole.trajectory[-3:]
    assert torch.equal(resting, resting[:1].expand_as(resting))
    seen = []
    direction(
        velocity, x0, grid=GRID, solver=solver, guidance_scale=guidance, **GIVEN,
        callback=lambda index, t, x: seen.append((index, t[0].item(), x)),
    )  # fmt: skip
    times = GRID[1:] if direction is sample else GRID[-2::-1]
    assert [(index, t) for index, t, _ in seen] == list(enumerate(times))
    assert torch.equal(seen[-1][2], whole.x)


@pytest.mark.parametrize("solver", ["euler", "fireflow"])
def test_a_rest_of_the_whole_run_returns_a_tensor_of_its_own(solver, x0):
    info = sample(
        velocity, x0, steps=3, solver=solver, guidance_scale=CFGZero(2.0, zero_until=1.0),
        return_info=True, **GIVEN,
    )  # fmt: skip
    assert torch.equal(info.x, x0)
    assert info.nfe == 0
    info.x.zero_()
    assert not torch.equal(info.x, x0)


def test_a_rest_moves_nothing_and_calls_nothing(x0):
    calls = []

    def counting(x, t, label):
        calls.append(float(t[0]))
        return velocity(x, t, label)

    info = sample(
        counting, x0, steps=5, guidance_scale=CFGZero(2.0, zero_steps=2), return_info=True, **GIVEN
    )
    assert torch.equal(info.trajectory[2], x0)
    assert not torch.equal(info.trajectory[3], x0)
    assert info.nfe == len(calls) == 6
    assert min(calls) == pytest.approx(0.4)


@pytest.mark.parametrize("solver", ["euler", Dopri5(1e-11, 1e-11)], ids=str)
def test_the_ends_of_an_interval_are_in_it_and_its_scale_is_exact(solver, x0):
    """0.1 + 0.8 / 4 is above 0.3, and 0.1 + 0.8 * 3 / 4 above 0.7; 2.3 is no float32 number."""
    if solver == "euler":
        inside = []

        def listening(x, t, label):
            if label is GIVEN["uncondition"]["label"]:
                inside.append(round(float(t[0]), 12))
            return velocity(x, t, label)

        options = {"steps": 8, "t_start": 0.1, "t_end": 0.9, **GIVEN}
        sample(listening, x0, guidance_scale=Interval(3.0, 0.3, 0.7), **options)
        assert inside == [0.3, 0.4, 0.5, 0.6, 0.7]
        assert options["t_start"] + 0.8 * 0.25 > 0.3
    options = {"steps": 4, "solver": solver, "t_end": 0.5, **GIVEN}
    ours = sample(velocity, x0, guidance_scale=Interval(2.3, 0.0, 1.0), **options)
    plain = sample(velocity, x0, guidance_scale=2.3, **options)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-11)


def test_the_number_one_skips_the_unconditional_call_in_objects_too(x0):
    for guidance in (ClassifierFree(1.0), ClassifierFree(1), Interval(1.0, 0.2, 0.8)):
        info = sample(velocity, x0, steps=5, guidance_scale=guidance, return_info=True, **GIVEN)
        assert info.nfe == 5
        assert torch.equal(info.x, sample(velocity, x0, steps=5, condition=GIVEN["condition"]))
    given = {"condition": GIVEN["condition"], "guidance_scale": ClassifierFree(1.0)}
    sample(velocity, x0, steps=5, **given)  # as with the number, nothing else is needed
    one = sample(
        velocity,
        x0,
        steps=5,
        guidance_scale=ClassifierFree(torch.ones(3)),
        return_info=True,
        **GIVEN,
    )
    assert one.nfe == 10  # a tensor is not read


def test_large_scales_of_velocities_that_are_alike(x0):
    """std(w) is not lost to cancellation: in float32, as exact as the velocities' difference is."""

    def alike(x, t, shift):
        return x + shift * x.flip(-1)

    given = {"condition": {"shift": 2.0**-10}, "uncondition": {"shift": 0.0}}
    options = {"steps": 1, "guidance_scale": Rescaled(1000.0, phi=1.0), **given}
    double = sample(alike, x0, **options)
    single = sample(alike, x0.float(), **options)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-3)


def test_negative_prompts_are_the_uncondition(x0):
    negative = {"label": torch.full((3,), -2.0).double()}
    ours = sample(
        velocity,
        x0,
        steps=3,
        guidance_scale=2.0,
        condition=GIVEN["condition"],
        uncondition=negative,
    )

    def mixed(x, t):
        u = velocity(x, t, negative["label"])
        return u + 2.0 * (velocity(x, t, LABEL) - u)

    torch.testing.assert_close(ours, sample(mixed, x0, steps=3), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "guidance", [Rescaled(SCALES), CFGZero(SCALES), Projected(SCALES, 0.2, 1.0)], ids=str
)
def test_gradients(guidance, x0):
    scale, x = SCALES.clone().requires_grad_(), x0.clone().requires_grad_()

    def run(x, scale):
        kind = guidance.per_sample(lambda _: scale)
        return sample(velocity, x, steps=2, solver="heun", t_end=0.7, guidance_scale=kind, **GIVEN)

    assert torch.autograd.gradcheck(run, (x, scale))


@pytest.mark.parametrize(
    "guidance", [Rescaled(3.0), CFGZero(3.0), Projected(3.0, 0.2, 1.0)], ids=str
)
@pytest.mark.parametrize(("c", "u"), [(1.0, 1.0), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_gradients_where_a_norm_is_zero(guidance, c, u, x0):
    """As for a network at initialisation, or one that the condition does not reach."""
    x = x0.clone().requires_grad_()
    given = {"condition": {"gain": c}, "uncondition": {"gain": u}, "guidance_scale": guidance}
    sample(lambda x, t, gain: -gain * x, x, steps=2, **given).sum().backward()
    assert x.grad.isfinite().all()
    if c == u:
        torch.testing.assert_close(x.grad, torch.full_like(x, (1 - c / 2) ** 2))


def test_sums_that_overflow_are_not_passed_over():
    x = torch.full((1, 2), 1e20) * torch.tensor([1.0, -1.0])
    given = {"condition": {"gain": 1.0}, "uncondition": {"gain": 0.5}}
    found = sample(lambda x, t, gain: gain * x, x, steps=1, guidance_scale=Rescaled(3.0), **given)
    assert found.isnan().all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rescaled("3"), TypeError, "Rescaled: scale must be a number; got str"),
        (lambda: Rescaled(np.ones(3)), TypeError, "scale must be a number; got ndarray"),
        (lambda: Rescaled(3.0, phi=2.0), ValueError, r"phi must be in \[0, 1\]; got 2.0"),
        (lambda: CFGZero(float("nan")), ValueError, "CFGZero: scale must be finite"),
        (lambda: CFGZero(2.0, zero_steps=-1), ValueError, "zero_steps must not be negative"),
        (lambda: CFGZero(2.0, zero_steps=1.0), TypeError, "zero_steps must be an integer"),
        (lambda: Projected(2.0, norm_threshold=0.0), ValueError, "must be positive or None; got 0"),
        (lambda: Interval(2.0, 0.5, 0.2), ValueError, "0 <= start < end <= 1; got 0.5 and 0.2"),
        (lambda: Interval("2", 0.1, 0.2), TypeError, "scale must be a number; got str"),
        (lambda: Interval(2.0, "0", 0.2), TypeError, "Interval: start must be a number; got str"),
        (lambda: CFGZero(2.0, zero_until="0"), TypeError, "zero_until must be a number; got str"),
        (lambda: CFGZero(2.0, zero_until=1.5), ValueError, r"zero_until must be in \[0, 1\]"),
        # Per sample is the scale alone.
        (lambda: Rescaled(2.0, torch.ones(3)), TypeError, "phi must be a number; got Tensor"),
        (lambda: Projected(2.0, momentum=torch.ones(3)), TypeError, "momentum must be a number"),
        (
            lambda: Projected(2.0, norm_threshold=torch.ones(3)),
            TypeError,
            "threshold must be a num",
        ),
    ],
)
def test_refused_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_refused_runs(x0):
    for guidance, options, message in (
        (CFGZero(2.0, zero_steps=2), {"steps": 2}, "less than the steps of the grid, 2; got 2"),
        (CFGZero(2.0, zero_steps=1), {"solver": "dopri5"}, "less than the steps of the grid, 1"),
        (Rescaled(torch.ones(4)), {"steps": 2}, r"a \(3,\) tensor; got shape \(4,\)"),
        (MOMENTUM[0](2.0), {"solver": "dopri5"}, "no momentum with the adaptive solver"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(velocity, x0, guidance_scale=guidance, **GIVEN, **options)
    with pytest.raises(ValueError, match="uncondition must be given"):
        sample(velocity, x0, steps=2, guidance_scale=Rescaled(2.0), condition=GIVEN["condition"])
    with pytest.raises(TypeError, match=r"or a kind of guidance of rfkernels\.sampling; got type"):
        sample(velocity, x0, steps=2, guidance_scale=Rescaled, **GIVEN)
