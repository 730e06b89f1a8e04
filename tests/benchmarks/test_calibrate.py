"""What the calibration makes of measurements; the measuring itself is run by the slow tests of benchmarks."""

import numpy as np
import pytest
import torch

from benchmarks import calibrate
from benchmarks.calibrate import REPLAYED, RUNS, Fitted, error_lines, fit, inside_link
from benchmarks.models.certify_time import Compared, median_error, regrets, ways
from benchmarks.models.replayed_ranks import all_like_rank_0
from foreroute.engine.certificate.counts.replay import StepCounts
from foreroute.engine.certificate.time.step_time import StepTime


def test_fit_finds_the_scales_that_made_the_times() -> None:
    parts = np.random.default_rng(0).uniform(0.1, 1.0, (12, 5))
    scales = np.array([1.5, 0.0, 2.0, 4.0, 0.3])
    np.testing.assert_allclose(fit(parts, parts @ scales), scales, atol=1e-9)


def test_fit_takes_no_scale_below_zero() -> None:
    """Times that only a negative scale explains; against a search on a grid."""
    parts = np.random.default_rng(1).uniform(0.1, 1.0, (8, 2))
    measured = parts @ np.array([2.0, -0.4])
    found = fit(parts, measured)
    assert found.min() == 0.0
    errors = [float(((parts[:, 0] * s / measured - 1) ** 2).sum()) for s in np.linspace(0, 3, 3001)]
    assert found[0] == pytest.approx(np.linspace(0, 3, 3001)[int(np.argmin(errors))], abs=1e-3)


def test_a_link_is_what_all_to_alls_took() -> None:
    link = inside_link({"bytes": 1e6, "bytes_s": 0.01, "message_us": 50.0}, ranks=4)
    assert (link.gb_per_s, link.message_us) == (3 * 1e6 / 0.01 / 1e9, 50.0)


def test_replayed_ranks_are_predicted_with_and_without_each_other() -> None:
    runs = [Fitted(1, False, 10.0, 10.0, 10.0, 99.0)] * 3
    ranks = [Fitted(8, True, 10.0, 10.0, 11.0, 8.0), Fitted(4, True, 10.0, 10.0, 10.0, 13.0)]
    alone, others = error_lines([*runs, *ranks])
    assert alone == "replayed ranks by one-rank runs alone: median error 25.0%, largest 30.0%"
    assert others == "replayed ranks by all others: median error 5.0%, largest 10.0%"


def test_a_replayed_rank_is_modelled_by_its_own_rows() -> None:
    """Of a step of two ranks, of which the other one has more rows."""
    counts = StepCounts(
        np.array([0]),
        1,
        sent_ymgPP=np.array([[[[[3, 5], [2, 9]]]]]),
        nodes_ymgPh=np.zeros((1, 1, 1, 2, 1), np.int64),
        count_ymgE=np.array([[[[4, 1, 8, 6]]]]),
    )
    own = all_like_rank_0(counts)
    assert own.received_ymgP.tolist() == [[[[5, 5]]]] and own.computed_ymgP.tolist() == [[[[5, 5]]]]
    assert counts.received_ymgP.tolist() == [[[[5, 14]]]] and counts.computed_ymgP.tolist() == [[[[5, 14]]]]


def test_no_calibrating_run_has_the_shape_of_a_predicted_one() -> None:
    predicted = [config for ranks in (2, 4) for _, config in ways(ranks)]
    assert len(predicted) == 5 + 9
    configs = [*RUNS, *(layout.config for layout in REPLAYED)]
    shapes = [(c.data, c.model, c.moe.experts, c.moe.expert_width) for c in configs]
    assert not any((c.data, c.model, c.moe.experts, c.moe.expert_width) in shapes for c in predicted)


def test_the_recommended_way_is_judged_by_what_was_measured() -> None:
    def compared(name: str, predicted: float, measured: float) -> Compared:
        return Compared("1gbit", 2, name, StepTime(predicted, 0, 0, 0, 0, 0, 0), measured)

    found = [compared("a", 1.0, 1.2), compared("b", 1.1, 1.0), compared("c", 3.0, 2.0)]
    assert regrets(found) == {"2 ranks, 1gbit": pytest.approx(0.2)}
    assert median_error(found) == pytest.approx(0.2 / 1.2)


def test_the_peak_is_that_of_the_largest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """By each number of threads, which is as before at the end."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        calibrate, "product_rates", lambda dtype: [[1.0, 0.1], [2.0, dtype.itemsize + torch.get_num_threads() / 100]]
    )
    torch.set_num_threads(2)
    lines = calibrate.peak_lines()
    assert [line.split("train.")[1] for line in lines] == [
        "peak_tflops=4.01",
        "peak_tflops=2.01",
        "peak_tflops=4.02",
        "peak_tflops=2.02",
    ]
    assert "2 threads in bf16" in lines[3] and torch.get_num_threads() == 2
    torch.set_num_threads(threads)
