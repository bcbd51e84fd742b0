"""Every method against a NumPy transcription of its published code, in that code's convention: the level s is 1 at
noise and 0 at data, and the velocity is noise minus data. The network is a small attention network of three
blocks, in NumPy too; grids are uneven, guidance is per sample, and attention features are shared by keys of the
published kind: the larger level of the step, whether at its middle, the block."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rfkernels.editing import (
    Features,
    FireFlowEdit,
    FlowEdit,
    RFEdit,
    RFInversion,
    UniEdit,
    edit,
)

BATCH, TOKENS, SIZE, BLOCKS = 3, 5, 4, 3
GRIDS = {
    "uneven": (0.0, 0.03, 0.2, 0.31, 0.62, 0.7, 1.0),
    "part": (0.1, 0.15, 0.4, 0.45, 0.8, 0.9),
}
SOURCE, TARGET, NONE = 0.0, 1.0, -0.7
SCALES = (np.array([1.5, 0.5, 2.0]), np.array([3.0, 1.0, -1.0]))


class Attention(nn.Module):
    exchange = None

    def __init__(self, number):
        super().__init__()
        draw = np.random.default_rng(number)
        self.weights = torch.from_numpy(draw.standard_normal((3, SIZE, SIZE)) / 2)

    def forward(self, x):
        q, k, v = (x @ weight for weight in self.weights)
        if self.exchange is not None:
            q, k, v = (h[:, 0] for h in self.exchange(q[:, None], k[:, None], v[:, None]))
        return x + F.scaled_dot_product_attention(q, k, v)


class Network(nn.Module):
    """velocity(x, t, shift) in the package's convention."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attention(number) for number in range(BLOCKS))

    def forward(self, x, t, shift):
        h = torch.sin(x * (1.5 - t[:, None, None]) + shift)
        for block in self.blocks:
            h = torch.tanh(block(h))
        return h - x / 2


def network(x, s, shift, tap=lambda block, v: v):
    """The same in NumPy, in the other convention; ``tap`` may look at and replace V."""
    h = np.sin(x * (0.5 + s) + shift)
    for number in range(BLOCKS):
        q, k, v = (
            h @ w for w in np.random.default_rng(number).standard_normal((3, SIZE, SIZE)) / 2
        )
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(SIZE)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        h = np.tanh(h + scores / scores.sum(-1, keepdims=True) @ tap(number, v))
    return -(h - x / 2)


def guided(x, s, shift, scales=None, tap=lambda block, v: v):
    """With classifier-free guidance; both calls are tapped."""
    velocity = network(x, s, shift, tap)
    if scales is None:
        return velocity
    without = network(x, s, NONE, tap)
    return without + scales[:, None, None] * (velocity - without)


@pytest.fixture(scope="module")
def x1():
    return np.random.default_rng(7).standard_normal((BATCH, TOKENS, SIZE))


def edited(x1, method, grid, *, scales=(None, None), **options):
    """The package's answer."""
    given = {
        f"{side}_guidance_scale": None if scale is None else torch.from_numpy(scale)
        for side, scale in zip(("source", "target"), scales, strict=True)
    }
    result = edit(
        Network(), torch.from_numpy(x1), source={"shift": SOURCE}, target={"shift": TARGET},
        uncondition={"shift": NONE}, method=method, grid=GRIDS[grid], seed=11, **given, **options,
    )  # fmt: skip
    assert result.x.dtype == torch.float64
    return result


def close(result, expected):
    np.testing.assert_allclose(result.x.numpy(), expected, rtol=0, atol=1e-10)


def axes(names, *variants, few=1):
    """Cases of a test: every variant guided on the uneven grid, and ``few`` of them guided otherwise and on
    the other grid."""
    cases = [(SCALES, "uneven", *variant) for variant in variants]
    others = [((None, None), "uneven"), ((None, SCALES[1]), "uneven"), (SCALES, "part")]
    cases += [(*other, *variant) for other in others for variant in variants[:few]]
    return pytest.mark.parametrize(("scales", "grid", *names), cases)


def levels_of(grid):
    """Descending, as samplers walk them."""
    return [1 - t for t in GRIDS[grid]]


class Shared:
    """The published bank: what inversion stores in its last n steps, sampling takes in its first n."""

    def __init__(self, steps, blocks, mode, weight):
        self.steps, self.blocks, self.mode, self.weight = steps, blocks, mode, weight
        self.kept, self.missed = {}, 0

    def tap(self, here, after, middle, left, *, storing):
        """``left``: steps between this one and the noise."""
        if left >= self.steps:
            return lambda block, v: v
        calls = dict.fromkeys(range(BLOCKS), 0)

        def tapped(block, v):
            if block not in self.blocks:
                return v
            key = (max(here, after), middle, block)
            second = calls[block] == 1
            calls[block] += 1
            if storing:
                self.kept[(*key, second)] = v
                return v
            kept = self.kept.get((*key, second), self.kept.get((*key, False)))
            if kept is None:
                self.missed += 1
                return v
            if self.mode == "mix":
                return self.weight * kept + (1 - self.weight) * v
            return v + self.weight * kept if self.mode == "add" else kept

        return tapped


