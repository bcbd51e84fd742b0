"""What several of these tests share: a velocity that counts its calls, and the solvers that have a test each."""

import math

from rfkernels.sampling import Taylor

JVP = Taylor(derivative="jvp")
FIXED = ["euler", "midpoint", "heun", "rk4", "ab2", "taylor", JVP]
ALL = [*FIXED, "dopri5"]
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 1, "taylor": 2}


class Counting:
    """dx/dt = t - x, counting its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, t, **condition):
        self.calls += 1
        return t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) - x


def exact(x0):
    """dx/dt = t - x at t = 1."""
    return (x0 + 1) * math.exp(-1)
