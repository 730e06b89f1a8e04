import math

import pytest

from foreroute.engine.config import Growth, ScheduleConfig
from foreroute.engine.errors import UserError
from foreroute.engine.routing.k_schedule import active_experts


def curve(growth, k_min, k_max, total, steps=None):
    config = ScheduleConfig(growth=growth, k_min=k_min, k_max=k_max)
    return [active_experts(config, step, total) for step in (steps or range(total + 3))]


def test_published_change_points_of_the_linear_schedule():
    changes = {9: 25_001, 10: 75_000, 11: 125_001, 12: 175_000, 13: 225_001, 14: 275_000}
    changes |= {15: 325_001, 16: 375_000}
    steps = [0] + [step + delta for step in changes.values() for delta in (-1, 0)] + [399_999, 10**6]
    expected = [8] + [k - late for k in changes for late in (1, 0)] + [16, 16]
    assert curve(Growth.linear, 8, 16, 400_000, steps) == expected


def test_published_cosine_starts_slowly():
    config = ScheduleConfig(growth=Growth.cosine, k_min=8, k_max=16)
    total = 400_000
    for step in range(0, total, 997):
        expected = round(-8 * math.cos(math.pi * step / (2 * total))) + 16
        assert active_experts(config, step, total) == expected
    first_9 = next(s for s in range(0, total, 100) if active_experts(config, s, total) == 9)
    assert first_9 / total == pytest.approx(math.acos(7.5 / 8) * 2 / math.pi, abs=1e-3)


def test_published_exponential_starts_fast():
    config = ScheduleConfig(growth=Growth.exponential, k_min=8, k_max=16)
    stride = 400_000 // 300
    powers = [0, 6, 7, 20, 21, 68, 69, 70, 299]
    got = [active_experts(config, power * stride, 400_000) for power in powers]
    assert got == [round(-8 * 0.99**power) + 16 for power in powers]
    assert got == [8, 8, 9, 9, 10, 12, 12, 12, 16]


def test_published_multi_step_is_by_fifths_and_clipped():
    assert curve(Growth.multi_step, 1, 16, 10) == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 16, 16, 16]
    assert curve(Growth.multi_step, 8, 16, 10) == [8] * 8 + [16] * 5
    assert curve(Growth.multi_step, 3, 12, 10) == [3, 3, 3, 3, 4, 4, 8, 8, 12, 12, 12, 12, 12]
    with pytest.raises(UserError, match=r"schedule.k_max=17: .*at most 16; doubling"):
        ScheduleConfig(growth=Growth.multi_step, k_min=1, k_max=17)


def test_doubling_gives_each_k_an_equal_part():
    assert curve(Growth.doubling, 1, 16, 10) == curve(Growth.multi_step, 1, 16, 10)
    assert curve(Growth.doubling, 8, 16, 4) == [8, 8, 16, 16, 16, 16, 16]
    assert curve(Growth.doubling, 3, 16, 4) == [3, 6, 12, 16, 16, 16, 16]


def test_constant_is_k_max():
    assert set(curve(Growth.constant, 2, 4, 10)) == {4}


LIMITS = (1, 1), (1, 16), (4, 9), (1, 64)


@pytest.mark.parametrize("total", [1, 2, 7, 299, 300, 301, 1000])
@pytest.mark.parametrize(
    ("growth", "k_min", "k_max"),
    [(g, *ks) for g in Growth for ks in LIMITS if g is not Growth.multi_step or ks[1] <= 16],
)
def test_every_schedule_grows_within_its_limits(growth, total, k_min, k_max):
    ks = curve(growth, k_min, k_max, total)
    assert ks == sorted(ks) and k_min <= ks[0] and ks[-3:] == [k_max] * 3
    assert growth is Growth.constant or ks[0] == k_min


@pytest.mark.parametrize(
    ("total", "power_of"), [(3000, lambda s: s // 10), (2999, lambda s: s // 9), (100, lambda s: 3 * s)]
)
def test_exponential_takes_300_powers(total, power_of):
    """With so many experts that each power shows."""
    want = [round(-9999 * 0.99 ** power_of(s)) + 10_000 for s in range(total)]
    assert curve(Growth.exponential, 1, 10_000, total, range(total)) == want
