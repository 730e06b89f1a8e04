"""Several corpora read as one training text, each as often as its weight says, without a copy.

The text is a row of stretches of equal length, each of one corpus: in a cycle of as many stretches as the weights sum
up to, each corpus has its weight, spread evenly. A corpus goes on in its next stretch where it was, and from its
beginning after its end. A pass over the mixture is the fewest whole cycles in which every corpus is read to its end. So
the mixture is a pure function of weights and lengths, and a position in it says where each corpus stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.errors import require


@dataclass(frozen=True, slots=True)
class Mixture:
    """Ids [len] that behave as an array where they are read: by a range, or by an array of places.

    Example: corpora 0 1 2 3 4 and 10 11 with weights 2 and 1 in stretches of 2: the cycle is first, second, first, and
    a pass 0 1 10 11 2 3 4 0 10 11 1 2: two cycles until the first corpus was read to its end.
    """

    ids: Ids  # the corpora one after the other
    ends: Sequence[int]  # of each of them
    weights: Sequence[int]
    stretch: int
    _first: NDArray[np.int64] = field(init=False, repr=False)  # where each corpus begins
    _length: NDArray[np.int64] = field(init=False, repr=False)
    _corpus: NDArray[np.int64] = field(init=False, repr=False)  # of each stretch of a cycle
    _before: NDArray[np.int64] = field(init=False, repr=False)  # stretches of the same corpus earlier in the cycle

    def __post_init__(self) -> None:
        first = np.array([0, *self.ends[:-1]], np.int64)
        require(
            len(self.weights) == len(self.ends),
            f"corpus.weights={list(self.weights)}: {len(self.ends)} corpora need as many weights",
        )
        corpus, before = _cycle(self.weights)
        length = np.array(self.ends, np.int64) - first
        for name, value in (("_first", first), ("_length", length), ("_corpus", corpus), ("_before", before)):
            object.__setattr__(self, name, value)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Number format of the ids."""
        return self.ids.dtype

    @property
    def size(self) -> int:
        """Ids of a pass."""
        return len(self)

    def __len__(self) -> int:
        weight = np.array(self.weights, np.int64)
        cycles = -(-self._length // (weight * self.stretch))
        return int(cycles.max()) * len(self._corpus) * self.stretch

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            place = np.arange(*place.indices(len(self)))
        place = np.asarray(place)
        return self.ids[self.source(np.where(place < 0, place + len(self), place))]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)

    def source(self, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in `ids` the places of the mixture are read."""
        stretch, offset = np.divmod(place, self.stretch)
        cycle, slot = np.divmod(stretch, len(self._corpus))
        corpus = self._corpus[slot]
        number = cycle * np.array(self.weights, np.int64)[corpus] + self._before[slot]
        return self._first[corpus] + (number * self.stretch + offset) % self._length[corpus]

    def document_starts(self, ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in the mixture another document starts, ascending: also at a stretch of another corpus.

        Args:
            ends: of documents in `ids`, ascending.

        Example: the corpora of the example above, with a document end after the 2 of the first: places 2, 4, 5, 7, 8,
        10.
        """
        change = np.flatnonzero(self._corpus != np.roll(self._corpus, 1))
        cycles = len(self) // (self.stretch * len(self._corpus))
        stretch = np.arange(cycles)[:, None] * len(self._corpus) + change
        found = [stretch.ravel() * self.stretch]
        for corpus, (first, length, weight) in enumerate(zip(self._first, self._length, self.weights, strict=True)):
            own = ends[slice(*np.searchsorted(ends, (first + 1, first + length)))] - first
            own = np.concatenate([[0], own])
            read = cycles * weight * self.stretch
            start = (np.arange(-(-read // length))[:, None] * length + own).ravel()
            number, offset = np.divmod(start[start < read], self.stretch)
            cycle, before = np.divmod(number, weight)
            slot = np.flatnonzero(self._corpus == corpus)[before]
            found.append((cycle * len(self._corpus) + slot) * self.stretch + offset)
        starts = np.unique(np.concatenate(found))
        return starts[starts > 0]


def _cycle(weights: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the corpus of each stretch of a cycle, and how many of the same are before it.

    Each stretch goes to the corpus that is furthest behind its share (smooth weighted round-robin).
    """
    behind, seen = [0] * len(weights), [0] * len(weights)
    corpus, before = [], []
    for _ in range(sum(weights)):
        behind = [have + weight for have, weight in zip(behind, weights, strict=True)]
        chosen = behind.index(max(behind))
        behind[chosen] -= sum(weights)
        corpus.append(chosen)
        before.append(seen[chosen])
        seen[chosen] += 1
    return np.array(corpus, np.int64), np.array(before, np.int64)
