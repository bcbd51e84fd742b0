"""What docs/samplers.md says of every solver is what it does."""

import re
from pathlib import Path

import pytest

import rfkernels as rf
from rfkernels.flow.closed_form import GaussianMixtureFlow
from rfkernels.sampling import SOLVERS, evaluations, get_solver, sample, steps_within

PAGE = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## Solvers")[2].partition("## Noise")[0]
ROWS = {
    cells[0].strip("`"): cells
    for line in TABLE.splitlines()
    if line.startswith("| `")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}
FORMULAS = {
    "N": lambda n: n,
    "2N": lambda n: 2 * n,
    "4N": lambda n: 4 * n,
    "N + 1": lambda n: n + 1,
}


def test_every_solver_has_a_row():
    assert set(ROWS) == set(SOLVERS)
    named = re.findall(r"^\| [^|]*\| (`[^|]*) \|$", PAGE.partition("## Which one")[2], re.M)
    assert {n for line in named for n in re.findall(r"`([a-z0-9+-]+)`", line)} - set(SOLVERS) <= {
        "log_likelihood"
    }


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations(name):
    if get_solver(name).adaptive:
        assert ROWS[name][3] == "adaptive"
        assert evaluations(name, 6) is None
        assert steps_within(name, 6) is None
        return
    flow = GaussianMixtureFlow.ring()
    seed = {"seed": 0} if get_solver(name).stochastic else {}
    given = {"solver": name, "return_info": True, **seed}

    def velocity(x, t, span=None):
        return flow(x, t)

    info = sample(velocity, rf.randn(3, 2, seed=0), steps=6, **given)
    assert info.nfe == FORMULAS[ROWS[name][3]](6) == evaluations(name, 6)
    assert steps_within(name, info.nfe) == 6
    assert steps_within(name, info.nfe - 1) in (5, None)
    assert steps_within(name, 0) is None
