"""Ranks, expert groups and nodes of the run that is to be certified.

Sixteen ranks, expert groups of eight, four ranks on a node: each group lies on two nodes.

    rank                 0-3   4-7   8-11  12-15
    expert group         0     0     1     1
    node                 0     1     2     3
    node of its group    0     1     0     1

Letters: P ranks of an expert group, h nodes of an expert group.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.errors import require
from foreroute.engine.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the ranks of a run stand; consecutive ranks form expert groups (engine/parallel/mesh.py) and nodes."""

    world_size: int = 1
    expert_ranks: int = 1
    """Ranks of an expert group (P)."""
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        for name in ("world_size", "expert_ranks", "ranks_per_node"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1")
        Mesh(0, self.world_size, self.expert_ranks)
        here = self._ranks_here
        require(
            here % self.expert_ranks == 0 or self.expert_ranks % here == 0,
            f"ranks_per_node={self.ranks_per_node}: must be a multiple or a divisor of the expert group's "
            f"{self.expert_ranks} ranks, so that every group lies on the nodes in the same way",
        )

    @property
    def groups(self) -> int:
        """Number of expert groups."""
        return self.world_size // self.expert_ranks

    @property
    def group_nodes(self) -> int:
        """Number of nodes of an expert group (h)."""
        return max(1, self.expert_ranks // self._ranks_here)

    @property
    def same_node_PP(self) -> NDArray[np.bool_]:
        """Return which ranks of a group are on one node."""
        node_P = np.arange(self.expert_ranks) * self.group_nodes // self.expert_ranks
        same_PP: NDArray[np.bool_] = node_P[:, None] == node_P
        return same_PP

    @property
    def _ranks_here(self) -> int:
        return min(self.ranks_per_node, self.world_size)
