"""Routers: who chooses the experts of a token.

A planned router (HashedRouter, DrawnRouter) needs no hidden states, so the loader can route a batch before it reaches
the device. Live routers (FrozenRouter, LearnedRouter) read hidden states inside the forward pass. All give k distinct
experts per token in order of preference, nested in k, with weights that sum to 1.

Letters: T tokens (= B*Q, row-major), B streams, Q segment length, C ids left of a segment (at least ngram - 1), D
width, E experts, K active experts per token, P ranks of the expert group, r rows.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.hashing import hash64
from foreroute.engine.routing.ngram_rows import KeyRows
from foreroute.engine.routing.plan import Plan, Route
from foreroute.engine.routing.planner import OrdersOf, TablePlanner, order_dtype
from foreroute.engine.routing.tables import Table

_THREADED = 1 << 22  # tokens times tables: above, planning takes 20 ms and more
_MOST_THREADS = 4
_GATE_STD = 0.02  # SMoE-Dropout's public code, whatever the model's own init_std


# First part of each hash: what the number is for; engine/routing/tables.py has 1 to 6.
_DRAW, _SHUFFLE = 7, 8


@dataclass(frozen=True, slots=True)
class Draw:
    """A forward pass and its tokens: with the seed all that a random choice may depend on, so every rank draws the
    same."""

    token_PT: NDArray[np.int64]
    """Numbers of the expert group's tokens within the step: stream x Q + place in the segment."""
    index: int  # of the step, or of the segment in an evaluation
    held_out: bool = False  # not training: other choices, the same at every evaluation
    number: int = 0  # of the pass over this micro-batch


class LiveRoute(NamedTuple):
    """A live router's choice and the scores it came from; tuples, in which ZeRO-3 finds a module's outputs."""

    route: Route
    logits_TE: Tensor  # fp32 (fp64 for fp64 x), connected to x (and to the gate, if learned)


class GroupIds:
    """The ids of an expert group's micro-batch, and what all routers of a run make of them once: keys, and in which
    order they are shuffled."""

    def __init__(self, ids_PBQ: Tensor, left_PBC: Tensor, new_document_PBX: Tensor | None = None) -> None:
        """Take int64 ids, the true ids left of each segment, and where in both documents begin (KeyRows.of)."""
        self.shape = ids_PBQ.shape[0], ids_PBQ[0].numel()
        marks = None if new_document_PBX is None else new_document_PBX.flatten(0, 1)
        self._ids = ids_PBQ.flatten(0, 1), left_PBC.flatten(0, 1), marks
        self._keys: dict[tuple[int, ...], NDArray[np.integer[Any]]] = {}
        self._places: dict[tuple[int, ...], NDArray[np.int64]] = {}

    def keys(self, rows: KeyRows) -> NDArray[np.integer[Any]]:
        """Return the key [P, T] of each token, int32 where all keys fit."""
        kind = rows.ngram, rows.vocab_size
        if kind not in self._keys:
            dtype = np.int32 if rows.vocab_size**rows.ngram < 1 << 31 else np.int64
            self._keys[kind] = rows.keys(*self._ids).reshape(self.shape).astype(dtype, copy=False)
        return self._keys[kind]

    def shuffled_keys(self, rows: KeyRows, draw: Draw) -> NDArray[np.integer[Any]]:
        """Return for each token the key of another one [P, T]."""
        numbers = rows.seed, draw.held_out, draw.index, draw.number
        if numbers not in self._places:
            self._places[numbers] = hash64(_SHUFFLE, *numbers, draw.token_PT).argsort(axis=None, kind="stable")
        return self.keys(rows).take(self._places[numbers]).reshape(self.shape)


