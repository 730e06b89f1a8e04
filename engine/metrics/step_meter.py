"""The measurements of one rank's steps: a timer, and the sum over the ranks, to which this rank adds its row."""

import torch
from torch import nn

from foreroute.engine.metrics.host_memory import memory_bytes
from foreroute.engine.metrics.rank_sums import RankRow, RankSum, sum_over_ranks
from foreroute.engine.metrics.timers import StepTimer, StepTimes
from foreroute.engine.model.transformer_xl import Output
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.ngram_tables.tables import NgramTables
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.world import World


class StepMeter:
    """Measures the steps of a model in training, one after the other.

    Args:
        device: where the model lives.
        comm: through which its layers exchange rows; None if experts are not shared out.
        world: the ranks; one alone by default.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, comm: ExpertGroupComm | None = None, world: World | None = None
    ) -> None:
        self._tables = [module for module in model.modules() if isinstance(module, NgramTables)]
        self.timer = StepTimer(model, device, comm, *(tables.comm for tables in self._tables))
        self._comm, self._world = comm, world or World()
        self._experts_L = [layer.num_experts for layer in model.modules() if isinstance(layer, MoELayer)]
        self._near_G = self._world.near(self._world.mesh.ep_ranks) if comm else []
        self._sent_before_G: list[int] = []
        self._tables_sent_before = 0
        self._untold = StepTimes()

    def begin(self) -> None:
        """Begin a step."""
        self.timer.begin()
        self._sent_before_G = list(self._comm.sent_bytes_P) if self._comm else []
        self._tables_sent_before = self._tables_sent_now()

    def tell(self, times: StepTimes) -> None:
        """Add these times, of an earlier step, to the next step's row for all ranks."""
        self._untold = times

    def sum_over_ranks(self, outputs: list[Output], *, stop_asked: bool = False, save_asked: bool = False) -> RankSum:
        """Add up the step over its micro-batches and ranks; a collective.

        Args:
            stop_asked, save_asked: of this rank; all ranks learn of it.
        """
        with self.timer.metrics():
            sent_G = [now - then for now, then in zip(self._sent_now_G(), self._sent_before_G, strict=True)]
            told, self._untold = self._untold, StepTimes()
            row = RankRow(
                stop_asked=stop_asked,
                save_asked=save_asked,
                own_ms=told.own_ms,
                exchange_exposed_ms=told.exchange_exposed_ms,
                plan_wait_ms=self.timer.host.plan_wait_ms,
                memory_bytes=memory_bytes(),
                wire_bytes=sum(sent_G),
                table_bytes=self._tables_sent_now() - self._tables_sent_before,
                wire_bytes_inside=sum(sent for sent, near in zip(sent_G, self._near_G, strict=True) if near),
            )
        return sum_over_ranks(outputs, self._world, row, sent_G, self._experts_L)

    def _sent_now_G(self) -> list[int]:
        return self._comm.sent_bytes_P if self._comm else []

    def _tables_sent_now(self) -> int:
        return sum(tables.sent_bytes for tables in self._tables)
