"""The ranks of a run as the rest of the engine sees them; `World()` is one rank alone.

`together` and `agree` belong to start-up: a failure of one rank ends all ranks with the same line, and a rank that was
started differently is named.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foreroute.engine.errors import RunFailed, UserError, everywhere
from foreroute.engine.parallel.collectives import all_reduce_sum
from foreroute.engine.parallel.cpu_group import CpuGroup, odd_ones
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class World:
    """This rank's place and its connections to the others."""

    mesh: Mesh = field(default_factory=Mesh)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cpu_group: CpuGroup = field(default_factory=CpuGroup)  # all ranks; for the main thread
    planning: CpuGroup = field(default_factory=CpuGroup)  # all ranks; for the loader's thread
    planning_group: CpuGroup = field(default_factory=CpuGroup)  # the expert group; for the loader's thread
    watchdog: Watchdog = field(default_factory=Watchdog)
    node_P: tuple[int, ...] = ()  # each rank's node, from 0 on; empty: all are on one

    @property
    def first(self) -> bool:
        """This is rank 0, which writes and speaks."""
        return self.mesh.rank == 0

    @property
    def nodes(self) -> int:
        """Nodes on which there are ranks."""
        return len(set(self.node_P)) or 1

    def near(self, ranks: Iterable[int]) -> list[bool]:
        """Return for each of these ranks whether it is on this rank's node.

        Example: rank 1 of ranks on the nodes (0, 0, 1): ranks 0 and 2 are [True, False].
        """
        return [not self.node_P or self.node_P[rank] == self.node_P[self.mesh.rank] for rank in ranks]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the ranks' values."""
        return all_reduce_sum(values) if self.mesh.world > 1 else values


@contextmanager
def together(cpu_group: CpuGroup, *, rank_0_first: bool = False, watchdog: Watchdog | None = None) -> Iterator[None]:
    """Run the block on every rank; an error that one rank raises in it ends the block on all ranks.

    Args:
        rank_0_first: the other ranks enter the block after rank 0 has left it, and find what it wrote to the disk.
        watchdog: for a block with collectives, in which the others would wait for a rank that failed; it ends them.

    Raises:
        UserError, RunFailed: of the first rank that raised one (an OSError counts as UserError).
    """
    if cpu_group.ranks == 1:
        yield
        return
    if rank_0_first and cpu_group.rank > 0:
        _raise_first([cpu_group.broadcast(None)])
    problem: list[str] | None = None
    try:
        yield
    except (UserError, RunFailed, OSError) as error:
        problem = ["failed" if isinstance(error, RunFailed) else "user", str(error)]
        if watchdog is not None:
            watchdog.report(str(error))
    if rank_0_first and cpu_group.rank == 0:
        _raise_first([cpu_group.broadcast(problem)])
    _raise_first(cpu_group.gather(problem))


def _raise_first(problems: list[list[str] | None]) -> None:
    for rank, problem in enumerate(problems):
        if problem is not None:
            kind, text = problem
            message = f"rank {rank}: {text}" if rank else text
            raise everywhere(UserError(message) if kind == "user" else RunFailed(message))


def agree(cpu_group: CpuGroup, facts: Mapping[str, Any]) -> None:
    """Compare facts (JSON) between the ranks.

    Raises:
        UserError: on every rank; names a fact that differs, the ranks and their values.
    """
    everyone = cpu_group.gather(dict(facts))
    for name in facts:
        values = [str(other.get(name)) for other in everyone]
        if len(set(values)) > 1:
            raise everywhere(UserError(f"{name} differs between the ranks: {odd_ones(values)}"))
