"""The exchange: moves rows to the ranks that hold their experts and back, as the Plan says.

`dispatch` gives the rows that this rank's experts read (the Plan's received rows); `combine` takes one partial result
per received row and gives one row per local token. The two are each other's transposes, so backward is one of them.
`Local`: one rank, nothing moves. `Tokens`: one uneven all-to-all, each token once per rank that has one of its experts.
`Gather`: all rows to all ranks, for large k. Two collectives a layer and direction, whose sizes the Plan knows: no
counts are exchanged and the host is never waited for.

Letters: T local tokens, D width, S sent rows, R received rows.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.moe.plan import Plan
from engine.parallel.collectives import Wire
from kernels import combine, permute_rows


class Exchange(Protocol):
    """What the layer needs of an exchange."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Return the received rows [R, D]."""
        ...

    def combine(self, partial_RD: Tensor, plan: Plan) -> Tensor:
        """Return one row for each local token [T, D]."""
        ...


class Local:
    """Exchange of a one-rank expert group: no collective, no copy, zero bytes."""

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Return the received rows [R, D], here the tokens themselves."""
        _check_tokens(x_TD, plan.send_splits[0])
        return x_TD

    def combine(self, partial_RD: Tensor, plan: Plan) -> Tensor:
        """Return the output rows [T, D], here the partial results themselves."""
        return partial_RD


class Tokens:
    """Each token goes once to each rank that holds one of its experts; one partial sum comes back from there."""

    def __init__(self, wire: Wire, dtype: torch.dtype | None = None) -> None:
        """Exchange over a process group; rows travel in `dtype`, or as they are."""
        self.wire, self.dtype = wire, dtype

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Return the received rows [R, D]: rank by rank, in the order of the sender's tokens."""
        if plan.send is None:
            raise ValueError("the plan was made for another exchange than tokens")
        _check_tokens(x_TD, plan.send.num_inputs)
        received_RD: Tensor = _ToExperts.apply(x_TD, self, plan)
        return received_RD

    def combine(self, partial_RD: Tensor, plan: Plan) -> Tensor:
        """Return the sum of each local token's partial results [T, D]."""
        y_TD: Tensor = _ToTokens.apply(partial_RD, self, plan)
        return y_TD

    def to_experts(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Move rows from tokens to experts, without autograd."""
        assert plan.send is not None
        rows_SD = permute_rows(x_TD, plan.send.source_N, dtype=self.dtype)
        received_RD = self.wire.all_to_all(rows_SD, plan.send_splits, plan.recv_splits)
        return received_RD.to(x_TD.dtype)

    def to_tokens(self, partial_RD: Tensor, plan: Plan) -> Tensor:
        """Move rows from experts to tokens and add up each token's, without autograd."""
        assert plan.send is not None
        rows_RD = partial_RD.to(self.dtype or partial_RD.dtype)
        rows_SD = self.wire.all_to_all(rows_RD, plan.recv_splits, plan.send_splits)
        return combine(rows_SD.to(partial_RD.dtype), None, plan.send)


class Gather:
    """All rows go to all ranks and the partial results are added up on the way back; needs a plan with gather=True."""

    def __init__(self, wire: Wire, dtype: torch.dtype | None = None) -> None:
        """Exchange over a process group; rows travel (and are added up) in `dtype`, or as they are."""
        self.wire, self.dtype = wire, dtype

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Return the rows of all ranks [R, D], R = P * T."""
        if plan.send is not None or plan.rows.num_inputs != self.wire.ranks * x_TD.shape[0]:
            raise ValueError("the plan was made for another exchange than gather")
        received_RD: Tensor = _ToExperts.apply(x_TD, self, plan)
        return received_RD

    def combine(self, partial_RD: Tensor, plan: Plan) -> Tensor:
        """Return the sum of the ranks' partial results for the local tokens [T, D]."""
        y_TD: Tensor = _ToTokens.apply(partial_RD, self, plan)
        return y_TD

    def to_experts(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Move rows from tokens to experts, without autograd."""
        return self.wire.all_gather(x_TD.to(self.dtype or x_TD.dtype)).to(x_TD.dtype)

    def to_tokens(self, partial_RD: Tensor, plan: Plan) -> Tensor:
        """Move rows from experts to tokens and add up each token's, without autograd."""
        rows_RD = partial_RD.to(self.dtype or partial_RD.dtype)
        return self.wire.reduce_scatter(rows_RD).to(partial_RD.dtype)


def _check_tokens(x_TD: Tensor, num_tokens: int) -> None:
    if x_TD.shape[0] != num_tokens:
        raise ValueError(f"x_TD has {x_TD.shape[0]} rows: the plan is for {num_tokens} tokens")


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, exchange: Tokens | Gather, plan: Plan) -> Tensor:
        ctx.exchange, ctx.plan = exchange, plan
        return exchange.to_experts(x_TD.contiguous(), plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_received_RD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.to_tokens(d_received_RD.contiguous(), ctx.plan), None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial_RD: Tensor, exchange: Tokens | Gather, plan: Plan) -> Tensor:
        ctx.exchange, ctx.plan = exchange, plan
        return exchange.to_tokens(partial_RD.contiguous(), plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.to_experts(d_y_TD.contiguous(), ctx.plan), None, None
