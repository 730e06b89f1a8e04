"""Routers: who chooses the experts of a token.

A planned router (HashedRouter) reads token ids only, so the loader can route a batch before it reaches the device. Live
routers (FrozenRouter, LearnedRouter) read hidden states inside the forward pass. All give k distinct experts per token
in order of preference, nested in k, with weights that sum to 1.

Letters: T tokens (= B*Q, row-major), B streams, Q segment length, C = ngram - 1 ids left of a segment, D width,
E experts, K active experts per token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.moe.plan import Plan, Route
from engine.moe.planner import TablePlanner
from engine.moe.tables import Table
from engine.parallel.mesh import Mesh

_GATE_STD = 0.02  # SMoE-Dropout's public code, whatever the model's own init_std


class LiveRoute(NamedTuple):
    """A live router's choice and the scores it came from; tuples, in which ZeRO-3 finds a module's outputs."""

    route: Route
    logits_TE: Tensor  # fp32 (fp64 for fp64 x), connected to x (and to the gate, if learned)


class HashedRouter:
    """Planned router: the first k experts of the table row that the token's n-gram falls into."""

    def __init__(self, table: Table, *, rank: int = 0, ranks: int = 1) -> None:
        """Take a table, and this rank's place in its expert group for the plans."""
        self.table = table
        self.planner = TablePlanner(table, rank=rank, ranks=ranks)

    def plan(
        self, ids_PBQ: Tensor, left_PBC: Tensor, k: int, *, gather: bool = False, chunks: int = 1
    ) -> Plan:
        """Plan a micro-batch from the ids of every rank of the expert group; gives what `route` says, rank by rank.

        Args:
            gather, chunks: as for TablePlanner.plan.
        """
        row_PBQ = [self.table.rows_of(ids, left) for ids, left in zip(ids_PBQ, left_PBC, strict=True)]  # fmt: skip
        row_PT = torch.stack(row_PBQ).flatten(1).numpy()
        return self.planner.plan(row_PT, k, gather=gather, chunks=chunks)

    def route(self, ids_BQ: Tensor, left_BC: Tensor, k: int) -> Route:
        """Route each token; weights are the softmax over its row's first k logits, or 1/k without logits.

        Args:
            ids_BQ: int64 ids.
            left_BC: int64, the C true ids left of each segment.
        """
        row_T = self.table.rows_of(ids_BQ, left_BC).reshape(-1)
        expert_TK = self.table.order_rE.index_select(0, row_T)[:, :k].long()
        if self.table.logits_rE is None:
            return Route(expert_TK, torch.full(expert_TK.shape, 1.0 / k))
        logits_KT = self.table.logits_rE.index_select(0, row_T).T[:k].contiguous()
        # Token-last: on 2 CPU cores a softmax over a last dim of 8 took 0.5 ms for T = 2048, this one 0.07 ms.
        return Route(expert_TK, logits_KT.softmax(dim=0).T.contiguous())


def routers_of(tables: Sequence[Table], mesh: Mesh) -> list[HashedRouter]:
    """Make a router of each table that plans for this rank of its expert group."""
    return [HashedRouter(t, rank=mesh.expert_rank, ranks=mesh.expert_ranks) for t in tables]


class FrozenRouter(nn.Module):
    """SMoE-Dropout's router (arXiv 2303.01610): a random linear gate that is never trained.

    logits = x W^T + b with W ~ N(0, 0.02^2) and b = 0, top k, softmax over those k. The gradient flows through the
    weights into x, not into W: the gate is held in buffers. It is part of the model's state.
    """

    gate_weight: Tensor
    gate_bias: Tensor

    def __init__(
        self, width: int, experts: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        weight = torch.empty(experts, width).normal_(0.0, _GATE_STD, generator=generator)
        self.register_buffer("gate_weight", weight)
        self.register_buffer("gate_bias", torch.zeros(experts))

    def forward(self, x_TD: Tensor, k: int) -> LiveRoute:
        """Route hidden states [T, D] to k experts each."""
        return top_k_route(gate_logits(x_TD, self.gate_weight, self.gate_bias), k)


class LearnedRouter(nn.Module):
    """The same gate as FrozenRouter with trainable parameters; see engine/moe/losses.py for its auxiliary losses."""

    def __init__(
        self, width: int, experts: int, *, generator: torch.Generator | None = None
    ) -> None:
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
