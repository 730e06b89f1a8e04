"""How a step changes the rows of a table that it used; other rows keep every bit.

A rule is a function of a row's own block, its gradient, the learning rate and the number of the step, and of nothing
else. So it is the same on any number of ranks and wherever a row lies. Neither rule of Adam is dense Adam, which also
moves rows that were not used, by their momentum. There is no weight decay.

Letters: U distinct rows, W width of a row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from foreroute.engine.config import RowMoments, RowUpdates
from foreroute.engine.ngram_tables.initial_rows import parts_of
from foreroute.engine.ngram_tables.row_loops import adam_rows

Block = dict[str, Tensor]
"""Of some rows, dim 0 = row: "value" [U, W], and the rule's state by name."""
VALUE = "value"
_COMPILED = torch.float32, torch.float64


@dataclass(frozen=True, slots=True)
class StateKind:
    """A tensor that a rule keeps beside the values."""

    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype | None = None  # None: that of the values


class RowRule(Protocol):
    """The update of a table's rows."""

    def state(self, width: int) -> dict[str, StateKind]:
        """Return what the rule keeps of each row; all of it begins as zeros."""
        ...

    def apply(
        self, state: Block, local_U: Tensor, grad_UW: Tensor, *, step: int | Tensor, lr: float, keep: Tensor | None
    ) -> None:
        """Change rows in place.

        Args:
            state: of all local rows.
            local_U: distinct local rows, int64.
            grad_UW: the sum of each row's gradients in this step.
            step: number of this update of the table, from 1; an int or a scalar on the device.
            lr: learning rate of the table.
            keep: bool scalar on the device; where it is false no row changes, and the host need not know. None: true.
        """
        ...


@dataclass(frozen=True, slots=True)
class RowAdam:
    """Adam on the rows that a step used.

    With updates=count the bias correction uses the number of the row's own updates: it is torch.optim.Adam on the
    row's own gradients alone, and a row's first update is as large as the learning rate whenever it comes. With
    updates=step it uses the number of the step: it is torch.optim.SparseAdam, which also adds eps before the
    correction; a first update late in training is up to sqrt(1 / (1 - beta2)) * (1 - beta1), about 3 times, as large.

    With moments=row there is one second moment for a row, of the mean of its squared gradients (partial row-wise Adam
    of FBGEMM).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    updates: RowUpdates = RowUpdates.count
    moments: RowMoments = RowMoments.element

    def state(self, width: int) -> dict[str, StateKind]:
        """Return the kinds of state: both moments, and the number of updates where the rule uses it."""
        second = (width,) if self.moments is RowMoments.element else (1,)
        kinds = {"exp_avg": StateKind((width,)), "exp_avg_sq": StateKind(second)}
        if self.updates is RowUpdates.count:
            kinds["count"] = StateKind((1,), torch.int32)
        return kinds

    def apply(
        self, state: Block, local_U: Tensor, grad_UW: Tensor, *, step: int | Tensor, lr: float, keep: Tensor | None
    ) -> None:
        """Change rows in place: on a CPU by a compiled loop, otherwise by PyTorch's operators."""
        if state[VALUE].device.type != "cpu" or state[VALUE].dtype not in _COMPILED:
            by_operators(self.updated, state, local_U, grad_UW, step=step, lr=lr, keep=keep)
        elif keep is None or bool(keep):
            self._by_loop(state, local_U, grad_UW, int(step), lr)

    def updated(self, block: Block, grad_UW: Tensor, *, step: int | Tensor, lr: float) -> Block:
        """Return the rows' new block; the old one does not change.

        Operations are separate, so a row's result does not depend on its place among the others.
        """
        new = dict(block)
        square = grad_UW * grad_UW
        if self.moments is RowMoments.row:
            square = square.mean(dim=1, keepdim=True)
        new["exp_avg"] = mean = block["exp_avg"] * self.beta1 + grad_UW * (1 - self.beta1)
        new["exp_avg_sq"] = mean_square = block["exp_avg_sq"] * self.beta2 + square * (1 - self.beta2)
        if self.updates is RowUpdates.count:
            new["count"] = block["count"] + 1
        number = new["count"] if self.updates is RowUpdates.count else _scalar(step, grad_UW.device)
        first, second = _correction(self.beta1, number), _correction(self.beta2, number).sqrt().to(grad_UW.dtype)
        if self.updates is RowUpdates.count:
            root = mean_square.sqrt() / second + self.eps
        else:
            root = (mean_square.sqrt() + self.eps) / second
        new[VALUE] = block[VALUE] - (lr / first).to(grad_UW.dtype) * mean / root
        return new

    def _by_loop(self, state: Block, local_U: Tensor, grad_UW: Tensor, step: int, lr: float) -> None:
        value_LW = state[VALUE].numpy()
        betas = self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2
        count = state["count"].numpy() if "count" in state else np.zeros((0, 1), np.int32)
        adam_rows(
            value_LW,
            state["exp_avg"].numpy(),
            state["exp_avg_sq"].numpy(),
            count,
            local_U.numpy(),
            grad_UW.contiguous().numpy(),
            np.array([*betas, self.eps, value_LW.shape[1], 0], value_LW.dtype),
            step,
            _log(self.beta1),
            _log(self.beta2),
            float(lr),
        )


@dataclass(frozen=True, slots=True)
class RowSGD:
    """Plain gradient descent on the rows that a step used; linear in the gradients, for comparisons in fp64."""

    def state(self, width: int) -> dict[str, StateKind]:
        """Return nothing: there is no state."""
        return {}

    def apply(
        self, state: Block, local_U: Tensor, grad_UW: Tensor, *, step: int | Tensor, lr: float, keep: Tensor | None
    ) -> None:
        """Change rows in place."""
        by_operators(self.updated, state, local_U, grad_UW, step=step, lr=lr, keep=keep)

    def updated(self, block: Block, grad_UW: Tensor, *, step: int | Tensor, lr: float) -> Block:
        """Return the rows' new block."""
        return {VALUE: block[VALUE] - lr * grad_UW}


@torch.no_grad()
def by_operators(
    updated: Callable[..., Block],
    state: Block,
    local_U: Tensor,
    grad_UW: Tensor,
    *,
    step: int | Tensor,
    lr: float,
    keep: Tensor | None,
) -> None:
    """Change rows in place by a function from their block to the new one, a million numbers at a time."""
    for part in parts_of(local_U.shape[0], grad_UW.shape[1]):
        local = local_U[part]
        old = {name: kept.index_select(0, local) for name, kept in state.items()}
        for name, new in updated(old, grad_UW[part], step=step, lr=lr).items():
            state[name].index_copy_(0, local, new if keep is None else torch.where(keep, new, old[name]))


def _correction(beta: float, updates: Tensor) -> Tensor:
    """Return 1 - beta**updates in fp64; the difference itself would lose digits."""
    return -torch.expm1(updates.double() * _log(beta))


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _scalar(number: int | Tensor, device: torch.device) -> Tensor:
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=torch.int64, device=device)
