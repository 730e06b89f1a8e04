"""The means of a window against sums by hand, and where the time of metric code goes."""

import time

import numpy as np
import pytest
import torch

from engine.arithmetic import Arithmetic
from engine.peak import Peak
from engine.step import StepResult, StepTimes
from engine.testing_run import tiny_config
from engine.totals import COLUMN
from engine.window import Window


def a_window(flops=0.0):
    config = tiny_config()
    return Window(
        config, Arithmetic(config, 11, 1000), ranks=2, device=torch.device("cpu"), peak=Peak(0.0, "unknown"), flops=flops
    )  # fmt: skip


def result(number, own_ms_P, *, step_ms=10.0):
    """A step whose numbers are told by its own."""
    block_PX = np.zeros((2, len(COLUMN)))
    block_PX[:, COLUMN["own_ms"]] = own_ms_P
    block_PX[:, COLUMN["memory_bytes"]] = 1000 * number, 2000 * number
    block_PX[:, COLUMN["wire_bytes"]] = 10 * number, 30 * number
    block_PX[:, COLUMN["wire_bytes_inside"]] = 4 * number, 6 * number
    block_PX[:, COLUMN["rows"]] = 3, 5
    count_LE = np.array([[4.0, 0.0], [1.0, 3.0]])
    times = StepTimes(step_ms=step_ms, forward_ms=3.0 * number, metric_ms=0.5)
    sent_bytes_PG = np.array([[0.0, 10 * number], [30 * number, 0.0]])
    return StepResult(float(number), 0.0, 2, 0.1, 0.2, block_PX, sent_bytes_PG, count_LE, times)


def test_means_over_the_steps():
    window = a_window()
    window.add(result(1, (0.0, 0.0)))  # the first step of a process: nobody has a time before it
    window.add(result(2, (4.0, 8.0)))
    window.add(result(6, (6.0, 2.0)))
    values = window.close(3)
    assert values["loss"] == 3.0 and values["forward_ms"] == 9.0
    assert values["rank_own_ms"] == [5.0, 5.0]
    assert values["rank_memory_bytes"] == [6000.0, 12000.0]  # now
    assert values["rank_wire_bytes"] == [30.0, 90.0]
    assert values["link_bytes"] == [[0.0, 30.0], [90.0, 0.0]]
    assert (values["wire_bytes"], values["wire_bytes_inside"]) == (120.0, 30.0)
    assert values["layer_load"] == [2.0, 1.5] and values["load_max_over_mean"] == 2.0
    assert values["rank_load_max_over_mean"] == 5 / 4
    assert values["mfu"] == 0.0  # the peak is unknown
    window.add(result(1, (1.0, 1.0)))
    assert window.close(4)["loss"] == 1.0  # nothing is left of the steps before


def test_a_window_without_times_says_zero():
    window = a_window()
    window.add(result(1, (0.0, 0.0)))
    values = window.close(1)
    assert values["rank_own_ms"] == [0.0, 0.0] and values["rank_skew"] == 1.0


def test_flops_go_on_where_the_run_was():
    window = a_window(flops=5e9)
    window.add(result(1, (1.0, 1.0)))
    step = Arithmetic(tiny_config(), 11, 1000).step_flops(2)
    assert window.progress(7) == {"tokens": 7 * 64, "flops": 5e9 + step}
    assert window.close(7)["flops"] == 5e9 + step


def test_the_time_of_metric_code_is_part_of_the_steps():
    """Writing a line is time of the window behind it."""
    window = a_window()
    window.add(result(1, (1.0, 1.0)))
    with window.timed():
        first = window.close(1)
        time.sleep(0.05)
    window.add(result(1, (1.0, 1.0)))
    window.add(result(1, (1.0, 1.0)))
    second = window.close(3)
    assert (first["step_ms"], first["metric_ms"], first["outside_ms"]) == (10.0, 0.5, 7.0)
    for name in ("step_ms", "metric_ms", "outside_ms"):
        assert second[name] - first[name] >= 25.0, name  # 50 ms over two steps
    assert second["tokens_per_second"] == pytest.approx(64e3 / second["step_ms"])
