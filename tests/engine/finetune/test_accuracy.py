"""Wilson's interval against published values, and when a classifier beats always giving one answer."""

import pytest

from foreroute.engine.finetune.accuracy import Accuracy, majority, wilson


@pytest.mark.parametrize(
    ("correct", "examples", "low", "high"),
    [  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_values(correct, examples, low, high):
    assert wilson(correct, examples) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(examples - correct, examples)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_bounds_solve_the_score_equation():
    """A bound p is where the observed share lies z standard deviations of p away."""
    for bound in wilson(500, 872):
        assert abs(500 / 872 - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / 872) ** 0.5)
    assert wilson(500, 872, confidence=0.99).low < wilson(500, 872).low


def test_beating_the_majority_takes_the_whole_interval():
    always = majority([1] * 444 + [0] * 428)
    assert always.label == 1 and always.share == pytest.approx(0.50917, abs=1e-5)
    assert not Accuracy(444, 872).beats(always.share)
    assert not Accuracy(470, 872).beats(always.share)  # 53.9 %, 50.6 to 57.2
    assert Accuracy(480, 872).beats(always.share)  # 55.0 %, 51.7 to 58.3
    assert not Accuracy(300, 872).beats(always.share)
    assert majority([1, 0]).label == 0
