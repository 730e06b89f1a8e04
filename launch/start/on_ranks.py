"""The options of programs that look at a run on ranks that are not there: launch.certify and launch.replay."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.time.cluster import ClusterConfig
from foreroute.engine.config import Backend, Config
from foreroute.engine.config.option import option
from foreroute.engine.errors import require

_RANKS_PER_NODE = 8  # where no cluster is named


@dataclass
class OnRanks(Config):
    """A run's configuration, the ranks it is to run on, and which of its steps to count."""

    world_size: int = option(1, "Ranks of the run.")
    expert_group: int | None = option(None, "Ranks of an expert group; None means parallel.expert_ranks.")
    ranks_per_node: int | None = option(None, "Ranks of a node; None means the cluster's, and 8 without one.")
    cluster: ClusterConfig | None = option(
        None, "What the run's time is modelled on: one of conf/cluster/; None models no time."
    )
    steps: int | None = option(None, "Count the first so many steps; None means train.steps.")
    sample: int = option(1, "Count every so manieth step only.")
    device_memory_gb: float | None = option(
        None,
        "Memory of a rank's device in 1e9 bytes: says whether the run fits, on a GPU unless kernels.backend=cpu. "
        "None: the cluster's; without one there is no verdict.",
    )

    def __post_init__(self) -> None:
        if self.expert_group is not None:
            self.parallel = replace(self.parallel, expert_ranks=self.expert_group)
        super().__post_init__()
        self.layout.check()
        self.layout.counted_steps(self.steps, self.sample)
        memory_gb = self.device_memory_gb
        require(
            memory_gb is None or (memory_gb * 1e9 >= 1 and math.isfinite(memory_gb)),
            f"device_memory_gb={memory_gb}: must be above 0, at least one byte, and finite",
        )
        for name in ("by_layer", "strata_experts") if self.cluster is not None else ():
            words = f"moe.{name} with cluster: the time of layers that differ is not modelled"
            require(not getattr(self.moe, name), words)
        self._check_backend()

    def _check_backend(self) -> None:
        """Refuse kernels that do not run on the cluster's devices."""
        if self.cluster is None:
            return
        runs = (Backend.auto, Backend.cpu if self.cluster.host_copies else Backend.triton)
        names = " or ".join(backend.value for backend in runs)
        require(
            self.kernels.backend in runs,
            f"kernels.backend={self.kernels.backend.value}: cluster={self.cluster.name} is modelled with {names} only",
        )

    @property
    def device_memory_bytes(self) -> int | None:
        """Memory of a rank's device; None if it was not given."""
        memory_gb = self.device_memory_gb
        if memory_gb is None and self.cluster is not None:
            memory_gb = self.cluster.device_memory_gb
        return None if memory_gb is None else int(memory_gb * 1e9)

    @property
    def layout(self) -> Layout:
        """The run on its ranks."""
        per_node = self.ranks_per_node
        if per_node is None:
            per_node = _RANKS_PER_NODE if self.cluster is None else self.cluster.ranks_per_node
        return Layout(self.alone(), Placement(self.world_size, self.parallel.expert_ranks, per_node))


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, before anything is counted.

    Raises:
        UserError: names it.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(
        there.is_dir() and os.access(there, os.W_OK), f"out={folder}: {there} is not a folder that can be written to"
    )
