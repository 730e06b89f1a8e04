"""The other ranks' requests for this rank's rows of n-gram tables, which they would send from host to host.

They depend on ids alone, so the loader's thread computes them from the text, as each rank would.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.data.planned_batches import TrainingBatches
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plans.row_plan import row_request


class _Asking(CpuGroup):
    """All hosts in one step.

    Args:
        request_of: what a rank sends to this one.
    """

    def __init__(self, mesh: Mesh, request_of: Callable[[int], NDArray[np.int32]]) -> None:
        self.rank, self.ranks, self._request_of = mesh.rank, mesh.world, request_of

    def all_to_all(self, parts: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return what each rank sends to this one."""
        return [parts[rank] if rank == self.rank else self._request_of(rank) for rank in range(self.ranks)]


class LoneBatches(TrainingBatches):
    """A rank's batches, planned without the other ranks' hosts."""

    def hosts(self, step: int) -> CpuGroup:
        """Return hosts that ask for what the ranks of the run ask for in this step."""
        mesh = self.mesh

        def request_of(rank: int) -> NDArray[np.int32]:
            return row_request(self.table_keys, self.passes(step, rank), mesh.world, mesh.rank)

        return _Asking(mesh, request_of)


def without_others(batches: TrainingBatches) -> LoneBatches:
    """Return the same batches, planned without the other ranks' hosts."""
    return LoneBatches(**{field.name: getattr(batches, field.name) for field in fields(batches)})
