"""The pole table: its error is certified on a dense grid, and what is promised of every row."""

import math

import numpy as np
import pytest

from benchmarks import make_poles
from kernels.spd.poles import MAX_ERROR, TABLE_PATH, load_table, rational_log

CERTIFICATE_POINTS = 40_001
"""The table was fitted on 6,000 points of a half interval; this grid has other points, and 13 times as many."""
ROUNDING = 1e-12
"""float64: about 20 terms whose sizes are below the logarithm of the longest interval."""


def test_every_row_keeps_to_its_error_on_a_dense_grid():
    for row in load_table():
        poles, residues = (np.array(values) for values in row.expanded())
        half = 0.5 * math.log(row.kappa)
        # Equally spaced in the angle: dense at the ends, where the error is largest.
        s = half * np.sin(np.linspace(-np.pi / 2, np.pi / 2, CERTIFICATE_POINTS))
        y = np.exp(s)
        value = (residues / (2 * poles)).sum() - sum(r / (y + t) for t, r in zip(poles, residues, strict=True))
        error = float(np.abs(value - s).max())
        assert error <= row.error + ROUNDING, row
        assert error >= 0.99 * row.error - ROUNDING, row  # the stated error is no idle bound
        assert row.error <= MAX_ERROR


def test_every_row_has_positive_poles_and_residues():
    for row in load_table():
        poles, residues = row.expanded()
        assert len(poles) == row.num_poles == len(residues)
        assert min(poles) > 0 and min(residues) > 0
        assert list(poles) == sorted(poles)


@pytest.mark.parametrize("eps", [1.0, 0.3, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("n", [1, 7, 36, 49, 64, 196, 256, 784])
def test_chosen_function_is_within_its_error_on_the_whole_spectrum(eps, n):
    rational = rational_log(eps, n)
    assert rational.error <= MAX_ERROR
    assert rational.lower < eps and n + eps < rational.upper
    for x in np.geomspace(eps, n + eps, 501):
        assert abs(rational(float(x)) - math.log(x)) <= rational.error + ROUNDING


def test_default_needs_five_poles():
    rational = rational_log(1.0, 196)
    assert len(rational.poles) == 5
    assert rational.error <= 2e-5


def test_interval_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match=r"eps = 1e-07, n = 196: no rational logarithm .* backend='eigh'"):
        rational_log(1e-7, 196)


def test_generator_makes_the_row_that_is_checked_in():
    row = next(row for row in load_table() if row.num_poles == 5 and row.kappa > 200)
    made = make_poles.table_row(row.kappa, 5)
    assert made is not None
    assert made.error == pytest.approx(row.error, rel=1e-3)
    # Newton's last step and another processor's exp leave the last digits free.
    assert made.half_poles == pytest.approx(row.half_poles, rel=1e-6)
    assert made.half_residues == pytest.approx(row.half_residues, rel=1e-6)


def test_table_is_read_without_scipy():
    assert TABLE_PATH.name == "poles.json"
    assert "scipy" not in load_table.__module__