class HashedRouter:
    """Planned router: the first k experts of the table row that the token's n-gram falls into."""

    def __init__(self, table: Table, *, rank: int = 0, ranks: int = 1, shuffled: bool = False) -> None:
        """Take a table, and this rank's place in its expert group for the plans.

        Args:
            shuffled: let each token have the row of another token of the group's micro-batch (moe.keys=shuffled). All
                tables of a seed shuffle alike, so a token has the key of one other token in every layer.
        """
        self.table, self.shuffled = table, shuffled
        self.planner = TablePlanner(table, rank=rank, ranks=ranks)

    def plan(
        self,
        ids_PBQ: Tensor,
        left_PBC: Tensor,
        k: int,
        *,
        draw: Draw | None = None,
        gather: bool = False,
        chunks: int = 1,
        group: GroupIds | None = None,
    ) -> Plan:
        """Plan a micro-batch from the ids of every rank of the expert group, as `route` routes them, rank by rank.

        Args:
            draw: needed to shuffle.
            gather, chunks: as for TablePlanner.plan.
            group: of the same ids, shared by the routers of a run.
        """
        ids, rows = group or GroupIds(ids_PBQ, left_PBC), self.table.key_rows
        if self.shuffled and draw is None:
            raise ValueError("shuffled keys need a draw")
        key_PT = ids.shuffled_keys(rows, draw) if self.shuffled and draw is not None else ids.keys(rows)
        return self.planner.plan(rows.narrow(key_PT), k, gather=gather, chunks=chunks)

    def identity(self) -> list[NDArray[Any]]:
        """All that its plans depend on besides ids and k, to be compared between ranks."""
        table = self.table
        numbers = np.array([table.ngram, table.vocab_size, table.seed, table.index, self.shuffled])
        logits = [] if table.logits_rE is None else [table.logits_rE.numpy()]
        return [numbers, table.order_rE.numpy(), *logits]

    def route(self, ids_BQ: Tensor, left_BC: Tensor, k: int) -> Route:
        """Route each token; weights are the softmax over its row's first k logits, or 1/k without logits.

        Args:
            ids_BQ: int64 ids.
            left_BC: int64, the true ids left of each segment.
        """
        row_T = self.table.rows_of(ids_BQ, left_BC).reshape(-1)
        expert_TK = self.table.order_rE.index_select(0, row_T)[:, :k].long()
        if self.table.logits_rE is None:
            return Route(expert_TK, torch.full(expert_TK.shape, 1.0 / k))
        logits_KT = self.table.logits_rE.index_select(0, row_T).T[:k].contiguous()
        # Token-last: on 2 CPU cores a softmax over a last dim of 8 took 0.5 ms for T = 2048, this one 0.07 ms.
        return Route(expert_TK, logits_KT.softmax(dim=0).T.contiguous())


class DrawnRouter:
    """Planned router that draws the order of the experts anew at each forward pass; the first k are active, weights are
    1/k.

    `fresh`: an order for each token. SMoE-Dropout's public code (CustomRandomGate) takes the top k of U(0, 1) scores
    and their softmax as weights, which are within a factor e of each other and say nothing of the token: 1/k is their
    mean. `stochastic`: one order for all tokens of the step (THOR, Zuo et al., ICLR 2022, arXiv 2110.04260, which has k
    = 1).
    """

    def __init__(self, experts: int, *, each_token: bool, seed: int, index: int, rank: int = 0, ranks: int = 1) -> None:
        """Take this rank's place in its expert group, and what the draws are hashed from.

        Args:
            index: number of the router within the run; layers draw independently.
        """
        self.experts, self.each_token, self.seed, self.index = experts, each_token, seed, index
        self.rank, self.ranks = rank, ranks

    def plan(
        self,
        ids_PBQ: Tensor,
        left_PBC: Tensor,
        k: int,
        *,
        draw: Draw | None = None,
        gather: bool = False,
        chunks: int = 1,
        group: GroupIds | None = None,
    ) -> Plan:
        """Plan a micro-batch; arguments as for HashedRouter.plan, of which the ids do not matter."""
        if draw is None:
            raise ValueError("experts that are drawn need a draw")
        row_PT = np.zeros(draw.token_PT.shape, np.int64)
        if self.each_token:
            row_PT = np.arange(row_PT.size).reshape(row_PT.shape)
        planner = TablePlanner(OrdersOf(self.order(draw)), rank=self.rank, ranks=self.ranks)
        return planner.plan(row_PT, k, gather=gather, chunks=chunks)

    def order(self, draw: Draw) -> Tensor:
        """Draw the experts' order: uint8, or int16 above 256 experts, [P*T, E], or [1, E] for all tokens."""
        token_r1 = draw.token_PT.reshape(-1, 1) if self.each_token else np.zeros((1, 1), np.int64)
        numbers = self.seed, self.index, draw.held_out, draw.index, draw.number
        hash_rE = hash64(_DRAW, *numbers, token_r1, np.arange(self.experts))
        return torch.from_numpy(hash_rE.argsort(axis=1, kind="stable").astype(order_dtype(self.experts)))

    def identity(self) -> list[NDArray[Any]]:
        """All that its plans depend on besides the draw and k, to be compared between ranks."""
        return [np.array([self.experts, self.each_token, self.seed, self.index])]


