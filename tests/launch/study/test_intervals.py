"""Intervals against numbers worked out by hand and printed tables; reading a curve against plain cases."""

import math

import pytest

from foreroute.launch.study.intervals import Estimate, estimate, paired, read_between, t_quantile


@pytest.mark.parametrize(
    ("degrees", "confidence", "table"),
    [
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.95, 3.182),
        (4, 0.95, 2.776),
        (9, 0.95, 2.262),
        (30, 0.95, 2.042),
        (120, 0.95, 1.980),
        (1, 0.99, 63.657),
        (2, 0.9, 2.920),
        (10, 0.99, 3.169),
    ],
)
def test_t_as_printed_tables_have_it(degrees, confidence, table):
    assert round(t_quantile(degrees, confidence), 3) == table


def test_two_degrees_have_a_closed_form():
    """For 2 degrees P(|T| > t) = 1 - t / sqrt(2 + t^2)."""
    t = t_quantile(2)
    assert 1 - t / math.sqrt(2 + t * t) == pytest.approx(0.05, abs=1e-12)


def test_mean_and_interval_by_hand():
    """1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14, s = sqrt(7), half = 4.30265 sqrt(7 / 3)."""
    found = estimate([1, 2, 6])
    half = 4.302652729749462 * math.sqrt(7 / 3)
    assert (found.mean, found.n) == (3, 3)
    assert found.low == pytest.approx(3 - half) and found.high == pytest.approx(3 + half)
    assert found.sign == 0


def test_one_value_has_no_interval():
    found = estimate([2.5])
    assert found == Estimate(2.5, None, None, 1) and found.sign == 0


def test_pairing_removes_what_seeds_share():
    a, b = {1: 10.1, 2: 20.2, 3: 30.3}, {3: 30.0, 1: 10.0, 2: 20.0, 4: 99.0}
    found = paired(a, b)
    half = 4.302652729749462 * 0.1 / math.sqrt(3)  # of 0.1, 0.2, 0.3
    assert found.mean == pytest.approx(0.2) and found.n == 3
    assert found.low == pytest.approx(0.2 - half) and found.high == pytest.approx(0.2 + half)
    assert estimate(list(a.values())).low < 0 < found.mean  # unpaired: far too wide to see it
    assert paired({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize(("values", "sign"), [([1, 1.1, 0.9], 1), ([-1, -1.1, -0.9], -1), ([1, -1, 0.1], 0), ([3], 0)])
def test_the_side_of_an_interval(values, sign):
    assert estimate(values).sign == sign


def test_reading_between_points():
    x, y = [1.0, 2.0, 4.0], [10.0, 6.0, 5.0]
    assert [read_between(x, y, at) for at in (1, 1.25, 2, 3, 4)] == [10, 9, 6, 5.5, 5]
    assert read_between(x, y, 0.99) is None and read_between(x, y, 4.01) is None
    assert read_between(x, y, 4 * (1 + 1e-12)) == 5  # a budget that is the end, but for rounding
    assert read_between([], [], 1) is None
