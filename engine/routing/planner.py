"""The planner of a planned router: one table, one rank of an expert group, a Plan for each micro-batch.

Everything that depends on the table, k and the rank alone is worked out once for each k: for every table row, which
ranks and which local experts it uses, with which weights. A plan is then a few lookups over the tokens of all ranks of
the group. Pure numpy on the host: no collective, no generator, any thread.

Letters: P ranks of the expert group, T tokens of a rank, t of them in a chunk, E experts, L = E / P experts of a rank,
K active experts, R received rows, N expert rows of this rank, r table rows. Expert e lives on rank e // L.
"""

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Chunk, Plan, cut
from foreroute.kernels.expert_index import ExpertRows

_KEPT = 2  # values of k whose lookups are kept: training's and, at a change of k, the one before


class Orders(Protocol):
    """What a plan is made from: a Table, or orders drawn for one forward pass."""

    @property
    def order_rE(self) -> Tensor:
        """uint8: in each row all experts, the active ones first."""

    @property
    def logits_rE(self) -> Tensor | None:
        """fp32 in the order of order_rE; None for uniform weights."""


def mixing_weights(table: Orders, k: int) -> Tensor:
    """Return the fp32 weights [r, E] of every row's first k experts: softmax of their logits, or 1/k; 0 for the
    others."""
    order_rK = table.order_rE[:, :k].long()
    if table.logits_rE is None:
        weight_rK = torch.full(order_rK.shape, 1.0 / k)
    else:
        weight_rK = table.logits_rE[:, :k].softmax(dim=1)
    return torch.zeros(table.order_rE.shape).scatter_(1, order_rK, weight_rK)


@dataclass(frozen=True, slots=True)
class _Lookups:
    """A table as one rank sees it at one k."""

    rank_Pr: NDArray[np.bool_]  # does the row use an expert of the rank?
    local_Lr: NDArray[np.bool_]  # does the row use this expert of ours?
    weight_Lr: NDArray[np.float32]  # with which weight; 0 where not used
    active_rE: NDArray[np.float32]  # 1 where the row uses an expert


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
        self._lookups: dict[int, _Lookups] = {}
        self._lock = threading.Lock()  # the loader's thread plans while validation does

    def plan(self, row_PT: NDArray[np.int64], k: int, *, gather: bool = False, chunks: int = 1) -> Plan:
        """Plan a micro-batch from the table rows of every rank's tokens.

        Args:
            gather: for the exchange in which every rank receives all rows, needed or not.
            chunks: chunks that are exchanged one behind the other; one rank has nothing to exchange and makes one.
        """
        found = self._lookups_of(k)
        spans = cut(row_PT.shape[1], chunks if self.ranks > 1 else 1)
        found_chunks = tuple(self._chunk(found, row_PT, span, gather=gather) for span in spans)
        count_E = torch.from_numpy(_count(found.active_rE, row_PT.reshape(-1)))
        return Plan(k, self.rank, count_E, found_chunks)

    def _chunk(self, found: _Lookups, row_PT: NDArray[np.int64], span: slice, *, gather: bool) -> Chunk:
        """Plan a share of every rank's tokens."""
        row_Pt = row_PT[:, span]
        all_tokens, num_tokens = row_PT.shape[1], row_Pt.shape[1]
        own_t, all_N = row_Pt[self.rank], row_Pt.reshape(-1)
        row_R, send, received_R = all_N, None, None
        send_splits = recv_splits = (num_tokens,) * self.ranks
        if gather and num_tokens < all_tokens:
            received_R = np.arange(all_N.size)
        elif not gather and self.ranks > 1:
            send, _ = _expert_rows(found.rank_Pr, own_t)
            received_R = np.flatnonzero(found.rank_Pr[self.rank].take(all_N))
            row_R = all_N.take(received_R)
            first_P = np.searchsorted(received_R, np.arange(self.ranks + 1) * num_tokens)
            send_splits, recv_splits = tuple(send.counts()), tuple(np.diff(first_P).tolist())
        if received_R is not None and num_tokens < all_tokens:  # from places in the chunk to places in the group
            others = all_tokens - num_tokens
            received_R = received_R + received_R // num_tokens * others + span.start
        rows, weight_N = _expert_rows(found.local_Lr, row_R, found.weight_Lr)
        return Chunk(
            rows=rows,
            weight_N=torch.from_numpy(weight_N),
            send=send,
            received_R=None if received_R is None else torch.from_numpy(received_R),
            send_splits=send_splits,
            recv_splits=recv_splits,
        )

    def _lookups_of(self, k: int) -> _Lookups:
        with self._lock:
            if k not in self._lookups:
                while len(self._lookups) >= _KEPT:
                    self._lookups.pop(next(iter(self._lookups)))
                self._lookups[k] = self._look_up(k)
            return self._lookups[k]

    def _look_up(self, k: int) -> _Lookups:
        order_rK = self.table.order_rE[:, :k].long()
        active_rE = torch.zeros(self.table.order_rE.shape).scatter_(1, order_rK, 1.0)
        weight_rE = mixing_weights(self.table, k)
        here = slice(self.local.start, self.local.stop)
        rank_rP = active_rE.view(-1, self.ranks, len(self.local)).amax(dim=2).bool()
        return _Lookups(
            rank_Pr=rank_rP.T.contiguous().numpy(),
            local_Lr=active_rE[:, here].bool().T.contiguous().numpy(),
            weight_Lr=weight_rE[:, here].T.contiguous().numpy(),
            active_rE=active_rE.numpy(),
        )


