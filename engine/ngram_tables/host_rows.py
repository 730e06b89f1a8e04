"""A table in host memory: the loader's thread fetches the rows of a step ahead, and training is that of a table on the
device, bit for bit.

The plan has the rows of a step before the steps in front of it have run. Those that such an unfinished step also uses
are stale in the fetched copy. So when the step begins they are patched: values and state are replaced by what the last
of these steps left on the device. What a finished step left is written back to the host, in the order of the steps,
before the next rows are fetched; a checkpoint or an evaluation has the rest written back first. The device holds the
rows of a few steps, never the table. (Bagpipe, Agarwal et al., SOSP 2023, for recommendation models; there a
cache on each trainer, here the owner's rows of the coming steps.)

Letters: S rows that are sent, U distinct rows of a step.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foreroute.engine.ngram_tables.row_rules import VALUE, Block, RowRule
from foreroute.engine.ngram_tables.store import RowStore
from foreroute.kernels.launching import to_device


class StepRows:
    """The rows of one step on the device: values and state."""

    def __init__(self, rule: RowRule, local_U: Tensor, device: torch.device) -> None:
        self.rule, self.host_U, self.local_U = rule, local_U, to_device(local_U, device)
        self.fetched: Block = {}
        self.patches: list[tuple[StepRows, Tensor, Tensor]] = []  # an earlier step, places in its rows, places here
        self.left: Block | None = None
        """Values and state that the step left; None: it has not ended."""

    def _begin(self) -> None:
        """Replace rows that earlier steps have changed since these were fetched."""
        for earlier, there_N, here_N in self.patches:
            if earlier.left is None:
                raise RuntimeError("a step begins before one in front of it has ended")
            _patch(self.fetched, earlier.left, there_N, here_N)
        self.patches = []  # the earlier steps are no longer needed

    def read(self, local_S: Tensor) -> Tensor:
        """Return copies of the values [S, W] of local rows of the step, which begins."""
        self._begin()
        return self.fetched[VALUE].index_select(0, torch.searchsorted(self.local_U, local_S))

    def update(
        self, local_U: Tensor, grad_UW: Tensor, *, step: int | Tensor, lr: float, keep: Tensor | None = None
    ) -> None:
        """Update all rows of the step; arguments as for RowStore.update."""
        places_U = torch.arange(local_U.shape[0], device=local_U.device)
        self.rule.apply(self.fetched, places_U, grad_UW, step=step, lr=lr, keep=keep)
        self.left = self.fetched


class HostRows:
    """A store in host memory, for steps on a device.

    The loader's thread calls `ahead`, in the order of the steps; the thread that trains calls everything else.
    """

    def __init__(self, store: RowStore, device: torch.device | str) -> None:
        self._store = store
        self._device = torch.device(device)
        self._lock = threading.Lock()  # of the store, and of the list of steps
        self._steps: list[StepRows] = []  # fetched and not written back

    def ahead(self, local_U: Tensor) -> StepRows:
        """Fetch the rows of a coming step.

        Args:
            local_U: distinct local rows, int64, ascending, on the host.
        """
        with self._lock, _current(self._device):
            self._write_back()
            step = StepRows(self._store.rule, local_U, self._device)
            for earlier, there_N, here_N in _overlaps(local_U, self._steps):
                step.patches.append((earlier, to_device(there_N, self._device), to_device(here_N, self._device)))
            step.fetched = {name: to_device(kept, self._device) for name, kept in self._store.block(local_U).items()}
            self._steps.append(step)
        return step

    def settle(self, *, restart: bool = False) -> None:
        """Write back what finished steps left: the store is then that of a table on the device.

        Args:
            restart: forget the steps that were fetched and will not begin, as after a stop.
        """
        with self._lock:
            self._write_back()
            if restart:
                self._steps.clear()

    def to(self, device: torch.device | str) -> None:
        """Serve another device; nothing may have been fetched."""
        self._device = torch.device(device)

    def read(self, local_S: Tensor) -> Tensor:
        """Return the values [S, W] of local rows that were not fetched ahead, such as those of an evaluation."""
        self.settle()
        return self._store.read(local_S.cpu()).to(self._device)

    def update(
        self, local_U: Tensor, grad_UW: Tensor, *, step: int | Tensor, lr: float, keep: Tensor | None = None
    ) -> None:
        """Update rows that were not fetched ahead; arguments as for RowStore.update."""
        number = step.cpu() if isinstance(step, Tensor) else step
        kept = None if keep is None else keep.cpu()
        self._store.update(local_U.cpu(), grad_UW.cpu(), step=number, lr=lr, keep=kept)

    def _write_back(self) -> None:
        while self._steps and self._steps[0].left is not None:
            step = self._steps.pop(0)
            assert step.left is not None
            self._store.write(step.host_U, {name: value.cpu() for name, value in step.left.items()})


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a block in which a GPU is the thread's own; threads start on GPU 0 and would pin memory through it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _overlaps(local_U: Tensor, steps: list[StepRows]) -> list[tuple[StepRows, Tensor, Tensor]]:
    """Return which rows each of these steps changes last: the step, their places in its rows and their places here.

    Example: rows [3, 5, 8] after steps on [3, 5] and [5, 9]: the second has row 5 at 0, here 1; the first row 3 at 0,
    here 0.
    """
    wanted, missing, found = local_U.numpy(), np.ones(local_U.shape[0], bool), []
    for step in reversed(steps):
        _, there_N, here_N = np.intersect1d(step.host_U.numpy(), wanted, assume_unique=True, return_indices=True)
        new = missing[here_N]
        missing[here_N] = False
        found.append((step, torch.from_numpy(there_N[new]), torch.from_numpy(here_N[new])))
    return found


def _patch(block: Block, left: Block, there_N: Tensor, here_N: Tensor) -> None:
    """Replace rows of a block, values and state, by those that an earlier step left."""
    for name, value in block.items():
        value.index_copy_(0, here_N, left[name].index_select(0, there_N))
