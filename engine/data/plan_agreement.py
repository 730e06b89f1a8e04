"""Consistency check of the ranks' plans, for every micro-batch, ahead of its step, over host connections.

A rank with another k, table or text would wait for rows that nobody sends, or misread the rows that it gets. So before
a plan may be used, the ranks compare the inputs of their plans and the sizes of their messages. A difference ends every
rank, with a message that names the rank that differs.

Letters: P ranks of the expert group, y tables.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.errors import RunFailed, everywhere
from foreroute.engine.parallel.cpu_group import CpuGroup, odd_ones
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Plan
from foreroute.engine.routing.planned_router import PlannedRouter
from foreroute.engine.routing.plans.row_plan import TableKeys, some_rows

if TYPE_CHECKING:  # the loader calls this file
    from foreroute.engine.data.planned_batches import GroupBatch

_FIELDS = ("step", "micro-batch", "number of active experts k", "tables", "token ids")


class Agreement:
    """Compares plans between the ranks; used by one thread of each rank, in the order of the steps."""

    def __init__(
        self,
        cpu_group: CpuGroup,
        mesh: Mesh,
        routers: Sequence[PlannedRouter] | None,
        table_keys: Sequence[TableKeys] = (),
    ) -> None:
        """Use connections to all ranks that no other thread uses.

        Args:
            routers: whose tables must agree.
            table_keys: of the n-gram tables, in which the same ids must have the same rows.
        """
        self._cpu_group, self._mesh = cpu_group, mesh
        self._tables = tables_digest(routers, table_keys)

    def check(self, step: int, micro: int, k: int, group: "GroupBatch", plans: tuple[Plan, ...] | None) -> None:
        """Compare this micro-batch's plans, of all its passes, with the other ranks'; collective.

        Raises:
            RunFailed: on every rank; names the difference, its place, and the ranks.
        """
        ranks = self._mesh.ep_size
        read = (group.ids_PBQ, group.left_PBC, group.stream_PB, group.new_document_PBX, group.place_PB)
        ids = _digest(*(tensor.numpy() for tensor in read if tensor is not None))
        send_Py = np.array([plan.send_splits for plan in plans or ()]).reshape(-1, ranks).T
        recv_Py = np.array([plan.recv_splits for plan in plans or ()]).reshape(-1, ranks).T
        sends, gets = ([_digest(split_y) for split_y in both] for both in (send_Py, recv_Py))
        own = np.array([step, micro, k, self._tables, ids, *sends, *gets], np.int64)
        self._compare(self._cpu_group.all_gather(own), f"step {step}, micro-batch {micro}")

    def _compare(self, found: NDArray[np.int64], where: str) -> None:
        world, ranks = found.shape[0], self._mesh.ep_size
        for column, name in enumerate(_FIELDS):
            size = ranks if name == "token ids" else world
            for first in range(0, world, size):
                values = found[first : first + size, column].tolist()
                if len(set(values)) > 1:
                    if name in ("tables", "token ids"):
                        values = [f"digest {value & 0xFFFFFFFF:08x}" for value in values]
                    odd = odd_ones(values, first=first)
                    what = f"the ranks differ in their {name}: {odd}"
                    raise everywhere(RunFailed(f"{where}: {what}"))
        start = len(_FIELDS)
        sends_GPP = found[:, start : start + ranks].reshape(-1, ranks, ranks)
        gets_GPP = found[:, start + ranks :].reshape(-1, ranks, ranks)
        wrong = np.argwhere(sends_GPP != gets_GPP.swapaxes(1, 2))
        if wrong.size:
            group, sender, receiver = (int(number) for number in wrong[0])
            sender, receiver = group * ranks + sender, group * ranks + receiver
            what = f"rank {sender} plans to send other numbers of rows to rank {receiver} than that one expects"
            raise everywhere(RunFailed(f"{where}: {what}"))


def tables_digest(routers: Sequence[PlannedRouter] | None, table_keys: Sequence[TableKeys] = ()) -> int:
    """Return a 64-bit digest of all tables, or of what routers draw from, and of the rows of some n-grams."""
    arrays = [array for router in routers or () for array in router.identity()]
    return _digest(*arrays, *map(some_rows, table_keys))


def _digest(*arrays: NDArray[np.generic]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