PlannedRouter = HashedRouter | DrawnRouter


def plan_all(
    routers: Sequence[PlannedRouter],
    ids_PBQ: Tensor,
    left_PBC: Tensor,
    k: int,
    *,
    draw: Draw | None = None,
    gather: bool = False,
    chunks: int = 1,
    group: GroupIds | None = None,
) -> tuple[Plan, ...]:
    """Plan a micro-batch with each of the routers; arguments as for HashedRouter.plan.

    Several threads plan where there is enough to do: as many as PyTorch has, which launchers share out, up to
    _MOST_THREADS.
    """
    group = group or GroupIds(ids_PBQ, left_PBC)
    threads = min(torch.get_num_threads(), _MOST_THREADS) if ids_PBQ.numel() * len(routers) >= _THREADED else 1

    def plan(router: PlannedRouter) -> Plan:
        return router.plan(ids_PBQ, left_PBC, k, draw=draw, gather=gather, chunks=chunks, group=group)

    if threads == 1:
        return tuple(map(plan, routers))
    first = plan(routers[0])  # makes the keys
    with ThreadPoolExecutor(threads) as pool:
        return first, *pool.map(plan, routers[1:])


def routers_of(tables: Sequence[Table], mesh: Mesh, *, shuffled: bool = False) -> list[HashedRouter]:
    """Make a router of each table that plans for this rank of its expert group."""
    rank, ranks = mesh.ep_rank, mesh.ep_size
    return [HashedRouter(t, rank=rank, ranks=ranks, shuffled=shuffled) for t in tables]


class FrozenRouter(nn.Module):
    """SMoE-Dropout's router (arXiv 2303.01610): a random linear gate that is never trained.

    logits = x W^T + b with W ~ N(0, 0.02^2) and b = 0, top k, softmax over those k. The gradient flows through the
    weights into x, not into W: the gate is held in buffers. It is part of the model's state.
    """

    gate_weight: Tensor
    gate_bias: Tensor

    def __init__(self, width: int, experts: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        weight = torch.empty(experts, width).normal_(0.0, _GATE_STD, generator=generator)
        self.register_buffer("gate_weight", weight)
        self.register_buffer("gate_bias", torch.zeros(experts))

    def forward(self, x_TD: Tensor, k: int) -> LiveRoute:
        """Route hidden states [T, D] to k experts each."""
        return top_k_route(gate_logits(x_TD, self.gate_weight, self.gate_bias), k)


class LearnedRouter(nn.Module):
    """The same gate as FrozenRouter with trainable parameters; see engine/routing/losses.py for its auxiliary
    losses."""

    def __init__(self, width: int, experts: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        weight = torch.empty(experts, width).normal_(0.0, _GATE_STD, generator=generator)
        self.gate_weight = nn.Parameter(weight)
        self.gate_bias = nn.Parameter(torch.zeros(experts))

    def forward(self, x_TD: Tensor, k: int) -> LiveRoute:
        """Route hidden states [T, D] to k experts each."""
        return top_k_route(gate_logits(x_TD, self.gate_weight, self.gate_bias), k)


def gate_logits(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor) -> Tensor:
    """Return x W^T + b in fp32, also for a bf16 model and under autocast; in fp64 for fp64 x.

    A module that was cast to bf16 holds the gate rounded to bf16; the product is of those rounded numbers, but exact to
    fp32, so near-ties are not decided by bf16 sums. It is therefore a slightly different gate than the fp32 one.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(wide), weight_ED.to(wide), bias_E.to(wide))


def top_k_route(logits_TE: Tensor, k: int) -> LiveRoute:
    """Take the k largest logits of each token, largest first; weights are the softmax over these k."""
    top_TK, expert_TK = logits_TE.topk(k, dim=-1, sorted=True)
    return LiveRoute(Route(expert_TK, top_TK.softmax(dim=-1)), logits_TE)
