"""The collectives that move rows between the ranks of an expert group, and a count of the bytes that leave this rank.

Splits come from the Plan and are known on the host: nothing here asks another rank how much will come, and nothing is
read back from a device. A rank's own rows stay on it and do not count.

Letters: P ranks of the group, D columns.
"""

from dataclasses import dataclass, field

from torch import Tensor
from torch import distributed as dist


@dataclass(slots=True)
class Wire:
    """One process group and what this rank has sent through it."""

    group: dist.ProcessGroup
    sent_bytes: int = 0
    collectives: int = 0
    rank: int = field(init=False)
    ranks: int = field(init=False)

    def __post_init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)

    def all_to_all(self, rows: Tensor, splits: tuple[int, ...], got_splits: tuple[int, ...]) -> Tensor:  # fmt: skip
        """Send rows[splits[0] + .. + splits[q-1] :][: splits[q]] to rank q; give what came, rank by rank.

        Expert group; [sum(splits), D] to [sum(got_splits), D]; leaves: rows to other ranks x D x item bytes. No sync
        with the host.
        """
        got = rows.new_empty(sum(got_splits), rows.shape[1])
        self._count(rows, sum(splits) - splits[self.rank])
        dist.all_to_all_single(got, rows, list(got_splits), list(splits), group=self.group)
        return got

    def all_gather(self, rows: Tensor) -> Tensor:
        """Give the rows of all ranks, rank by rank: [T, D] to [P * T, D]; leaves: (P - 1) x T x D x item bytes."""
        got = rows.new_empty(self.ranks * rows.shape[0], rows.shape[1])
        self._count(rows, (self.ranks - 1) * rows.shape[0])
        dist.all_gather_into_tensor(got, rows, group=self.group)
        return got

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """Add up the ranks' rows and keep this rank's part: [P * T, D] to [T, D]; leaves (P - 1) x T x D x item bytes."""
        got = rows.new_empty(rows.shape[0] // self.ranks, rows.shape[1])
        self._count(rows, (self.ranks - 1) * got.shape[0])
        dist.reduce_scatter_tensor(got, rows, group=self.group)
        return got

    def _count(self, rows: Tensor, num_rows: int) -> None:
        self.collectives += 1
        self.sent_bytes += num_rows * rows.shape[1] * rows.element_size()


def add_up(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Give the sum of the ranks' values. Any group; leaves: about 2 x value's bytes; no sync with the host."""
    total = value.clone()
    dist.all_reduce(total, group=group)
    return total
