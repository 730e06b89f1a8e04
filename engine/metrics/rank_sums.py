"""One sum over all ranks in each step, with which the ranks tell each other their numbers; it stays on the device.

It carries the losses, the rows of each expert, and a block in which each rank fills the row of its own. So every rank
knows every other's times, memory, rows and bytes, and no further collective is needed.

Letters: L layers, E experts, P ranks of the run, G ranks of an expert group.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.model.transformer_xl import Output
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.kernels.launching import to_device

Numbers = NDArray[np.float64]


@dataclass(slots=True)
class RankRow:
    """The numbers of a step that a rank tells the others. A rank that fails ends instead; it has no number here."""

    stop_asked: float = 0.0  # 1: yes
    save_asked: float = 0.0  # likewise, for a checkpoint after this step
    own_ms: float = 0.0  # of the step before (StepTimes), or on a GPU of one that it is past; 0: none
    exchange_exposed_ms: float = 0.0  # likewise
    plan_wait_ms: float = 0.0
    memory_bytes: float = 0.0  # resident memory of the process
    wire_bytes: float = 0.0  # sent to other ranks
    wire_bytes_inside: float = 0.0  # of these, to ranks of the same node
    table_bytes: float = 0.0  # sent to other ranks for n-gram tables
    rows: float = 0.0  # expert rows that the rank computed, in all layers; filled in by sum_over_ranks


MOST_RANKS = 16
"""Up to so many ranks each tells what it sent to each: the bytes grow with the square of the ranks."""
_NAMES = [field.name for field in fields(RankRow)]


class Totals(NamedTuple):
    """The sums of a step; the same on every rank."""

    loss: float  # mean nats per symbol over micro-batches and ranks, without auxiliary losses
    auxiliary_loss: float
    ranks: Mapping[str, Numbers]  # every rank's RankRow: [P] by its name
    sent_bytes_PG: Numbers  # from each rank to each of its expert group; [P, 0] on one rank and on more than MOST_RANKS
    count_LE: Numbers
    """Rows of each expert over all ranks, and nan after the last of a layer that has fewer than others; [0, 0] when
    dense."""


@dataclass(frozen=True, slots=True)
class RankSum:
    """A step added up over its micro-batches and ranks, on the device."""

    values: Tensor  # fp64: nats, auxiliary loss, block, rows of each expert, one after the other
    passes: int  # micro-batches of all ranks
    block_shape: tuple[int, int]
    experts_L: tuple[int, ...]
    ep_size: int

    @property
    def is_finite(self) -> Tensor:
        """Whether the loss is finite, a bool scalar on the device."""
        return self.values[:2].sum().isfinite()

    @property
    def count_LE(self) -> Tensor:
        """The rows of each layer's experts over all ranks, fp64 on the device; 0 after the last of a layer that has
        fewer than others."""
        count_X = self.values[2 + math.prod(self.block_shape) :]
        return count_X.view(self._counts_shape) / self.ep_size

    def split(self, values: Numbers) -> Totals:
        """Return the numbers, from `values` copied to the host."""
        (loss, auxiliary_loss), told, count_X = np.split(values, [2, 2 + math.prod(self.block_shape)])
        row_PX, sent_bytes_PG = np.split(told.reshape(self.block_shape), [len(_NAMES)], axis=1)
        return Totals(
            float(loss) / self.passes,
            float(auxiliary_loss) / self.passes,
            dict(zip(_NAMES, row_PX.T, strict=True)),
            sent_bytes_PG,
            self._without_padding(count_X.reshape(self._counts_shape) / self.ep_size),
        )

    @property
    def _counts_shape(self) -> tuple[int, int]:
        return len(self.experts_L), max(self.experts_L, default=0)

    def _without_padding(self, count_LE: Numbers) -> Numbers:
        is_expert_LE = np.arange(count_LE.shape[1]) < np.array(self.experts_L).reshape(-1, 1)
        found: Numbers = np.where(is_expert_LE, count_LE, np.nan)
        return found


def sum_over_ranks(
    outputs: list[Output], world: World, row: RankRow, sent_bytes_G: Sequence[int] = (), experts_L: Sequence[int] = ()
) -> RankSum:
    """Add up a step over its micro-batches and ranks; a collective. No sync with the host.

    Leaves: about 16 x (2 + P x (10 + G) + L x E) bytes.

    Args:
        row: of this rank.
        sent_bytes_G: by this rank to each rank of its expert group.
        experts_L: experts of each layer; empty: as many as are counted.
    """
    mesh = world.mesh
    nll = torch.stack([output.nll_BQ.mean() for output in outputs]).double().sum()
    auxiliary = torch.stack([output.auxiliary_loss for output in outputs]).double().sum()
    counts = [output.count_LE for output in outputs if output.count_LE is not None]
    block = _block(row, sent_bytes_G, mesh)
    parts = [torch.stack((nll, auxiliary)), to_device(block.flatten(), nll.device)]
    if counts:
        count_LE = torch.stack(counts).sum(0).to(nll.device, torch.float64)
        experts_L = experts_L or [count_LE.shape[1]] * count_LE.shape[0]
        parts[1][mesh.rank * block.shape[1] + _NAMES.index("rows")] = _local_rows(count_LE, experts_L, mesh)
        parts.append(count_LE.flatten())
    values = world.sum(torch.cat(parts))
    shape = block.shape[0], block.shape[1]
    return RankSum(values, len(outputs) * mesh.world, shape, tuple(experts_L), mesh.ep_size)


def _local_rows(count_LE: Tensor, experts_L: Sequence[int], mesh: Mesh) -> Tensor:
    """Add up the rows of this rank's experts."""
    here_L = [mesh.local_experts(experts) for experts in experts_L]
    if len(set(experts_L)) == 1:
        return count_LE[:, here_L[0].start : here_L[0].stop].sum()
    return torch.stack([count_LE[y, here.start : here.stop].sum() for y, here in enumerate(here_L)]).sum()


def _block(row: RankRow, sent_bytes_G: Sequence[int], mesh: Mesh) -> Tensor:
    """Return a block with a row for each rank, in which this rank's alone is filled, to be added up."""
    links = list(sent_bytes_G) if 1 < mesh.world <= MOST_RANKS else []
    block = np.zeros((mesh.world, len(_NAMES) + len(links)))
    block[mesh.rank] = [getattr(row, name) for name in _NAMES] + links
    return torch.from_numpy(block)
