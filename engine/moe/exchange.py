"""The exchange: sends token rows to the ranks of their experts and returns the results, as the Plan specifies.

`dispatch` returns the token rows that this rank's experts read (the received rows). `combine` takes one partial result
for each received row and returns one token row for each local token. Each is the transpose of the other, so the
backward pass of one calls the other. `Local`: one rank, nothing is sent. `Exchange`: over a process group, in the way
that the plan uses:

    tokens   one uneven all-to-all: each token goes once to each rank that has one of its experts. That rank sums the
             outputs of these experts and returns one partial result
    gather   an all-gather of all token rows, and a reduce-scatter of the partial results; for large k

Either way a layer has two collectives for each chunk and direction. The Plan knows their sizes: no counts are exchanged
and the host never waits. `dispatch` and `combine` are for plans of one chunk. They can be compiled: then they are
operators, which find their exchange by its number. A plan of several chunks is exchanged inside the experts' call, by
`to_experts` and `to_tokens` (engine/moe/overlap.py).

Letters: T local tokens (t: of one chunk), D width, S sent rows, R received rows, P ranks of the expert group.
"""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foreroute.engine.config import ParallelConfig
from foreroute.engine.config.enums import Backend
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.in_flight import AsyncCollective
from foreroute.engine.routing.plan import Chunk, Plan
from foreroute.engine.routing.plans.exchange_choice import wire_dtype
from foreroute.engine.tracing import span
from foreroute.kernels import ExpertRows, combine, permute_rows


class Local:
    """The exchange of a one-rank expert group: no collective, no copy, zero bytes."""

    comm = parallel = None

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Return the received rows [R, D], here the tokens themselves."""
        check_plan(x_TD, plan, ranks=1)
        return x_TD

    def combine(self, partial_RD: Tensor, plan: Plan) -> Tensor:
        """Return the output token rows [T, D], here the partial results themselves."""
        return partial_RD


class _OperatorTransfer(NamedTuple):
    """The fields of a Chunk that the exchange reads, from the arguments of an operator."""

    send: ExpertRows | None
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]


Transfer: TypeAlias = Chunk | _OperatorTransfer


@dataclass(frozen=True, slots=True)
class Moving:
    """Token rows in transfer."""

    collective: AsyncCollective
    finish: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        """Wait for the transfer and return the rows that arrive."""
        return self.finish(self.collective.wait())


class Exchange:
    """The exchange over a process group."""

    def __init__(self, comm: ExpertGroupComm, parallel: ParallelConfig, backend: str | None = None) -> None:
        """Set the group. Token rows are sent in the configuration's number format; on a GPU, gather also sums in it.

        Args:
            backend: backend of the kernels that permute and sum token rows; by default their device decides.
        """
        self.comm, self.parallel, self.backend = comm, parallel, backend
        self.number = next(_numbers)  # operators find the exchange by this number
        _exchanges[self.number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """Return Local for a copy or a pickle, which has no process group and refuses plans of several ranks."""
        return Local, ()

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Return the received rows [R, D], rank by rank, in the order of the sender's tokens."""
        check_plan(x_TD, plan, ranks=self.comm.ranks)
        (chunk,) = plan.chunks
        if torch.compiler.is_compiling():
            traced_RD: Tensor = _to_experts(x_TD, *_flat(chunk), self.number)
            return traced_RD
        received_RD: Tensor = _ToExperts.apply(x_TD, self, chunk)  # type: ignore[no-untyped-call]
        return received_RD

    def combine(self, partial_RD: Tensor, plan: Plan) -> Tensor:
        """Return the sum of each local token's partial results [T, D]."""
        (chunk,) = plan.chunks
        if torch.compiler.is_compiling():
            traced_TD: Tensor = _to_tokens(partial_RD, *_flat(chunk), self.number)
            return traced_TD
        y_TD: Tensor = _ToTokens.apply(partial_RD, self, chunk)  # type: ignore[no-untyped-call]
        return y_TD

    def to_experts(self, x_tD: Tensor, chunk: Transfer) -> Moving:
        """Start to send a chunk's token rows to their experts, without autograd; wait() returns the received rows."""
        dtype = wire_dtype(self.parallel, x_tD.dtype)
        with span("dispatch"), self.comm.aside(x_tD):
            if chunk.send is None:
                # Expert group, [t, D] to [P * t, D].
                collective = self.comm.all_gather(x_tD.to(dtype))
            else:
                # Expert group, [S, D] to [R, D].
                rows_SD = permute_rows(x_tD, chunk.send.source_N, dtype=dtype, backend=self.backend)
                collective = self.comm.all_to_all(rows_SD, chunk.send_splits, chunk.recv_splits)
        return Moving(collective, lambda received_RD: received_RD.to(x_tD.dtype))

    def to_tokens(self, partial_RD: Tensor, chunk: Transfer) -> Moving:
        """Start to return a chunk's results to their tokens, without autograd; wait() returns each token's sum."""
        dtype, send = partial_RD.dtype, chunk.send
        with span("combine"), self.comm.aside(partial_RD):
            rows_RD = partial_RD.to(wire_dtype(self.parallel, dtype))
            if send is None:
                # Expert group, [P * t, D] to [t, D].
                collective = self.comm.reduce_scatter(rows_RD)
                return Moving(collective, lambda sum_tD: sum_tD.to(dtype))
            # Expert group, [R, D] to [S, D].
            collective = self.comm.all_to_all(rows_RD, chunk.recv_splits, chunk.send_splits)

        def add_up(rows_SD: Tensor) -> Tensor:
            with span("combine"):
                return combine(rows_SD.to(dtype), None, send, backend=self.backend)

        return Moving(collective, add_up)


