"""From the n-gram that ends at a token to a row of a table, whatever the table holds.

An n-gram's key is its own number, base vocabulary size, where all n-grams have numbers below 2**63, otherwise a hash of
its ids. The row is the key itself when all n-grams have a row each, otherwise a stateless hash of it
(engine/routing/hashing.py), so that every table of a run has collisions of its own.

Letters: B streams, Q segment length, C ids left of a segment, at least ngram - 1; X = C + Q.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.errors import require
from foreroute.engine.routing.hashing import Purpose, hash64
from foreroute.engine.routing.loops.hashes import hash_rows

_MOST_IDS = 1 << 31
Width = TypeVar("Width", np.int32, np.int64)


def ngram_keys(
    id_BX: NDArray[np.integer[Any]], vocab_size: int, ngram: int, new_document_BX: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Return the key of the n-gram that ends at each id but the first ngram - 1: int64 [B, X - ngram + 1].

    Args:
        new_document_BX: true where a document begins; ids before it count as 0 for it and for the ids behind it.

    Raises:
        UserError: the vocabulary has more than 2**31 ids.

    Example: bigrams of 10 symbols: ids [[7, 3, 4]] have the keys [[73, 34]], and [[73, 4]] if the 4 begins a document.
    """
    require(vocab_size <= _MOST_IDS, f"a vocabulary of {vocab_size} ids: must have at most {_MOST_IDS}")
    size = id_BX.shape[1] - ngram + 1
    parts = [id_BX[:, ngram - 1 :].astype(np.int64)]  # of each n-gram the last id, the one before it, ...
    hidden_BQ = np.zeros(parts[0].shape, bool)  # from here on the ids are of another document
    for back in range(1, ngram):
        part_BQ = id_BX[:, ngram - 1 - back :][:, :size].astype(np.int64)
        if new_document_BX is not None:
            hidden_BQ |= new_document_BX[:, ngram - back :][:, :size]
            part_BQ[hidden_BQ] = 0
        parts.append(part_BQ)
    if vocab_size**ngram >= 1 << 63:
        return hash64(*parts[::-1]).view(np.int64)
    key_BQ = parts.pop()
    while parts:
        key_BQ *= vocab_size
        key_BQ += parts.pop()
    return key_BQ


@dataclass(frozen=True, slots=True)
class KeyRows:
    """The map from n-grams to the rows of one table of `rows` rows."""

    ngram: int
    vocab_size: int
    rows: int
    seed: int
    index: int  # number of the table within the run
    purpose: Purpose = Purpose.row

    def of(self, ids_BQ: Tensor, left_BC: Tensor, new_document_BX: Tensor | None = None) -> Tensor:
        """Return the int64 row [B, Q] of each id, given the true ids left of each segment, of which the last ngram - 1
        matter.

        Args:
            new_document_BX: of the ids left of the segment and its own, as for ngram_keys; bool.

        Raises:
            ValueError: too few ids left.

        Example: bigrams of 10 symbols in at least 100 rows: ids [[3, 4]] with left [[7]] give rows [[73, 34]].
        """
        return torch.from_numpy(self.of_keys(self.keys(ids_BQ, left_BC, new_document_BX)))

    def keys(self, ids_BQ: Tensor, left_BC: Tensor, new_document_BX: Tensor | None = None) -> NDArray[np.int64]:
        """Return the int64 key [B, Q] of each id; arguments and errors as for `of`.

        It depends on vocab_size and ngram alone, so tables share it.
        """
        spare = left_BC.shape[1] - (self.ngram - 1)
        if spare < 0:
            raise ValueError(f"left_BC has {left_BC.shape[1]} ids: ngram={self.ngram} needs {self.ngram - 1}")
        stream = torch.cat([left_BC[:, spare:], ids_BQ], dim=1).numpy()
        marks = None if new_document_BX is None else new_document_BX[:, spare:].numpy()
        return ngram_keys(stream, self.vocab_size, self.ngram, marks)

    def of_keys(self, keys: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the int64 row of each key: the key itself if all n-grams fit."""
        return self._of_keys(keys, np.int64)

    def narrow(self, keys: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        """Return the row of each key as int32, as the planner reads it."""
        return self._of_keys(keys, np.int32)

    def _of_keys(self, keys: NDArray[np.integer[Any]], dtype: type[Width]) -> NDArray[Width]:
        if self.vocab_size**self.ngram <= self.rows:
            return keys.astype(dtype, copy=False)
        row_N = np.empty(keys.size, dtype)
        state = np.uint64(hash64(self.purpose, self.seed, self.index))
        hash_rows(state, np.ascontiguousarray(keys).reshape(-1), self.rows, row_N)
        return row_N.reshape(keys.shape)
