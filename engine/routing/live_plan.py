"""The plan of a live router on several ranks, built in the forward pass: what planned routers never pay for.

Per layer: one all-gather of counts, which the host reads back once, and one all-to-all that takes each row's weights to
the rank of its experts; in backward the gradient of the weights comes the same way back, to route.weight_TK. After that
a layer's exchange and experts are those of a planned router.

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
from foreroute.engine.routing.exchange_choice import use_gather, wire_dtype
from foreroute.engine.routing.plan import Chunk, Plan, Route, build_plan, cut
from foreroute.kernels.expert_index import ExpertRows

# In a weight block: the token did not choose this expert. A weight that was chosen may be 0.
_UNUSED = -1.0


def plan_live(
    route: Route,
    num_experts: int,
    x_TD: Tensor,
    comm: ExpertGroupComm | None = None,
    parallel: ParallelConfig | None = None,
) -> Plan:
    """Make the plan of a live router's route; on several ranks from all their routes, in a collective.

    Args:
        x_TD: the tokens, whose number, width and format decide between the exchanges.
        comm, parallel: of the expert group; None for one rank.
    """
    if comm is None or parallel is None:
        return build_plan(route, num_experts)
    tokens, width = x_TD.shape
    gather = use_gather(
        parallel,
        experts=num_experts,
        ranks=comm.ranks,
        k=route.expert_TK.shape[1],
        tokens=tokens,
        width=width,
        itemsize=wire_dtype(parallel, x_TD.dtype).itemsize,
    )
    return build_live_plan(route, num_experts, comm, gather=gather, chunks=parallel.chunks)


def build_live_plan(
    route: Route, num_experts: int, comm: ExpertGroupComm, *, gather: bool = False, chunks: int = 1
) -> Plan:
    """Turn the routes of all ranks of an expert group, each its own, into this rank's plan; a collective.

    weight_N stays connected to route.weight_TK for autograd, over the ranks.

    Args:
        gather, chunks: as for planner.TablePlanner.plan; equal on all ranks.

    Raises:
        ValueError: the ranks have unequal numbers of tokens, or too many to count in the weights' number format.
    """
    num_tokens, k = route.expert_TK.shape
    local, rank, ranks = num_experts // comm.ranks, comm.rank, comm.ranks
    limit = 2 ** (24 if route.weight_TK.dtype == torch.float32 else 53)
    if num_tokens * ranks > limit:
        raise ValueError(f"{ranks} ranks with {num_tokens} tokens each: must be at most {limit} together")
    weight_TPL = _weight_blocks(route, num_experts).view(num_tokens, ranks, local)
    chosen_TPL = weight_TPL.detach() != _UNUSED
    used_TP = torch.ones_like(chosen_TPL[..., 0]) if gather else chosen_TPL.any(dim=2)
    spans = cut(num_tokens, chunks)
    counts = _exchange_counts(used_TP, chosen_TPL.flatten(1), spans, comm)
    _check_tokens(counts, num_tokens, k, ranks)

    # rank by rank, its tokens in order
    flat_S = _true_places(used_TP.T, int(counts.rows_PCP[rank].sum()))
    weight_SL = weight_TPL.transpose(0, 1).reshape(-1, local)[flat_S]
    token_S = rank * num_tokens + flat_S % max(num_tokens, 1)
    splits = counts.splits(rank, slice(None))
    weight_RL, token_R = _ToExpertRanks.apply(weight_SL, token_S, comm, *splits)  # type: ignore[no-untyped-call]
    found_chunks = []
    for number, span in enumerate(spans):
        block = counts.received(rank, number)
        weight_rL, token_r = (torch.cat([x[chunk] for chunk in block]) for x in (weight_RL, token_R))
        num_rows = int(counts.experts_PCE[:, number, rank * local : (rank + 1) * local].sum())
        rows, place_N = _expert_rows(weight_rL.detach() != _UNUSED, num_rows)
        send_splits, recv_splits = counts.splits(rank, slice(number, number + 1))
        send = None if gather else _expert_rows(used_TP[span], sum(send_splits))[0]
        weight_N = weight_rL.T.reshape(-1)[place_N]
        found_chunks.append(Chunk(rows, weight_N, send, token_r, send_splits, recv_splits))
    return Plan(k, rank, counts.total_E, tuple(found_chunks))


def _weight_blocks(route: Route, num_experts: int) -> Tensor:
    """Weight of each token and expert [T, E], _UNUSED where not chosen."""
    shape = route.expert_TK.shape[0], num_experts
    empty_TE = route.weight_TK.new_full(shape, _UNUSED)
    return empty_TE.scatter(1, route.expert_TK, route.weight_TK)


class _Counts:
    """The numbers of rows that the ranks send each other, as all ranks know them."""

    def __init__(self, got: Tensor, ranks: int, chunks: int) -> None:
        """Read the gathered counts [P * C, P + E] back."""
        counts: NDArray[np.int64] = got.cpu().numpy().reshape(ranks, chunks, -1)
        self.rows_PCP = counts[..., :ranks]  # rows from a rank, in a chunk, to a rank
        # expert rows of a rank's tokens, in a chunk, for an expert
        self.experts_PCE = counts[..., ranks:]
        self.total_E = got[:, ranks:].sum(dim=0)

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


def _exchange_counts(used_TP: Tensor, chosen_TE: Tensor, spans: list[slice], comm: ExpertGroupComm) -> _Counts:
    both_TX = torch.cat((used_TP, chosen_TE), dim=1).long()
    sum_CX = torch.stack([both_TX[span].sum(dim=0) for span in spans])
    return _Counts(comm.all_gather(sum_CX).wait(), comm.ranks, len(spans))


def _check_tokens(counts: _Counts, num_tokens: int, k: int, ranks: int) -> None:
    tokens_P = counts.experts_PCE.sum(axis=(1, 2)) // k
    if (tokens_P != num_tokens).any():
        raise ValueError(f"the {ranks} ranks have {tokens_P.tolist()} tokens: must be equal")


def _true_places(mask: Tensor, count: int) -> Tensor:
    """Places of the `count` true values of a flattened mask; the host need not wait to know how many there are."""
    return torch.nonzero_static(mask.reshape(-1), size=count).squeeze(1)


def _expert_rows(mask_RL: Tensor, count: int) -> tuple[ExpertRows, Tensor]:
    """List the `count` pairs of a row and something it uses, an expert or a rank.

    Returns:
        The rows, and place_N: each pair's place in the flattened transposed mask.

    Example: [[1, 0], [1, 1]]: source = [0, 1, 1], offset = [2, 3], slot = [0, 1, 2], slot_offset = [0, 1] and
    place = [0, 1, 3].
    """
    number_LR = (mask_RL.T.reshape(-1).cumsum(0) - 1).view(mask_RL.T.shape)
    place_N = _true_places(mask_RL.T, count)
    count_R = mask_RL.sum(dim=1)
    rows = ExpertRows(
        source_N=place_N % max(mask_RL.shape[0], 1),
        offset_L=mask_RL.sum(dim=0).cumsum(0).to(torch.int32),
        slot_N=number_LR.T.reshape(-1)[_true_places(mask_RL, count)],
        slot_offset_R=count_R.cumsum(0) - count_R,
    )
    return rows, place_N


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
