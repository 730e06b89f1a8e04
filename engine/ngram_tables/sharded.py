"""One table in a step: its rows go to the ranks that read them, and their gradients come back to their owners.

The plan (engine/routing/plans/row_plan.py) says which. So each way is one all-to-all, no counts are exchanged and the
host never waits for a device. The rows that land are a leaf of autograd: modules read them by index, in any number of
passes and again in a recomputation, and their gradients add up in one tensor. An owner adds the ranks' gradients up in
the order of the ranks.

Letters: S rows that this rank sends, R rows that land, U distinct rows of its own that any rank reads, W
width of a row.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from foreroute.engine.ngram_tables.host_rows import HostRows
from foreroute.engine.ngram_tables.row_rules import VALUE
from foreroute.engine.ngram_tables.store import RowStore
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.in_flight import AsyncCollective
from foreroute.engine.routing.plans.row_plan import RowSource, RowsPlan
from foreroute.engine.tracing import span


class ShardedTable:
    """This rank's rows of one table, and the rows of the step that have landed here.

    Args:
        store: this rank's rows.
        comm: all ranks; None: this rank alone.
        wire: number format of rows and gradients between ranks; one rank alone rounds to it as well.
        device: on which steps run, where the rows lie in host memory; None: the rows are on the device.
    """

    def __init__(
        self,
        store: RowStore,
        comm: ExpertGroupComm | None,
        wire: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.store, self.comm = store, comm
        self._host = None if device is None else HostRows(store, device)
        self._rows: RowSource = self._host or store  # of the step
        self._dtype = store.state[VALUE].dtype
        self._wire = wire or self._dtype
        self.landed_rows = self.sent_rows = 0
        """Rows that landed here and rows that were sent since construction, on this rank itself included."""
        self._plan: RowsPlan | None = None
        self._moving: AsyncCollective | Tensor | None = None  # rows, later gradients
        self._landed_RW: Tensor | None = None

    def to(self, device: torch.device | str) -> None:
        """Let another device read the rows; in host memory they stay there."""
        (self._host or self.store).to(device)

    def fetch(self, plan: RowsPlan) -> None:
        """Send the rows of a step to the ranks that read them; the transfer goes on beside what follows."""
        self._plan, self._landed_RW = plan, None
        self._rows = plan.ahead or self._host or self.store
        with span("rows"):
            rows_SW = self._rows.read(plan.send_S)
            self.sent_rows += rows_SW.shape[0]
            self._moving = self._send(rows_SW, plan.send_splits, plan.recv_splits)

    def landed(self) -> Tensor:
        """Return the rows that have landed, [R, W], a leaf of autograd; waits for them the first time."""
        if self._landed_RW is None:
            self._landed_RW = self._arrived().requires_grad_(torch.is_grad_enabled())
            self.landed_rows += self._landed_RW.shape[0]
        return self._landed_RW

    def return_gradients(self) -> None:
        """Send the gradients of the landed rows to the rows' owners, once in a step and after its backward passes."""
        landed_RW, plan = self.landed(), self._need_plan()
        grad_RW = torch.zeros_like(landed_RW) if landed_RW.grad is None else landed_RW.grad
        with span("rows"):
            self._moving = self._send(grad_RW, plan.recv_splits, plan.send_splits)
        self._landed_RW = None

    def summed_gradients(self) -> Tensor:
        """Return the sum over the ranks of the gradients that came back: [U, W], of plan.touched_U."""
        plan, grad_SW = self._need_plan(), self._arrived()
        if grad_SW.shape[0] == 0:
            return grad_SW
        return F.embedding_bag(plan.order_S, grad_SW, plan.offset_U, mode="sum")

    def update(self, grad_UW: Tensor, *, step: int | Tensor, lr: float, keep: Tensor) -> None:
        """Change the rows of the step by their gradients; arguments as for RowStore.update."""
        self._rows.update(self._need_plan().touched_U, grad_UW, step=step, lr=lr, keep=keep)

    def ahead(self, plan: RowsPlan) -> RowsPlan:
        """Fetch the rows of a coming step from host memory, in the loader's thread and the order of the steps."""
        return plan if self._host is None else replace(plan, ahead=self._host.ahead(plan.touched_U))

    def settle(self, *, restart: bool = False) -> None:
        """Bring the store up to date with the last step.

        Args:
            restart: forget the steps that were fetched and have not begun.
        """
        if self._host is not None:
            self._host.settle(restart=restart)

    def _need_plan(self) -> RowsPlan:
        if self._plan is None:
            raise RuntimeError("no rows of the table were fetched")
        return self._plan

    def _send(self, rows: Tensor, splits: tuple[int, ...], got_splits: tuple[int, ...]) -> AsyncCollective | Tensor:
        if self.comm is None:
            return rows.to(self._wire)
        with self.comm.aside(rows):
            # All ranks, [S, W] to [R, W], or gradients back.
            return self.comm.all_to_all(rows.to(self._wire), splits, got_splits)

    def _arrived(self) -> Tensor:
        moving, self._moving = self._moving, None
        if moving is None:
            raise RuntimeError("no rows of the table are on their way")
        rows = moving if isinstance(moving, Tensor) else moving.wait()
        return rows.to(self._dtype)
