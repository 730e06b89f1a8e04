"""The plan of a live router on several ranks, built in the forward pass: what planned routers never pay for.

Per layer: one all-gather of counts, which the host reads back once, unless they are known by construction; and one
all-to-all that takes each row's weights to the rank of its experts. In backward the gradient of the weights comes the
same way back, to route.weight_TK. After that a layer's exchange and experts are those of a planned router.

Letters: T local tokens, K active experts, E experts, L = E / P experts of a rank, P ranks of the expert group, S sent
and R received rows, N expert rows of this rank, C chunks; small t, s, r: of one chunk. Expert e lives on rank e // L.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from foreroute.engine.config import ParallelConfig
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.routing.plan import (
    Chunk,
    Plan,
    Route,
    build_plan,
    chosen_mask,
    cut,
    dense_weights,
    rows_of_mask,
    true_places,
)
from foreroute.engine.routing.plans.exchange_choice import use_gather, wire_dtype

# In a weight block: the token did not choose this expert. A weight that was chosen may be 0 or negative.
_UNUSED = -torch.inf


def plan_live(
    route: Route,
    num_experts: int,
    x_TD: Tensor,
    k: int,
    comm: ExpertGroupComm | None = None,
    parallel: ParallelConfig | None = None,
) -> Plan:
    """Make the plan of a live router's route; on several ranks from all their routes, in a collective.

    Args:
        x_TD: the tokens, whose number, width and format decide between the exchanges.
        k: active experts of a token; for routers with a number for each token their mean, as asked for.
        comm, parallel: of the expert group; None for one rank.
    """
    if comm is None or parallel is None:
        return build_plan(route, num_experts, k)
    tokens, width = x_TD.shape
    gather = use_gather(
        parallel,
        experts=num_experts,
        ranks=comm.ranks,
        k=k,
        tokens=tokens,
        width=width,
        itemsize=wire_dtype(parallel, x_TD.dtype).itemsize,
    )
    return build_live_plan(route, num_experts, comm, k, gather=gather, chunks=parallel.chunks)


def build_live_plan(
    route: Route,
    num_experts: int,
    comm: ExpertGroupComm,
    k: int | None = None,
    *,
    gather: bool = False,
    chunks: int = 1,
) -> Plan:
    """Turn the routes of all ranks of an expert group, each its own, into this rank's plan; a collective.

    weight_N stays connected to route.weight_TK for autograd, over the ranks.

    Args:
        k: of the plan; None: the experts that the route lists of each token.
        gather, chunks: as for planner.Planner.plan; equal on all ranks.

    Raises:
        ValueError: the ranks have unequal numbers of tokens, or too many to count in the weights' number format.
    """
    num_tokens, listed = route.expert_TK.shape
    local, rank, ranks = num_experts // comm.ranks, comm.rank, comm.ranks
    limit = 2 ** (24 if route.weight_TK.dtype == torch.float32 else 53)
    if num_tokens * ranks > limit:
        raise ValueError(f"{ranks} ranks with {num_tokens} tokens each: must be at most {limit} together")
    chosen_TE = chosen_mask(route, num_experts)
    weight_TE = dense_weights(route, num_experts).masked_fill(~chosen_TE, _UNUSED)
    weight_TPL, chosen_TPL = (found_TE.view(num_tokens, ranks, local) for found_TE in (weight_TE, chosen_TE))
    used_TP = torch.ones_like(chosen_TPL[..., 0]) if gather else chosen_TPL.any(dim=2)
    spans = cut(num_tokens, chunks)
    counts = _known_counts(route, num_experts, comm, gather=gather, chunks=len(spans))
    counts = counts or _exchange_counts(used_TP, chosen_TE, spans, comm)
    if len(set(counts.tokens_P)) > 1:
        raise ValueError(f"the {ranks} ranks have {counts.tokens_P} tokens: must be equal")

    # rank by rank, its tokens in order
    flat_S = true_places(used_TP.T, int(counts.rows_PCP[rank].sum()))
    weight_SL = weight_TPL.transpose(0, 1).reshape(-1, local)[flat_S]
    token_S = rank * num_tokens + flat_S % max(num_tokens, 1)
    splits = counts.splits(rank, slice(None))
    weight_RL, token_R = _ToExpertRanks.apply(weight_SL, token_S, comm, *splits)  # type: ignore[no-untyped-call]
    found_chunks = []
    for number, span in enumerate(spans):
        block = counts.received(rank, number)
        weight_rL, token_r = (torch.cat([x[chunk] for chunk in block]) for x in (weight_RL, token_R))
        num_rows = int(counts.experts_PCE[:, number, rank * local : (rank + 1) * local].sum())
        rows, place_N = rows_of_mask(weight_rL.detach() != _UNUSED, num_rows)
        send_splits, recv_splits = counts.splits(rank, slice(number, number + 1))
        send = None if gather else rows_of_mask(used_TP[span], sum(send_splits))[0]
        weight_N = weight_rL.T.reshape(-1)[place_N]
        found_chunks.append(Chunk(rows, weight_N, send, token_r, send_splits, recv_splits))
    return Plan(k or listed, rank, counts.total_E, tuple(found_chunks))


class _Counts:
    """The numbers of rows that the ranks send each other, as all ranks know them."""

    def __init__(self, counts: NDArray[np.int64], total_E: Tensor) -> None:
        """Take the counts [P, C, P + E + 1], and the expert rows of the group on the device."""
        ranks = len(counts)
        self.rows_PCP = counts[..., :ranks]  # rows from a rank, in a chunk, to a rank
        # expert rows of a rank's tokens, in a chunk, for an expert
        self.experts_PCE = counts[..., ranks:-1]
        self.tokens_P: list[int] = counts[..., -1].sum(axis=1).tolist()
        self.total_E = total_E

    def splits(self, rank: int, chunks: slice) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows to and from each rank."""
        sent_P = self.rows_PCP[rank, chunks].sum(axis=0)
        received_P = self.rows_PCP[:, chunks, rank].sum(axis=1)
        return tuple(sent_P.tolist()), tuple(received_P.tolist())

    def received(self, rank: int, chunk: int) -> list[slice]:
        """Where the rows of a chunk are among all received rows: from each rank its chunks one behind the other."""
        rows_N = self.rows_PCP[:, :, rank].reshape(-1)
        ends = np.cumsum(rows_N).tolist()
        count = self.rows_PCP.shape[1]
        places = range(chunk, len(ends), count)
        return [slice(ends[place] - int(rows_N[place]), ends[place]) for place in places]


