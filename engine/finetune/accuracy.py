"""Accuracy of a classifier with its interval, against always giving one answer."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.stats import binomtest
from torch import Tensor

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """Bounds of a proportion, both in [0, 1]."""

    low: float
    high: float


class Majority(NamedTuple):
    """The most frequent label, the smallest of several, and its share."""

    label: int | str
    share: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Right answers among the examples."""

    correct: int
    examples: int  # at least 1

    @property
    def share(self) -> float:
        """Accuracy, in [0, 1]."""
        return self.correct / self.examples

    @property
    def interval(self) -> Interval:
        """Its 95 % interval."""
        return wilson(self.correct, self.examples)

    def beats(self, share: float) -> bool:
        """Return whether the whole interval lies above a share that is reached without looking."""
        return self.interval.low > share


def right_answers(logits_BA: Tensor, label_B: Tensor) -> Accuracy:
    """Count the examples whose largest logit is that of their label."""
    return Accuracy(int((logits_BA.argmax(dim=1) == label_B).sum()), len(label_B))


def wilson(correct: int, examples: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the score interval of a proportion (Wilson 1927), without continuity correction."""
    found = binomtest(correct, examples).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def majority(labels: Sequence[int]) -> Majority:
    """Measure the answer that is always the most frequent label."""
    counts = Counter(sorted(labels))
    ((label, count),) = counts.most_common(1)
    return Majority(label, count / len(labels))
