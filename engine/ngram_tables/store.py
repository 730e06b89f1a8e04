"""The rows of one table that this rank holds, with the optimizer's state.

Row r of a table belongs to rank r % world of all ranks, as its local row r // world. The rows are no nn.Parameter, so
neither ZeRO nor autograd sees them: a step reads copies, and gives the gradients of distinct rows back.

Letters: L local rows, S rows to read, U distinct rows, W width of a row.
"""

import torch
from torch import Tensor

from foreroute.engine.ngram_tables.initial_rows import initial_rows
from foreroute.engine.ngram_tables.row_rules import VALUE, Block, RowRule


class RowStore:
    """This rank's rows of one table, in the memory of one device.

    Args:
        rows: of the whole table.
        width: numbers in a row.
        rank, world: of all ranks, which share the rows out.
        seed: of the run.
        index: number of the table within the run; with the seed and a row's global number it decides the row's initial
            values.
        scale: standard deviation of the initial values.
        rule: how a step changes the rows.
        device: whose memory holds them.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        rank: int,
        world: int,
        seed: int,
        index: int,
        scale: float,
        rule: RowRule,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rows, self.width, self.rule, self.index = rows, width, rule, index
        self.owned = range(rank, rows, world)
        """Global numbers of the local rows, in order."""
        self.state: Block = {VALUE: torch.empty(self.local_rows, width, dtype=dtype, device=device)}
        """By name, dim 0 = local row: "value" [L, W], and the state of the rule."""
        for name, kind in rule.state(width).items():
            shape = self.local_rows, *kind.shape
            self.state[name] = torch.zeros(shape, dtype=kind.dtype or dtype, device=device)
        for part, value in initial_rows(seed, index, self.owned, width, scale):
            self.state[VALUE][part].copy_(value)

    @property
    def local_rows(self) -> int:
        """Number of this rank's rows L."""
        return len(self.owned)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.state[VALUE].dtype

    def read(self, local_S: Tensor) -> Tensor:
        """Return copies of the values [S, W] of local rows (int64), which may repeat."""
        return self.state[VALUE].index_select(0, local_S)

    def update(
        self, local_U: Tensor, grad_UW: Tensor, *, step: int | Tensor, lr: float, keep: Tensor | None = None
    ) -> None:
        """Update the values and the state of these rows and of no others; arguments as for RowRule.apply."""
        self.rule.apply(self.state, local_U, grad_UW, step=step, lr=lr, keep=keep)

    def to(self, device: torch.device | str) -> None:
        """Move values and state to the memory of a device."""
        self.state = {name: kept.to(device) for name, kept in self.state.items()}

    def block(self, local_U: Tensor) -> Block:
        """Return copies of values and state of local rows."""
        return {name: kept.index_select(0, local_U) for name, kept in self.state.items()}

    def write(self, local_U: Tensor, block: Block) -> None:
        """Overwrite values and state of distinct local rows."""
        for name, kept in self.state.items():
            kept.index_copy_(0, local_U, block[name])
