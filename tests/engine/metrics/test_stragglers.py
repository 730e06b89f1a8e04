"""Who is called slow, and when; the ranks' own times as a clock of the test has them."""

from foreroute.engine.metrics.stragglers import StragglerDetector, skew


def test_the_slowest_rank_and_its_ratio():
    assert skew((10, 30, 11, 12)) == (1, 30 / 11)  # the docstring's
    assert skew((10, 20)) == (1, 2.0)
    assert skew((5.0,)) == (0, 1.0)
    assert skew((0.0, 0.0)) == (0, 1.0)  # nothing measured yet
    assert skew((7, 7, 7)) == (0, 1.0)


def test_a_rank_is_named_once_when_it_stays_slow_and_again_when_it_recovers():
    watch, said = StragglerDetector(), []
    even, slow, other = (10, 11, 10, 12), (10, 11, 31, 12), (40, 10, 10, 10)
    for window in (even, slow, even, slow, slow, slow, other, other, even):
        said.append(watch.lines(window))
    assert said[:4] == [[], [], [], []]  # one window may be bad luck
    assert said[4] == [
        "rank 2 is slow: 31.0 ms of its own in a step's forward passes, 2.8 times the median rank's; the others wait"
        " for it"
    ]
    assert said[5] == [] and said[6] == ["rank 2 is no longer slow"]
    assert [line.split(":")[0] for line in said[7]] == ["rank 0 is slow"]
    assert said[8] == ["rank 0 is no longer slow"]


def test_equal_ranks_are_not_slow():
    watch = StragglerDetector()
    assert all(watch.lines((10, 14, 10.5, 12)) == [] for _ in range(5))
