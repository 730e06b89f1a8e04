"""The planner: the choices of one planned router, one rank of an expert group, a Plan for each micro-batch.

What depends on the row sets and the rank alone is worked out once for each k: which experts of this rank a row uses,
with which weights. A plan then takes a few passes over the tokens of all ranks of the group (engine/routing/loops/).
Pure functions on the host: no collective, no generator, any thread, and no lock of the interpreter in the passes.

Letters: P ranks of the expert group, T tokens of a rank, t of them in a chunk, E experts, L = E / P experts of a rank,
J columns without experts, e = E + J columns, K columns listed of a row, R received rows, N expert rows of this rank, r
table rows, c choices (engine/routing/loops/plans.py). Expert e lives on rank e // L.
"""

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.loops.plans import (
    by_thing,
    column_weights,
    count_columns,
    count_rows,
    rank_choices,
    received_tokens,
    row_choices,
    slots_of,
    table_choices,
)
from foreroute.engine.routing.plan import Chunk, Plan, SetRows, cut
from foreroute.engine.routing.row_sets import Choice, RowSets
from foreroute.kernels.expert_index import ExpertRows

_KEPT = 2  # row sets whose lookups are kept: those of training's k and, at a change of k, the one before
_MOST_KEPT = 1 << 20  # choices in them, 6 bytes each; above it, those of a micro-batch's tokens where they are fewer


@dataclass(frozen=True, slots=True)
class Lookups:
    """Row sets as one rank sees them."""

    sets: RowSets
    order_rK: NDArray[Any]  # the columns of each row, beside each other
    count_r: NDArray[np.int32]  # how many of them it uses; empty: all
    used_r: NDArray[np.uint8]  # does the row use an expert of ours?
    start_r: NDArray[np.int32]  # where its choices begin; one more, for the end of the last
    expert_c: NDArray[np.int16]  # which of our experts, numbered from 0
    weight_c: NDArray[np.float32]
    weight_rK: NDArray[np.float32]  # of all columns, where some are without experts; else empty

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        arrays = self.order_rK, self.count_r, self.used_r, self.start_r, self.expert_c, self.weight_c, self.weight_rK
        return sum(x.nbytes for x in arrays)


