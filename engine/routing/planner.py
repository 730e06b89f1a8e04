"""The planner of a planned router: one table, one rank of an expert group, a Plan for each micro-batch.

What depends on the table, k and the rank alone is worked out once for each k: which experts of this rank a row uses,
with which weights. A plan then takes a few passes over the tokens of all ranks of the group (engine/routing/loops/).
Pure functions on the host: no collective, no generator, any thread, and no lock of the interpreter in the passes.

Letters: P ranks of the expert group, T tokens of a rank, t of them in a chunk, E experts, L = E / P experts of a rank,
K active experts, R received rows, N expert rows of this rank, r table rows, c choices (engine/routing/loops/plans.py).
Expert e lives on rank e // L.
"""

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.loops.plans import (
    by_thing,
    count_experts,
    count_rows,
    rank_choices,
    received_tokens,
    row_choices,
    slots_of,
    table_choices,
)
from foreroute.engine.routing.plan import Chunk, Plan, cut
from foreroute.kernels.expert_index import ExpertRows

_KEPT = 2  # values of k whose lookups are kept: training's and, at a change of k, the one before
_MOST_KEPT = 1 << 20  # choices in them, 6 bytes each; above it, those of a micro-batch's tokens where they are fewer


class Orders(Protocol):
    """The source of a plan: a Table, or orders drawn for one forward pass."""

    @property
    def order_rE(self) -> Tensor:
        """uint8, or int16 above 256 experts: in each row all experts, the active ones first."""

    @property
    def logits_rE(self) -> Tensor | None:
        """fp32 in the order of order_rE; None for uniform weights."""


class OrdersOf(NamedTuple):
    """Orders and nothing else."""

    order_rE: Tensor
    logits_rE: Tensor | None = None


def order_dtype(experts: int) -> type[np.uint8] | type[np.int16]:
    """Return the number format of orders: uint8 up to 256 experts, int16 above."""
    return np.uint8 if experts <= 256 else np.int16


def mixing_weights(table: Orders, k: int) -> Tensor:
    """Return the fp32 weights [r, E] of every row's first k experts: softmax of their logits, or 1/k; 0 for the
    others."""
    return torch.zeros(table.order_rE.shape).scatter_(1, table.order_rE[:, :k].long(), _weights(table, k))


def _weights(table: Orders, k: int) -> Tensor:
    """Return the weights [r, K] in the order of preference."""
    if table.logits_rE is None:
        return torch.full((table.order_rE.shape[0], k), 1.0 / k)
    return table.logits_rE[:, :k].softmax(dim=1)


@dataclass(frozen=True, slots=True)
class Lookups:
    """A table as one rank sees it at one k."""

    order_rK: NDArray[Any]  # the active experts of each row, beside each other
    used_r: NDArray[np.uint8]  # does the row use an expert of ours?
    start_r: NDArray[np.int32]  # where its choices begin; one more, for the end of the last
    expert_c: NDArray[np.int16]  # which of our experts, numbered from 0
    weight_c: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(x.nbytes for x in (self.order_rK, self.used_r, self.start_r, self.expert_c, self.weight_c))


class TablePlanner:
    """Plans the micro-batches of one table for one rank."""

    def __init__(self, table: Orders, *, rank: int = 0, ranks: int = 1) -> None:
        """Take a table and this rank's place in its expert group.

        Raises:
            UserError: the experts cannot be shared out evenly.
        """
        experts = table.order_rE.shape[1]
        self.local = Mesh(rank, ranks, ranks).local_experts(experts)
        self.table, self.rank, self.ranks, self.experts = table, rank, ranks, experts
        self._lookups: dict[int, Lookups] = {}
        self._lock = threading.Lock()  # the loader's thread plans while validation does

    def plan(self, row_PT: NDArray[np.integer[Any]], k: int, *, gather: bool = False, chunks: int = 1) -> Plan:
        """Plan a micro-batch from the table rows of every rank's tokens.

        Args:
            gather: for the exchange in which every rank receives all rows, needed or not.
            chunks: chunks that are exchanged one behind the other; one rank has nothing to exchange and makes one.
        """
        rows = self.table.order_rE.shape[0]
        if rows > row_PT.size and rows * k // self.ranks > _MOST_KEPT:
            alone = TablePlanner(self._orders_of(row_PT), rank=self.rank, ranks=self.ranks)
            row_PT = np.arange(row_PT.size).reshape(row_PT.shape)
            return alone.plan(row_PT, k, gather=gather, chunks=chunks)
        found, narrow_PT = self.lookups(k), np.ascontiguousarray(row_PT, np.int32)
        spans = cut(row_PT.shape[1], chunks if self.ranks > 1 else 1)
        use_r = np.zeros(rows, np.int32)
        found_chunks = tuple(self._chunk(found, narrow_PT, span, use_r, gather=gather) for span in spans)
        count_E = count_experts(found.order_rK, self.experts, use_r)
        return Plan(k, self.rank, torch.from_numpy(count_E), found_chunks)

    def lookups(self, k: int) -> Lookups:
        """Return what is worked out once for a k."""
        with self._lock:
            if k not in self._lookups:
                while len(self._lookups) >= _KEPT:
                    self._lookups.pop(next(iter(self._lookups)))
                order_rK, weight_rK = self.table.order_rE[:, :k].contiguous().numpy(), _weights(self.table, k).numpy()
                start_r, *found = table_choices(order_rK, weight_rK, self.local.start, self.local.stop)
                self._lookups[k] = Lookups(order_rK, (np.diff(start_r) > 0).view(np.uint8), start_r, *found)
            return self._lookups[k]

    def _orders_of(self, row_PT: NDArray[np.integer[Any]]) -> OrdersOf:
        """Return the order of each token's row."""
        row_N, logits_rE = torch.from_numpy(row_PT).flatten(), self.table.logits_rE
        logits_NE = None if logits_rE is None else logits_rE.index_select(0, row_N)
        return OrdersOf(self.table.order_rE.index_select(0, row_N), logits_NE)

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
        return Chunk(
            rows=_expert_rows(source_N, end_L, slot_N, start_R),
            weight_N=torch.from_numpy(weight_N),
            send=send,
            received_R=None if token_R is None else torch.from_numpy(token_R),
            send_splits=send_splits,
            recv_splits=recv_splits,
        )

    def _send(self, found: Lookups, row_t: NDArray[np.int32]) -> ExpertRows:
        """List by rank the own tokens that it needs."""
        token_c, rank_c, start_t = rank_choices(found.order_rK, row_t, len(self.local), self.ranks)
        source_S, end_P, *_ = by_thing(token_c, rank_c, np.empty(0, np.float32), self.ranks)
        return _expert_rows(source_S, end_P, slots_of(source_S, start_t), start_t)


def _expert_rows(*arrays: NDArray[Any]) -> ExpertRows:
    return ExpertRows(*(torch.from_numpy(x) for x in arrays))
