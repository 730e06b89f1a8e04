"""The process mesh: world = expert data parallel (EDP) x expert parallel (EP); an EP group is consecutive ranks.

Eight ranks in expert groups of four, 16 experts:

    rank                0     1     2     3      4     5     6     7
    expert (EP) group   0     0     0     0      1     1     1     1
    EP rank             0     1     2     3      0     1     2     3
    experts             0-3   4-7   8-11  12-15  0-3   4-7   8-11  12-15
    EDP group, with     4     5     6     7      0     1     2     3

Rows travel inside an expert group. The gradients of an expert are added up over the ranks that hold the same experts,
those of everything else over all ranks. DeepSpeed forms the same groups (engine/optim/deepspeed_engine.py).
"""

from dataclasses import dataclass

from foreroute.engine.errors import UserError


@dataclass(frozen=True, slots=True)
class Mesh:
    """A rank's place among the ranks of a run."""

    rank: int = 0
    world: int = 1
    ep_size: int = 1  # ranks of an expert group; parallel.expert_ranks

    def __post_init__(self) -> None:
        if self.world % self.ep_size:
            raise UserError(f"parallel.expert_ranks={self.ep_size}: must divide the number of ranks, {self.world}")

    @property
    def ep_rank(self) -> int:
        """Number of this rank in its expert group."""
        return self.rank % self.ep_size

    @property
    def expert_dp_rank(self) -> int:
        """Number of this rank's expert group: its rank in its expert data parallel group."""
        return self.rank // self.ep_size

    @property
    def ep_ranks(self) -> range:
        """Ranks of this rank's expert group."""
        first = self.rank - self.ep_rank
        return range(first, first + self.ep_size)

    @property
    def expert_dp_ranks(self) -> range:
        """Ranks that hold the same experts as this one: its expert data parallel group."""
        return range(self.ep_rank, self.world, self.ep_size)

    def local_experts(self, experts: int) -> range:
        """Return the global numbers of the experts that this rank holds.

        Raises:
            UserError: the experts cannot be shared out evenly.
        """
        if experts % self.ep_size:
            raise UserError(f"moe.experts={experts}: must be a multiple of parallel.expert_ranks={self.ep_size}")
        count = experts // self.ep_size
        return range(self.ep_rank * count, (self.ep_rank + 1) * count)