def _known_counts(
    route: Route, num_experts: int, comm: ExpertGroupComm, *, gather: bool, chunks: int
) -> _Counts | None:
    """Return the counts where they are known by construction, or None.

    Experts have equally many rows, and a rank gets as many token rows as its experts have expert rows, since tokens
    have one expert each, or all tokens.
    """
    tokens, listed = route.expert_TK.shape
    if route.rows is None or not route.even or chunks > 1 or (listed > 1 and not gather):
        return None
    each, ranks = route.rows // num_experts, comm.ranks
    row_X = [tokens if gather else each * num_experts // ranks] * ranks + [each] * num_experts + [tokens]
    total_E = route.expert_TK.new_full((num_experts,), each * ranks)
    return _Counts(np.tile(np.array(row_X), (ranks, 1, 1)), total_E)


def _exchange_counts(used_TP: Tensor, chosen_TE: Tensor, spans: list[slice], comm: ExpertGroupComm) -> _Counts:
    one_T1 = used_TP.new_ones(len(used_TP), 1)
    both_TX = torch.cat((used_TP, chosen_TE, one_T1), dim=1).long()
    sum_CX = torch.stack([both_TX[span].sum(dim=0) for span in spans])
    got = comm.all_gather(sum_CX).wait()
    counts = got.cpu().numpy().reshape(comm.ranks, len(spans), -1)
    return _Counts(counts, got[:, comm.ranks : -1].sum(dim=0))


class _ToExpertRanks(torch.autograd.Function):
    """The weights [S, L] and token numbers of sent rows become those of received rows; gradients of weights go back."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_SL: Tensor,
        token_S: Tensor,
        comm: ExpertGroupComm,
        send: tuple[int, ...],
        recv: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        ctx.comm, ctx.send, ctx.recv = comm, send, recv
        block = torch.cat((weight_SL, token_S[:, None].to(weight_SL.dtype)), dim=1)
        got = comm.all_to_all(block, send, recv).wait()
        weight_RL, token_R = got[:, :-1].contiguous(), got[:, -1].long()
        ctx.mark_non_differentiable(token_R)
        return weight_RL, token_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weight_RL: Tensor, _: Any) -> tuple[Any, ...]:
        d_weight_SL = ctx.comm.all_to_all(d_weight_RL.contiguous(), ctx.recv, ctx.send).wait()
        return d_weight_SL, None, None, None, None
