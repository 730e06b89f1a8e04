"""From n-grams to the rows of one table by this program's hash: several orders n, several heads for each.

The rows of all orders and heads are numbered one after the other, order by order. Each head has a hash of its own; no
router uses those of tables whose rows the ranks share out.

Letters: B streams, Q segment length, C ids left of a segment, X = C + Q, H heads of all orders.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from foreroute.engine.routing.hashing import Purpose
from foreroute.engine.routing.ngram_rows import KeyRows

_MOST_HEADS = 1 << 16


@dataclass(frozen=True, slots=True)
class HashKeys:
    """The rows that n-grams have in one table (engine/routing/plans/row_plan.py, TableKeys).

    Args:
        each: how n-grams find the rows of each head, all of as many; heads of one order follow each other.
    """

    each: tuple[KeyRows, ...]
    whole: bool = False

    @property
    def context(self) -> int:
        """Ids left of a segment that the n-grams reach."""
        return max(head.ngram for head in self.each) - 1

    @property
    def heads(self) -> int:
        """Rows that each token reads (H)."""
        return len(self.each)

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.heads * self.each[0].rows

    def rows_of(self, ids_BQ: Tensor, left_BC: Tensor, new_document_BX: Tensor | None = None) -> Tensor:
        """Return the rows that each id reads, int64 [B, Q, H]; arguments and errors as for KeyRows.of.

        Example: orders 1 and 2, one head of 100 rows each, 10 symbols: ids [[3, 4]] with left [[7]] read the rows
        [[[3, 173], [4, 134]]].
        """
        found = []
        for _, heads in groupby(self.each, key=lambda head: head.ngram):
            first, *others = heads
            keys = first.keys(ids_BQ, left_BC, new_document_BX)
            found += [torch.from_numpy(head.of_keys(keys)) for head in (first, *others)]
        return torch.stack(found, dim=-1) + self.each[0].rows * torch.arange(self.heads)


def hash_keys(orders: Sequence[int], heads: int, rows: int, *, vocab_size: int, seed: int, table: int) -> HashKeys:
    """Return the keys of a table whose rows the ranks share out.

    Args:
        heads, rows: of each order, and of each of its heads.
        table: its number within the run.
    """

    def of_head(order: int, head: int) -> KeyRows:
        index = (table * _MOST_HEADS + head) * 8 + order
        return KeyRows(order, vocab_size, rows, seed, index, Purpose.table_row)

    return HashKeys(tuple(of_head(order, head) for order in orders for head in range(heads)))