def build_exchange(
    comm: ExpertGroupComm, parallel: ParallelConfig, backend: Backend = Backend.auto
) -> Exchange | Local:
    """Build the exchange for a process group."""
    if comm.ranks == 1:
        return Local()
    return Exchange(comm, parallel, None if backend is Backend.auto else backend.value)


def check_plan(x_TD: Tensor, plan: Plan, *, ranks: int) -> None:
    """Raise ValueError unless a plan is for this number of ranks and of tokens."""
    if len(plan.chunks[0].send_splits) != ranks:
        raise ValueError(
            f"the plan is for an expert group of {len(plan.chunks[0].send_splits)} ranks: this one has {ranks}"
        )
    if x_TD.shape[0] != plan.num_tokens:
        raise ValueError(f"x_TD has {x_TD.shape[0]} rows: the plan is for {plan.num_tokens} tokens")


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, exchange: Exchange, chunk: Chunk) -> Tensor:
        ctx.exchange, ctx.chunk = exchange, chunk
        return exchange.to_experts(x_TD.contiguous(), chunk).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_received_RD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.to_tokens(d_received_RD.contiguous(), ctx.chunk).wait(), None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial_RD: Tensor, exchange: Exchange, chunk: Chunk) -> Tensor:
        ctx.exchange, ctx.chunk = exchange, chunk
        return exchange.to_tokens(partial_RD.contiguous(), chunk).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.to_experts(d_y_TD.contiguous(), ctx.chunk).wait(), None, None


_numbers = itertools.count()
_exchanges: weakref.WeakValueDictionary[int, Exchange] = weakref.WeakValueDictionary()


def _flat(chunk: Chunk) -> tuple[list[Tensor], list[int], list[int]]:
    return [] if chunk.send is None else list(chunk.send.tensors()), list(chunk.send_splits), list(chunk.recv_splits)


def _whole(send: list[Tensor], send_splits: list[int], recv_splits: list[int]) -> _OperatorTransfer:
    return _OperatorTransfer(ExpertRows(*send) if send else None, tuple(send_splits), tuple(recv_splits))


@torch.library.custom_op("foreroute::to_experts", mutates_args=())
def _to_experts(
    x_TD: Tensor, send: list[Tensor], send_splits: list[int], recv_splits: list[int], exchange: int
) -> Tensor:
    return _exchanges[exchange].to_experts(x_TD.contiguous(), _whole(send, send_splits, recv_splits)).wait()


@torch.library.custom_op("foreroute::to_tokens", mutates_args=())
def _to_tokens(
    partial_RD: Tensor, send: list[Tensor], send_splits: list[int], recv_splits: list[int], exchange: int
) -> Tensor:
    return _exchanges[exchange].to_tokens(partial_RD.contiguous(), _whole(send, send_splits, recv_splits)).wait()


@_to_experts.register_fake
def _(x_TD: Tensor, send: list[Tensor], send_splits: list[int], recv_splits: list[int], exchange: int) -> Tensor:
    return x_TD.new_empty(sum(recv_splits), x_TD.shape[1])


@_to_tokens.register_fake
def _(partial_RD: Tensor, send: list[Tensor], send_splits: list[int], recv_splits: list[int], exchange: int) -> Tensor:
    return partial_RD.new_empty(send[3].shape[0] if send else send_splits[0], partial_RD.shape[1])


def _keep_transfer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, send, *ctx.rest = inputs
    ctx.save_for_backward(*send)


def _backward_by(transpose: Callable[..., Tensor]) -> Callable[..., tuple[Any, ...]]:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        send = list(ctx.saved_tensors)
        return transpose(gradient, send, *ctx.rest), [None] * len(send), None, None, None

    return backward


_to_experts.register_autograd(_backward_by(_to_tokens), setup_context=_keep_transfer)
_to_tokens.register_autograd(_backward_by(_to_experts), setup_context=_keep_transfer)
