"""Dynamic top-p routing (Huang et al. 2024, arXiv 2403.07652) of one token, and its planned form, in plain loops."""

import math
from collections.abc import Sequence


def softmax(logits: Sequence[float]) -> list[float]:
    parts = [math.exp(value - max(logits)) for value in logits]
    return [part / sum(parts) for part in parts]


def dynamic_top_p(weights: Sequence[float], threshold: float) -> list[int]:
    """Return the experts in the order of descending weight, up to and with the first one whose cumulative weight is
    above the threshold; all of them if none is."""
    chosen, cumulative = [], 0.0
    for expert in sorted(range(len(weights)), key=lambda e: -weights[e]):
        chosen.append(expert)
        cumulative += weights[expert]
        if cumulative > threshold:
            break
    return chosen


def below_threshold(weights: Sequence[float], threshold: float) -> list[int]:
    """Return the experts in the order of descending weight whose cumulative weight is at most the threshold: none where
    the first one's is above."""
    return [expert for expert in dynamic_top_p(weights, threshold) if _up_to(weights, expert) <= threshold]


def _up_to(weights: Sequence[float], expert: int) -> float:
    order = sorted(range(len(weights)), key=lambda e: -weights[e])
    return sum(weights[e] for e in order[: order.index(expert) + 1])


def mean_number(rows: Sequence[Sequence[float]], uses: Sequence[int], threshold: float, least: int) -> float:
    """Return the mean number of experts over the uses of all rows."""
    rule = dynamic_top_p if least else below_threshold
    return sum(use * len(rule(row, threshold)) for row, use in zip(rows, uses, strict=True)) / sum(uses)


def solve_threshold(rows: Sequence[Sequence[float]], uses: Sequence[int], k: float, least: int) -> tuple[float, float]:
    """Return two thresholds next to each other: the largest found whose mean number is at most k, the least above."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_number(rows, uses, middle, least) <= k else (low, middle)
    return low, high
