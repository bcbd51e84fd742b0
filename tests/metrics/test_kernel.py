"""The kernel distance against scikit-learn's kernel, a closed form, and the scatter of many estimates."""

import math

import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel

from rfkernels.metrics import kernel_distance


def draws(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def by_sklearn(x, y):
    n, m = len(x), len(y)
    xx, yy, xy = (polynomial_kernel(a, b, degree=3) for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return within - 2 * xy.mean()


@pytest.mark.parametrize(("n", "m", "d"), [(60, 40, 5), (30, 70, 64)])
def test_against_scikit_learn(n, m, d):
    x, y = draws(n, d, 0), draws(m, d, 1, 0.3)
    found = kernel_distance(x, y, blocks=1)
    assert found.value == pytest.approx(by_sklearn(x.numpy(), y.numpy()), rel=1e-10)
    assert math.isnan(found.standard_error)
    halves = kernel_distance(x, y, features=lambda s: 2 * s, blocks=1)
    assert halves.value == pytest.approx(by_sklearn(2 * x.numpy(), 2 * y.numpy()), rel=1e-10)


def test_a_linear_kernel_measures_the_distance_of_the_means():
    """E = |m1 - m2|^2 exactly, whatever the number of samples and blocks."""
    values = [
        kernel_distance(
            draws(12, 3, 2 * i, 1.0), draws(30, 3, 2 * i + 1), degree=1, offset=0, scale=1, blocks=3
        ).value
        for i in range(400)
    ]
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / math.sqrt(400)
    assert abs(mean - 3.0) < 4 * error


def test_unbiased_and_its_error_is_the_scatter():
    found = [kernel_distance(draws(200, 4, 2 * i), draws(300, 4, 2 * i + 1)) for i in range(100)]
    values = torch.tensor([f.value for f in found])
    errors = torch.tensor([f.standard_error for f in found])
    assert abs(values.mean()) < 4 * values.std() / 10
    assert (values < 0).any()
    assert errors.square().mean().sqrt() == pytest.approx(values.std().item(), rel=0.3)


def test_sorted_data_is_shuffled_into_its_blocks():
    """Blocks of a sorted set would each be another distribution."""
    x = draws(500, 2, 0).sort(dim=0).values
    y = draws(500, 2, 1).sort(dim=0).values
    found = kernel_distance(x, y)
    assert abs(found.value) < 5 * found.standard_error
    assert kernel_distance(x, y) == found
    assert kernel_distance(x, y, seed=1) != found


def test_nan_and_errors():
    x, y = draws(40, 3, 0), draws(40, 3, 1)
    x[0, 0] = math.nan
    assert math.isnan(kernel_distance(x, y).value)
    for options, said in (
        ({"blocks": 0}, "blocks must be at least 1; got 0"),
        ({"degree": 0}, "degree must be at least 1; got 0"),
        ({"blocks": 21}, "n at least 42"),
    ):
        with pytest.raises(ValueError, match=said):
            kernel_distance(x, y, **options)
    with pytest.raises(ValueError, match="reference must have 3 numbers per sample"):
        kernel_distance(x, y[:, :2])
