"""The numbers of the steps since the last logged one, as the metrics of engine/metrics/names.py's METRICS.

Letters: L layers, E experts, P ranks of the run.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foreroute.engine.metrics.host_memory import memory_bytes, peak_memory_bytes
from foreroute.engine.metrics.peak_flops import Peak
from foreroute.engine.metrics.rank_sums import Numbers
from foreroute.engine.metrics.step_result import StepResult
from foreroute.engine.metrics.stragglers import skew
from foreroute.engine.metrics.timers import StepTimes
from foreroute.engine.model.flops import Arithmetic

Values = dict[str, Any]
"""Metrics by name: a number, or lists of them for a metric with axes."""
_TIMES = (*(time.name for time in fields(StepTimes)), "outside_ms")


class Window:
    """Sums over the steps since the last logged one; `close` makes metrics of them.

    Args:
        ranks: of the run.
        device: of this rank.
        peak: of one rank's device.
        flops: useful arithmetic before the first step.
    """

    def __init__(self, arithmetic: Arithmetic, *, ranks: int, device: torch.device, peak: Peak, flops: float) -> None:
        self._arithmetic = arithmetic
        self._num_ranks, self._device, self._peak = ranks, device, peak
        # since the start of the run: now, and at the last close
        self._flops = self._flops_before = flops
        self._reset()

    def _reset(self) -> None:
        self._steps = self._timed = 0
        self._loss = self._auxiliary_loss = self._worst_load = self._rank_load = 0.0
        self._ms = dict.fromkeys(_TIMES, 0.0)
        self._ranks: defaultdict[str, Numbers | float] = defaultdict(float)
        self._sent_bytes_PG: Numbers | float = 0.0
        self._count_LE: Numbers | float = 0.0
        self._load_L: Numbers | float = 0.0
        self._last: StepResult | None = None

    def add(self, result: StepResult) -> None:
        """Add a step."""
        self._steps += 1
        # own_ms is of an earlier step: the first step of a process has none
        self._timed += bool(result.ranks["own_ms"].any())
        self._loss += result.loss
        self._auxiliary_loss += result.auxiliary_loss
        for name in _TIMES:
            self._ms[name] += getattr(result.times, name)
        for name, value_P in result.ranks.items():
            self._ranks[name] = self._ranks[name] + value_P
        self._sent_bytes_PG += result.sent_bytes_PG
        self._flops += self._arithmetic.step_flops(result.k)
        if result.count_LE.size:
            load_L = _load(result.count_LE)
            rows_P = result.ranks["rows"]
            self._count_LE += result.count_LE
            self._load_L += load_L
            self._worst_load += float(load_L.max())
            self._rank_load += float(_load(rows_P))
        self._last = result

    @property
    def begun(self) -> bool:
        """Steps have come since the last close."""
        return self._steps > 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of metric code between steps as a part of the steps outside the model.

        Around `close` it belongs to the next window.
        """
        start, processor_s = time.perf_counter(), time.thread_time()
        yield
        metric_ms = 1e3 * (time.perf_counter() - start)
        self._ms["processor_ms"] += 1e3 * (time.thread_time() - processor_s)
        for name in ("metric_ms", "step_ms", "outside_ms"):
            self._ms[name] += metric_ms

    def own_ms_P(self) -> list[float]:
        """Return each rank's mean own time."""
        return self._ranks_mean("own_ms", self._timed)

    def close(self, step: int) -> Values:
        """Return the metrics of the window that ends after this step of the run, and start the next window."""
        assert self._last is not None, "a window has at least one step"
        values = {**self._training(step, self._last), **self._machine(), **self._traffic()}
        self._flops_before = self._flops
        self._reset()
        return values

    def progress(self, step: int) -> Values:
        """Return the metrics that a validation's line has as well."""
        return {"tokens": step * self._arithmetic.symbols_per_step, "flops": self._flops}

    def _training(self, step: int, last: StepResult) -> Values:
        steps = self._steps
        step_s = self._ms["step_ms"] / steps / 1e3
        tokens_per_second = self._arithmetic.symbols_per_step / step_s
        flops_per_second = (self._flops - self._flops_before) / steps / step_s
        peak = self._num_ranks * self._peak.flops
        return {
            "loss": self._loss / steps,
            "auxiliary_loss": self._auxiliary_loss / steps,
            "bpc": self._loss / steps / math.log(2),
            "k": last.k,
            "active_parameters": self._arithmetic.active_parameters(last.k),
            "learning_rate": last.learning_rate,
            "grad_norm": last.grad_norm,
            **self.progress(step),
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_rank": tokens_per_second / self._num_ranks,
            "mfu": flops_per_second / peak if peak else 0.0,
        }

    def _machine(self) -> Values:
        """Compute times and memory."""
        own_ms_P = self.own_ms_P()
        slowest_rank, rank_skew = skew(own_ms_P)
        gpu = self._device.type == "cuda"
        return {
            **{name: ms / self._steps for name, ms in self._ms.items()},
            "rank_own_ms": own_ms_P,
            "rank_plan_wait_ms": self._ranks_mean("plan_wait_ms"),
            "rank_exchange_exposed_ms": self._ranks_mean("exchange_exposed_ms", self._timed),
            "slowest_rank": slowest_rank,
            "rank_skew": rank_skew,
            "memory_bytes": memory_bytes(),
            "peak_memory_bytes": peak_memory_bytes(),
            "rank_memory_bytes": self._last.ranks["memory_bytes"].tolist() if self._last else [],
            "device_memory_bytes": torch.cuda.memory_allocated(self._device) if gpu else 0,
            "peak_device_memory_bytes": torch.cuda.max_memory_allocated(self._device) if gpu else 0,
        }

    def _traffic(self) -> Values:
        """Compute the experts' rows and the bytes that were exchanged; empty lists when dense."""
        steps, moe = self._steps, isinstance(self._count_LE, np.ndarray)
        wire_bytes_P = self._ranks_mean("wire_bytes")
        wire_bytes, inside = sum(wire_bytes_P), sum(self._ranks_mean("wire_bytes_inside"))
        links = isinstance(self._sent_bytes_PG, np.ndarray) and self._sent_bytes_PG.size > 0
        lists = {
            "rank_wire_bytes": wire_bytes_P,
            "link_bytes": np.divide(self._sent_bytes_PG, steps).tolist() if moe and links else [],
            "rank_rows": self._ranks_mean("rows"),
            # rounded: there are many of them in a line
            "layer_load": np.round(np.divide(self._load_L, steps), 6).tolist(),
            "expert_rows": [
                np.round(row_E[~np.isnan(row_E)] / steps, 3).tolist() for row_E in np.atleast_2d(self._count_LE)
            ],
        }
        return {
            "wire_bytes": wire_bytes,
            "wire_bytes_inside": inside,
            "wire_bytes_between": wire_bytes - inside,
            "table_bytes": sum(self._ranks_mean("table_bytes")),
            "load_max_over_mean": self._worst_load / steps,
            "rank_load_max_over_mean": self._rank_load / steps,
            **{name: found if moe else [] for name, found in lists.items()},
        }

    def _ranks_mean(self, name: str, steps: int | None = None) -> list[float]:
        """Return the mean of a number of RankRow for each rank; 0 where no step has it."""
        steps = self._steps if steps is None else steps
        found: list[float] = np.divide(self._ranks[name], max(1, steps)).tolist()
        return found


def _load(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Return the largest over the mean in the last dimension, nan apart; 1 where there is no row."""
    mean = np.nanmean(rows, -1)
    load: NDArray[np.float64] = np.where(mean > 0, np.nanmax(rows, -1) / np.where(mean > 0, mean, 1), 1)
    return load