class Planner:
    """Plans the micro-batches of one router for one rank."""

    def __init__(self, experts: int, *, columns: int | None = None, rank: int = 0, ranks: int = 1) -> None:
        """Take this rank's place in its expert group.

        Args:
            columns: experts and columns without one.

        Raises:
            UserError: the experts cannot be shared out evenly.
        """
        self.local = Mesh(rank, ranks, ranks).local_experts(experts)
        self.rank, self.ranks, self.experts, self.columns = rank, ranks, experts, columns or experts
        self._rank_e = np.minimum(np.arange(self.columns) // len(self.local), ranks)
        self._kept: list[Lookups] = []
        self._lock = threading.Lock()  # the loader's thread plans while validation does

    def __reduce__(self) -> tuple[Any, ...]:
        """Return a planner of the same place for a copy or a pickle, without the lookups."""
        return _planner, (self.experts, self.columns, self.rank, self.ranks)

    def plan(self, choice: Choice, k: int, *, gather: bool = False, chunks: int = 1) -> Plan:
        """Plan a micro-batch from the rows of every rank's tokens.

        Args:
            gather: for the exchange in which every rank receives all rows, needed or not.
            chunks: chunks that are exchanged one behind the other; one rank has nothing to exchange and makes one.
        """
        row_PT, sets = choice
        rows, listed = sets.order_rK.shape
        if rows > row_PT.size and rows * listed // self.ranks > _MOST_KEPT:
            sets = sets.of_rows(torch.from_numpy(np.ascontiguousarray(row_PT)).flatten())
            row_PT = np.arange(row_PT.size).reshape(row_PT.shape)
            found = self._look_up(sets)
        else:
            found = self.lookups(sets)
        narrow_PT = np.ascontiguousarray(row_PT, np.int32)
        spans = cut(row_PT.shape[1], chunks if self.ranks > 1 else 1)
        use_r = np.zeros(len(sets.order_rK), np.int32)
        found_chunks = tuple(self._chunk(found, narrow_PT, span, use_r, gather=gather) for span in spans)
        count_e = count_columns(found.order_rK, found.count_r, self.columns, use_r)
        plan = Plan(k, self.rank, torch.from_numpy(count_e[: self.experts]), found_chunks)
        if self.columns == self.experts:
            return plan
        own_T = narrow_PT[self.rank]
        if sets.weigh is None:
            return replace(plan, own_sets=_own_sets(sets, own_T))
        return replace(plan, column_weight_TJ=self._column_weights(found, own_T))

    def lookups(self, sets: RowSets) -> Lookups:
        """Return what is worked out once for the row sets of a k."""
        with self._lock:
            for found in self._kept:
                if found.sets is sets:
                    return found
            found = self._look_up(sets)
            self._kept = [*self._kept[1 - _KEPT :], found]
            return found

    def _look_up(self, sets: RowSets) -> Lookups:
        order_rK, weight_rK = sets.order_rK.contiguous().numpy(), sets.weights().numpy()
        count_r = np.empty(0, np.int32) if sets.count_r is None else sets.count_r.numpy()
        start_r, expert_c, weight_c = table_choices(order_rK, count_r, weight_rK, self.local.start, self.local.stop)
        if self.columns == self.experts:
            weight_rK = np.empty((0, 0), np.float32)
        used_r = (np.diff(start_r) > 0).view(np.uint8)
        return Lookups(sets, order_rK, count_r, used_r, start_r, expert_c, weight_c, weight_rK)

    def _column_weights(self, found: Lookups, row_T: NDArray[np.int32]) -> Tensor:
        """Return the weights of the own tokens' columns without experts."""
        arguments = found.order_rK, found.count_r, found.weight_rK, row_T, self.experts, self.columns
        return torch.from_numpy(column_weights(*arguments))

    def _chunk(
        self, found: Lookups, row_PT: NDArray[np.int32], span: slice, use_r: NDArray[np.int32], *, gather: bool
    ) -> Chunk:
        """Plan a share of every rank's tokens; add the uses of their rows to use_r."""
        all_tokens, num_tokens = row_PT.shape[1], span.stop - span.start
        send, token_R = None, None
        send_splits = recv_splits = (num_tokens,) * self.ranks
        if gather or self.ranks == 1:
            row_R = row_PT[:, span].reshape(-1)
            count_rows(row_R, use_r)
            if num_tokens < all_tokens:
                token_R = (np.arange(self.ranks)[:, None] * all_tokens + np.arange(all_tokens)[span]).reshape(-1)
        else:
            send = self._send(found, row_PT[self.rank, span])
            token_R, row_R, count_P = received_tokens(row_PT, span.start, span.stop, found.used_r, use_r)
            send_splits, recv_splits = tuple(send.counts()), tuple(count_P.tolist())
        row_c, expert_c, weight_c, start_R = row_choices(row_R, found.start_r, found.expert_c, found.weight_c)
        source_N, end_L, weight_N, slot_N = by_thing(row_c, expert_c, weight_c, len(self.local))
        rows = _expert_rows(source_N, end_L, slot_N, start_R)
        live = found.sets.weigh is None
        return Chunk(
            rows=rows,
            weight_N=None if live else torch.from_numpy(weight_N),
            send=send,
            received_R=None if token_R is None else torch.from_numpy(token_R),
            send_splits=send_splits,
            recv_splits=recv_splits,
            sets=self._sets(found, row_R, rows) if live else None,
        )

    def _sets(self, found: Lookups, row_R: NDArray[np.int32], rows: ExpertRows) -> SetRows:
        """Return the whole set of each received row, and where in it the expert rows of this rank are."""
        sets = found.sets.of_rows(torch.from_numpy(row_R))
        expert_RK, used_RK = sets.order_rK.long(), sets.used_rK
        count_L = torch.diff(rows.offset_L.long(), prepend=rows.offset_L.new_zeros(1).long())
        expert_N = self.local.start + torch.arange(len(self.local)).repeat_interleave(count_L)
        found_NK = expert_RK[rows.source_N] == expert_N[:, None]
        if used_RK is not None:
            found_NK &= used_RK[rows.source_N]
        column_N = found_NK.int().argmax(dim=1)
        return SetRows(expert_RK, used_RK, rows.source_N * expert_RK.shape[1] + column_N)

    def _send(self, found: Lookups, row_t: NDArray[np.int32]) -> ExpertRows:
        """List by rank the own tokens that it needs."""
        token_c, rank_c, start_t = rank_choices(found.order_rK, found.count_r, row_t, self._rank_e, self.ranks)
        source_S, end_P, *_ = by_thing(token_c, rank_c, np.empty(0, np.float32), self.ranks)
        return _expert_rows(source_S, end_P, slots_of(source_S, start_t), start_t)


def _own_sets(sets: RowSets, row_T: NDArray[np.int32]) -> SetRows:
    """Return the sets of the own tokens, for the weights of their columns without experts."""
    own = sets.of_rows(torch.from_numpy(row_T))
    return SetRows(own.order_rK.long(), own.used_rK, None)


def _planner(experts: int, columns: int, rank: int, ranks: int) -> Planner:
    return Planner(experts, columns=columns, rank=rank, ranks=ranks)


def _expert_rows(*arrays: NDArray[Any]) -> ExpertRows:
    return ExpertRows(*(torch.from_numpy(x) for x in arrays))
