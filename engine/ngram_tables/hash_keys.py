"""From n-grams to the rows of one table by this program's hash: several orders n, several heads for each.

The rows of all orders and heads are numbered one after the other, order by order. Each head has a hash of its own,
which no router uses.

Letters: B streams, Q segment length, C ids left of a segment, X = C + Q, H heads of all orders.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foreroute.engine.routing.hashing import Purpose
from foreroute.engine.routing.ngram_rows import KeyRows

_MOST_HEADS = 1 << 16


@dataclass(frozen=True, slots=True)
class HashKeys:
    """The rows that n-grams have in one table (engine/routing/plans/row_plan.py, TableKeys)."""

    orders: tuple[int, ...]
    heads_of_order: int
    head_rows: int
    vocab_size: int
    seed: int
    table: int  # its number within the run

    @property
    def context(self) -> int:
        """Ids left of a segment that the n-grams reach."""
        return max(self.orders) - 1

    @property
    def heads(self) -> int:
        """Rows that each token reads (H)."""
        return len(self.orders) * self.heads_of_order

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.heads * self.head_rows

    def rows_of(self, ids_BQ: Tensor, left_BC: Tensor, new_document_BX: Tensor | None = None) -> Tensor:
        """Return the rows that each id reads, int64 [B, Q, H]; arguments and errors as for KeyRows.of.

        Example: orders 1 and 2, one head of 100 rows each, 10 symbols: ids [[3, 4]] with left [[7]] read the rows
        [[[3, 173], [4, 134]]].
        """
        found = []
        for order in self.orders:
            heads = [self._head(order, head) for head in range(self.heads_of_order)]
            keys = heads[0].keys(ids_BQ, left_BC, new_document_BX)
            found += [torch.from_numpy(head.of_keys(keys)) for head in heads]
        return torch.stack(found, dim=-1) + self.head_rows * torch.arange(self.heads)

    def _head(self, order: int, head: int) -> KeyRows:
        index = (self.table * _MOST_HEADS + head) * 8 + order
        return KeyRows(order, self.vocab_size, self.head_rows, self.seed, index, Purpose.table_row)