def _count(active_rE: NDArray[np.float32], row_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Expert rows of each expert; exact up to 2**24 uses of a table row and an expert."""
    if row_N.size < active_rE.shape[0]:
        count_E: NDArray[np.int64] = active_rE.take(row_N, axis=0).sum(axis=0, dtype=np.int64)
        return count_E
    uses_r = np.bincount(row_N, minlength=active_rE.shape[0]).astype(np.float32)
    return (uses_r @ active_rE).astype(np.int64)


def _expert_rows(
    uses_Lr: NDArray[np.bool_], row_R: NDArray[np.int64], weight_Lr: NDArray[np.float32] | None = None
) -> tuple[ExpertRows, NDArray[np.float32]]:
    """List the rows that use each of L things (experts, or ranks), with their weights.

    Example: uses_Lr = [[1, 0], [1, 1]], row_R = [1, 0]: thing 0 is used by row 1, thing 1 by rows 0 and 1, so
    source_N = [1, 0, 1], offset_L = [1, 3], slot_N = [1, 0, 2], slot_offset_R = [0, 1].
    """
    uses = [uses_r.take(row_R) for uses_r in uses_Lr]
    sources = [np.flatnonzero(use_R) for use_R in uses]
    end_L = np.cumsum([source_n.size for source_n in sources], dtype=np.int32)
    count_R = np.zeros(row_R.size, np.int16)
    for use_R in uses:
        count_R += use_R
    place_R = np.cumsum(count_R, dtype=np.int64) - count_R  # where each row's next slot is
    slot_offset_R = place_R.copy()
    slot_N, weight_N = np.empty(end_L[-1], np.int64), np.empty(end_L[-1], np.float32)
    for thing, (source_n, end) in enumerate(zip(sources, end_L.tolist(), strict=True)):
        span = slice(end - source_n.size, end)
        slot_N[place_R.take(source_n)] = np.arange(span.start, span.stop)
        place_R += uses[thing]
        if weight_Lr is not None:
            weight_N[span] = weight_Lr[thing].take(row_R.take(source_n))
    source_N = np.concatenate(sources)
    rows = ExpertRows(*(torch.from_numpy(x) for x in (source_N, end_L, slot_N, slot_offset_R)))
    return rows, weight_N