def walk(x, levels, shift, scales, shared, lagged, *, inverting):
    """RF-Solver with the step h/2, or FireFlow; the sign of h tells the direction."""
    count, known = len(levels) - 1, None
    for i in range(count):
        here, after = levels[i], levels[i + 1]
        h, left = after - here, count - 1 - i if inverting else i

        def tap(middle, step=(here, after), left=left):
            return shared.tap(*step, middle, left, storing=inverting)

        if known is None or not lagged:
            known = guided(x, here, shift, scales, tap(False))
        ahead = x + h / 2 * known
        known = guided(ahead, here + h / 2, shift, scales, tap(True))
        x = x + h * known
    return x


@axes(
    ("lagged", "steps", "blocks", "mode", "weight"),
    (False, 3, [1, 2], "replace", 1.0),
    (True, 5, [0, 1, 2], "replace", 1.0),
    (False, 0, [1, 2], "replace", 1.0),
    (False, 1, [1, 2], "replace", 1.0),
    (False, 5, [1, 2], "replace", 1.0),
    (True, 0, [0, 1, 2], "replace", 1.0),
    (True, 1, [0, 1, 2], "replace", 1.0),
    (True, 3, [0, 1, 2], "replace", 1.0),
    (False, 1, [0, 2], "mix", 0.3),
    (False, 3, [0, 2], "mix", 0.3),
    (False, 5, [0, 2], "mix", 0.3),
    (True, 1, [0, 1, 2], "add", 0.4),
    (True, 3, [0, 1, 2], "add", 0.4),
    (True, 5, [0, 1, 2], "add", 0.4),
    few=2,
)
def test_inversion_and_sampling_with_shared_features(
    x1, scales, grid, lagged, steps, blocks, mode, weight
):
    levels, shared = levels_of(grid), Shared(steps, blocks, mode, weight)
    x = walk(x1, levels[::-1], SOURCE, scales[0], shared, lagged, inverting=True)
    x = walk(x, levels, TARGET, scales[1], shared, lagged, inverting=False)
    features = Features(steps, blocks=blocks, mode=mode, weight=weight)
    method = FireFlowEdit() if lagged else RFEdit()
    result = edited(x1, method, grid, scales=scales, features=features)
    close(result, x)
    assert result.bank_missed == shared.missed
    assert result.bank_bytes == sum(v.nbytes for v in shared.kept.values())
    count = len(levels) - 1
    per_side = count + 1 if lagged else 2 * count
    assert result.nfe == per_side * sum(1 if scale is None else 2 for scale in scales)
    if steps:
        assert np.abs(edited(x1, method, grid, scales=scales).x.numpy() - x).max() > 1e-4


def noises(x1, method, grid):
    """The normal numbers that a method draws, seen through a velocity of zero.

    One array for every call under the source, and one for the first plain step."""
    found = []

    def spy(x, t, shift):
        if shift == SOURCE or (method.n_min and t[0] == GRIDS[grid][-1 - method.n_min]):
            found.append((x.numpy() - t[0].item() * x1) / (1 - t[0].item()))
        return torch.zeros_like(x)

    edit(
        spy, torch.from_numpy(x1), source={"shift": SOURCE}, target={"shift": TARGET},
        method=method, grid=GRIDS[grid], seed=11,
    )  # fmt: skip
    return found


@axes(
    ("n_max", "n_min", "n_avg"),
    (3, 1, 2),
    (5, 0, 1),  # all of the steps of the grid "part"
    (5, 2, 1),
    (4, 0, 3),
    (4, 4, 2),
    (0, 0, 1),
    few=2,
)
def test_flow_edit(x1, scales, grid, n_max, n_min, n_avg):
    method = FlowEdit(n_max=n_max, n_min=n_min, n_avg=n_avg)
    drawn = iter(noises(x1, method, grid))
    levels = levels_of(grid)
    count, z, plain = len(levels) - 1, x1.copy(), None
    for i, (s, after) in enumerate(pairwise(levels)):
        if count - i > n_max:
            continue
        if count - i > n_min:
            mean = 0.0
            for _ in range(n_avg):
                x_s = (1 - s) * x1 + s * next(drawn)
                x_t = z + x_s - x1
                there = guided(x_t, s, TARGET, scales[1])
                mean = mean + (there - guided(x_s, s, SOURCE, scales[0])) / n_avg
            z = z + (after - s) * mean
        else:
            if plain is None:
                plain = z + (1 - s) * x1 + s * next(drawn) - x1
            plain = plain + (after - s) * guided(plain, s, TARGET, scales[1])
    assert next(drawn, None) is None
    result = edited(x1, method, grid, scales=scales)
    close(result, z if plain is None else plain)
    calls = [1 if scale is None else 2 for scale in scales]
    assert result.nfe == n_avg * (n_max - n_min) * sum(calls) + n_min * calls[1]


