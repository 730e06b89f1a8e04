"""The means of a window against sums by hand, and where the time of metric code goes."""

import math
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from foreroute.engine.metrics.log_interval import Window
from foreroute.engine.metrics.peak_flops import Peak
from foreroute.engine.metrics.rank_sums import RankRow
from foreroute.engine.metrics.step_result import StepResult
from foreroute.engine.metrics.timers import StepTimes
from foreroute.engine.model.flops import Arithmetic
from foreroute.engine.testing.tiny_run import tiny_config


def a_window(flops=0.0, peak=0.0, device="cpu"):
    return Window(
        Arithmetic(tiny_config(), 11, 1000), ranks=2, device=torch.device(device), peak=Peak(peak, "said"), flops=flops
    )


def result(number, own_ms_P, *, step_ms=10.0):
    """A step whose numbers are told by its own."""
    ranks = {field.name: np.zeros(2) for field in fields(RankRow)}
    ranks["own_ms"][:] = own_ms_P
    ranks["memory_bytes"][:] = 1000 * number, 2000 * number
    ranks["wire_bytes"][:] = 10 * number, 30 * number
    ranks["wire_bytes_inside"][:] = 4 * number, 6 * number
    ranks["rows"][:] = 3, 5
    ranks["plan_wait_ms"][:] = 0.5 * number, 0.25
    ranks["exchange_exposed_ms"][:] = 0.0 if sum(own_ms_P) == 0 else (1.0, 2.0)
    count_LE = np.array([[4.0, 0.0], [1.0, 3.0]])
    times = StepTimes(step_ms=step_ms, forward_ms=3.0 * number, metric_ms=0.5)
    sent_bytes_PG = np.array([[0.0, 10 * number], [30 * number, 0.0]])
    return StepResult(float(number), number / 8, ranks, sent_bytes_PG, count_LE, 2, 0.1 * number, 0.2, times)


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


def test_a_layer_without_rows_has_even_load():
    """Warnings are errors here: nothing is divided by zero."""
    window, found = a_window(), result(1, (1.0, 1.0))
    found.ranks["rows"][:] = 0
    window.add(replace(found, count_LE=np.array([[0.0, 0.0], [1.0, 3.0]])))
    values = window.close(1)
    assert values["layer_load"] == [1.0, 1.5] and values["rank_load_max_over_mean"] == 1.0


def test_what_a_window_says_of_training():
    """By hand: steps of 64 symbols that take 10, 20 and 30 ms."""
    window = a_window(peak=1e6)
    assert not window.begun
    for number, step_ms in ((1, 10.0), (2, 20.0), (6, 30.0)):
        window.add(result(number, (1.0, 1.0), step_ms=step_ms))
        assert window.begun
    values = window.close(7)
    assert not window.begun
    assert values["auxiliary_loss"] == 3 / 8 and values["bpc"] == pytest.approx(3 / math.log(2))
    assert (values["k"], values["grad_norm"]) == (2, 0.2)
    assert values["learning_rate"] == pytest.approx(0.6)  # of the last step
    assert (values["tokens"], values["step_ms"], values["metric_ms"]) == (7 * 64, 20.0, 0.5)
    assert values["tokens_per_second"] == pytest.approx(64 / 0.020)
    assert values["tokens_per_second_per_rank"] == pytest.approx(32 / 0.020)
    step_flops = Arithmetic(tiny_config(), 11, 1000).step_flops(2)
    assert values["flops"] == 3 * step_flops
    assert values["mfu"] == pytest.approx(step_flops / 0.020 / 2e6)  # two devices of 1 MFLOP/s


def test_what_a_window_says_of_the_machine():
    window = a_window()
    window.add(result(1, (0.0, 0.0)))  # its own time and exchange are told in the next step
    window.add(result(3, (4.0, 8.0)))
    values = window.close(2)
    assert values["rank_plan_wait_ms"] == [1.0, 0.25]
    assert values["rank_exchange_exposed_ms"] == [1.0, 2.0]
    assert (values["slowest_rank"], values["rank_skew"]) == (1, 2.0)
    assert (values["wire_bytes"], values["wire_bytes_between"]) == (80.0, 80.0 - 20.0)
    assert values["rank_rows"] == [3.0, 5.0] and values["expert_rows"] == [[4.0, 0.0], [1.0, 3.0]]
    assert values["device_memory_bytes"] == values["peak_device_memory_bytes"] == 0
    # the kernel counts the two at different moments
    assert 0 < values["memory_bytes"] <= values["peak_memory_bytes"] * 1.01


@pytest.mark.parametrize(("device", "now", "most"), [("cuda:1", 50, 70), ("cpu", 0, 0)])
def test_memory_of_a_gpu_is_that_of_this_ranks(device, now, most, monkeypatch):
    """As PyTorch's allocator has it; a CPU is not asked."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda asked: 50 * asked.index)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda asked: 70 * asked.index)
    window = a_window(device=device)
    window.add(result(1, (1.0, 1.0)))
    values = window.close(1)
    assert (values["device_memory_bytes"], values["peak_device_memory_bytes"]) == (now, most)


def test_loads_are_rounded_and_worst_layers_add_up():
    window = a_window()
    for count_LE in ([[1.0, 2.0], [1.0, 0.0]], [[1.0, 1.0], [2.0, 5.0]], [[0.0, 1.0], [1.0, 1.0]]):
        window.add(replace(result(1, (1.0, 1.0)), count_LE=np.array(count_LE)))
    values = window.close(3)
    assert values["layer_load"] == [round(13 / 9, 6), round(31 / 21, 6)]
    assert values["expert_rows"] == [[0.667, 1.333], [1.333, 2.0]]
    assert values["load_max_over_mean"] == pytest.approx((2 + 10 / 7 + 2) / 3)


@pytest.mark.parametrize("links", [True, False])
def test_lists_that_nobody_fills_are_empty(links):
    """Dense: there are no rows. Many ranks: links are not told."""
    window = a_window()
    step, none = result(1, (1.0, 1.0)), np.zeros((0, 0))
    if links:
        window.add(replace(step, count_LE=none))
    else:
        window.add(replace(step, sent_bytes_PG=np.zeros((2, 0))))
    values = window.close(1)
    assert values["link_bytes"] == []
    for name in ("rank_rows", "rank_wire_bytes", "layer_load", "expert_rows"):
        assert (values[name] == []) == links, name


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
