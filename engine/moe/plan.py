"""The plan: everything a layer needs to know about routing, computed before the layer runs.

For planned routers engine/moe/planner.py makes it in the data loader, from the token ids of all ranks of the expert
group. `build_plan` makes it from a live router's Route inside the forward pass, so far on one rank only: every token
stays there, so the received rows are the local tokens. After that both share engine/moe/layer.py.

Letters: T local tokens, K active experts, N expert rows (T*K on one rank), E experts, S sent and R received rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rows import ExpertRows, expert_rows


@dataclass(frozen=True, slots=True)
class Route:
    """A router's choice for each token, in order of preference."""

    expert_TK: Tensor  # int64: global expert ids, distinct within a token
    weight_TK: Tensor  # fp32: mixing weights, each row sums to 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Where rows go and what each expert reads, for one table and one micro-batch on this rank."""

    k: int  # active experts per token
    rows: ExpertRows  # expert-major rows over the received rows
    weight_N: Tensor  # fp32: mixing weight of each expert row
    count_E: Tensor  # int64: rows of every expert over the expert group
    send: (
        ExpertRows | None
    )  # rows to send, rank by rank: "experts" are ranks, source_N the tokens; None on one rank
    received_R: (
        Tensor | None
    )  # int64: which of the group's tokens, rank by rank, each received row is; None: all, in order
    send_splits: tuple[int, ...]  # rows to each rank of the expert group, this one included
    recv_splits: tuple[int, ...]  # rows from each rank of the expert group
    wire_rows: int  # rows that leave this rank, per layer and direction


def build_plan(route: Route, num_experts: int) -> Plan:
    """Turn a route into the plan of a one-rank expert group.

    weight_N stays connected to route.weight_TK for autograd, so that live routers learn through it.

    Example: two tokens, K=2, experts 0..2. Token 0 takes expert 2 (0.7) then 0 (0.3), token 1 takes 0 (0.6) then 1:

        source_N = [0, 1, 1, 0], offset_L = [2, 3, 4], weight_N = [0.3, 0.6, 0.4, 0.7], count_E = [2, 1, 1]
    """
    num_tokens, k = route.expert_TK.shape
    rows, choice_N = expert_rows(route.expert_TK, num_experts)
    count_E = torch.diff(rows.offset_L.long(), prepend=rows.offset_L.new_zeros(1).long())
    return Plan(
        k=k,
        rows=rows,
        weight_N=route.weight_TK.reshape(-1)[choice_N],
        count_E=count_E,
        send=None,
        received_R=None,
        send_splits=(num_tokens,),
        recv_splits=(num_tokens,),
        wire_rows=0,
    )