def rf_inversion_noise(x1):
    """The noise that this method steers to, reached by gamma = 1 under a velocity of zero."""
    options = {"method": RFInversion(1.0, 0.0), "steps": 1, "seed": 11}
    still = edit(
        lambda x, t: torch.zeros_like(x), torch.from_numpy(x1), source={}, target={}, **options
    )
    return still.x.numpy()


def test_the_noises_are_normal_and_each_its_own(x1):
    """Of FlowEdit, 13 for a sample, and of RF-Inversion, for 16 samples."""
    drawn = noises(x1, FlowEdit(n_max=6, n_min=2, n_avg=3), "uneven")
    assert len(drawn) == 3 * (6 - 2) + 1
    for found in (np.stack(drawn), rf_inversion_noise(np.zeros((16, TOKENS, SIZE)))):
        assert abs(found.mean()) < 5 / np.sqrt(found.size)
        assert abs(found.std() - 1) < 5 / np.sqrt(2 * found.size)
        assert np.unique(found.round(9)).size == found.size


@axes(
    ("gamma", "eta", "start", "stop", "decay"),
    (0.3, 0.7, 0.2, 0.9, 1.5),
    (0.5, 0.9, 0.0, 0.25, 0.0),
    (1.0, 0.5, 0.0, 1.0, 0.5),
    (0.0, 0.0, 0.0, 1.0, 0.0),
)
def test_rf_inversion(x1, scales, grid, gamma, eta, start, stop, decay):
    """Published for levels from 1 to 0; the ends of another grid take their places."""
    method = RFInversion(gamma, eta, start, stop, decay)
    noise = rf_inversion_noise(x1)
    levels = levels_of(grid)
    count, y = len(levels) - 1, x1.copy()
    for s, after in pairwise(levels[::-1]):
        u = guided(y, s, SOURCE, scales[0])
        y = y + (after - s) * (u + gamma * ((noise - y) / (levels[0] - s) - u))
    for i, (s, after) in enumerate(pairwise(levels)):
        v = -guided(y, s, TARGET, scales[1])
        on = round(start * count) <= i < round(stop * count)
        strength = eta * (1 - i / count) ** decay if on else 0.0
        y = y + (s - after) * (v + strength * ((x1 - y) / (s - levels[-1]) - v))
    result = edited(x1, method, grid, scales=scales)
    close(result, y)
    calls = [1 if scale is None else 2 for scale in scales]
    assert result.nfe == count * ((gamma < 1) * calls[0] + calls[1])


@axes(
    ("alpha", "omega", "channel_dim"),
    (0.6, 5.0, 2),
    (0.6, 2.0, 1),
    (1.0, 0.0, 2),
    (0.3, 1.5, 2),
    (0.01, 2.0, 2),
)
def test_uni_edit(x1, scales, grid, alpha, omega, channel_dim):
    levels = levels_of(grid)
    used = max(1, round(alpha * (len(levels) - 1)))
    levels = levels[-used - 1 :]
    x, u = x1.copy(), guided(x1, levels[-1], SOURCE, scales[0])
    for s, after in pairwise(levels[::-1]):
        u = guided(x + (after - s) * u, after, SOURCE, scales[0])
        x = x + (after - s) * u
    for s, after in pairwise(levels):
        v_t, v_s = guided(x, s, TARGET, scales[1]), guided(x, s, SOURCE, scales[0])
        size = np.abs(v_t - v_s).mean(channel_dim, keepdims=True)
        least, most = size.min((1, 2), keepdims=True), size.max((1, 2), keepdims=True)
        m = (size - least) / (most - least + 1e-7)
        v = m * v_t + (1 - m) * v_s + omega * (1 + m) * (v_t - v_s)
        x = x + (after - s) * v
    result = edited(x1, UniEdit(alpha, omega, channel_dim=channel_dim), grid, scales=scales)
    close(result, x)
    calls = [1 if scale is None else 2 for scale in scales]
    assert result.nfe == (2 * used + 1) * calls[0] + used * calls[1]
