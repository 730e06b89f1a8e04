"""Loads and bytes of a run over its steps, thinned for a plot.

A value belongs to one step. A point holds the mean and the maximum of a run of counted steps, and the points together
hold every counted step once: a single bad step stays visible as a maximum, however long the run is.

Letters: g expert groups, P ranks of a group, s distinct steps, n counted steps, v values of a step.
"""

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.certificate.counts.replay import Counts, StepCounts

POINTS = 500

_NAMES = "k", "received_load", "computed_load", "expert_load", "busiest_rank_bytes", "mean_rank_bytes"


@dataclass(frozen=True, slots=True)
class MeanAndMax:
    """One quantity, point by point."""

    mean: list[float]
    max: list[float]


@dataclass(frozen=True, slots=True)
class StepSeries:
    """The steps of each point, with their loads and bytes.

    A load is the maximum over a step's layers, micro-batches and ranks (or experts of a group), over the mean of the
    same numbers; 1 is perfectly even, and a dense run has 0. Bytes are of a whole step: all layers, micro-batches and
    directions added up.
    """

    first_step: list[int]  # of each point, counted from 1
    last_step: list[int]
    k: MeanAndMax
    received_load: MeanAndMax  # rows that a rank receives by `tokens`, its own included
    computed_load: MeanAndMax  # expert rows that a rank computes
    expert_load: MeanAndMax  # rows of an expert
    busiest_rank_bytes: MeanAndMax  # that leave the rank which sends most, by the run's own exchange
    mean_rank_bytes: MeanAndMax  # that leave a rank in the mean, by the same exchange


class SeriesCollector:
    """Takes in a run step by step; keeps a few numbers for each distinct step."""

    def __init__(self) -> None:
        self._steps: list[NDArray[np.int64]] = []
        self._values = array("d")  # step after step, in the order of _NAMES

    def add(self, counts: StepCounts, left_bytes_gP: Counts) -> None:
        """Take in a step, with the bytes that leave each rank in it."""
        rows = counts.received_ymgP, counts.computed_ymgP, counts.experts
        loads = [float(values.max() / values.mean()) if values.size else 0.0 for values in rows]
        sent = float(left_bytes_gP.max()), float(left_bytes_gP.mean())
        self._steps.append(counts.steps)
        self._values.extend((counts.k, *loads, *sent))

    def series(self, points: int = POINTS) -> StepSeries:
        """Thin to at most so many points, runs of nearly equally many counted steps each.

        Example: the steps 1 to 7 as 3 points are the runs 1 to 2, 3 to 4 and 5 to 7.
        """
        step_n = np.concatenate(self._steps)
        order_n = step_n.argsort()
        step_n = step_n[order_n]
        times_s = [steps.size for steps in self._steps]
        distinct_n = np.repeat(np.arange(len(times_s)), times_s)[order_n]
        points = min(points, step_n.size)
        ends = np.arange(1, points + 1) * step_n.size // points
        starts = np.concatenate([[0], ends[:-1]])
        lines = {}
        values_sv = np.array(self._values).reshape(-1, len(_NAMES))
        for name, value_s in zip(_NAMES, values_sv.T, strict=True):
            value_n = value_s[distinct_n]
            mean = np.add.reduceat(value_n, starts) / (ends - starts)
            lines[name] = MeanAndMax(mean.tolist(), np.maximum.reduceat(value_n, starts).tolist())
        return StepSeries(first_step=(step_n[starts] + 1).tolist(), last_step=(step_n[ends - 1] + 1).tolist(), **lines)
