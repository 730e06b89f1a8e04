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

from foreroute.engine.config import Config, Keys, Router
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
        """Expert groups."""
        return self.world_size // self.expert_ranks

    @property
    def group_nodes(self) -> int:
        """Nodes of an expert group (h)."""
        return max(1, self.expert_ranks // self._ranks_here)

    @property
    def same_node_PP(self) -> NDArray[np.bool_]:
        """Say which ranks of a group are on one node."""
        node_P = np.arange(self.expert_ranks) * self.group_nodes // self.expert_ranks
        same_PP: NDArray[np.bool_] = node_P[:, None] == node_P
        return same_PP

    def check(self, config: Config) -> None:
        """Refuse a configuration that cannot be certified on these ranks.

        Raises:
            UserError: experts or streams cannot be shared out evenly, or routes are not known before the run.
        """
        router = config.moe.router
        require(
            router is not Router.dense,
            "moe.router=dense: no experts and no rows that travel, so there is nothing to certify",
        )
        why = ""
        if router in (Router.frozen, Router.learned):
            why = "routes depend on hidden states, so rows and bytes are not known before the run; "
        elif router in (Router.fresh, Router.stochastic):
            why = "routes are drawn at each forward pass and not replayed; "
        require(router is Router.hashed, f"moe.router={router.name}: {why}only hashed can be certified")
        require(
            config.moe.keys is Keys.own,
            f"moe.keys={config.moe.keys.name}: routes are drawn at each forward pass and not replayed; only own can be"
            " certified",
        )
        require(
            config.expert_layers == config.model.layers,
            f"moe.layers={config.moe.layers} of model.layers={config.model.layers}: only models with experts in every"
            " layer can be certified",
        )
        Mesh(0, self.world_size, self.expert_ranks).local_experts(config.moe.experts)
        config.streams_per_micro_batch(self.world_size)

    @property
    def _ranks_here(self) -> int:
        return min(self.ranks_per_node, self.world_size)
