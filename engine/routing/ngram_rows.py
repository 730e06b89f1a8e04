"""From the n-gram that ends at a token to a row of a table, whatever the table holds.

The row is the n-gram's own number when all n-grams have a row each, otherwise a stateless hash of it
(engine/routing/hashing.py), so that every table of a run has collisions of its own.

Letters: B streams, Q segment length, C ids left of a segment, at least ngram - 1.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.routing.hashing import hash64

_ROW = 1  # first part of the hash: what it is for; engine/routing/tables.py and routers.py have other numbers


@dataclass(frozen=True, slots=True)
class KeyRows:
    """How one table of `rows` rows finds the row of an n-gram."""

    ngram: int
    vocab_size: int
    rows: int
    seed: int
    index: int  # number of the table within the run

    def of(self, ids_BQ: Tensor, left_BC: Tensor) -> Tensor:
        """Return the int64 row [B, Q] of each id, given the true ids left of each segment, of which the last ngram - 1
        matter.

        Raises:
            ValueError: fewer.

        Example: bigrams of 10 symbols in at least 100 rows: ids [[3, 4]] with left [[7]] give rows [[73, 34]].
        """
        segment, spare = ids_BQ.shape[1], left_BC.shape[1] - (self.ngram - 1)
        if spare < 0:
            raise ValueError(f"left_BC has {left_BC.shape[1]} ids: ngram={self.ngram} needs {self.ngram - 1}")
        stream = torch.cat([left_BC[:, spare:], ids_BQ], dim=1).numpy()
        key_BQ = stream[:, :segment]
        for shift in range(1, self.ngram):
            key_BQ = key_BQ * self.vocab_size + stream[:, shift : shift + segment]
        return torch.from_numpy(self.of_keys(key_BQ))

    def of_keys(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of n-grams given as numbers (base vocab_size, newest id last): the number itself if all
        fit."""
        if self.vocab_size**self.ngram <= self.rows:
            return keys
        return (hash64(_ROW, self.seed, self.index, keys) % np.uint64(self.rows)).astype(np.int64)
