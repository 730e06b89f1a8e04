"""The exchange: moves rows to the ranks that hold their experts and back, as the Plan says.

`dispatch` gives the rows that this rank's experts read (the Plan's received rows); `combine` takes one partial result
per received row and gives one row per local token. The two are each other's transposes, so backward is one of them.
`Local`: one rank, nothing moves. `Exchange`: over a process group, in the way that the plan was made for:

    tokens   one uneven all-to-all: each token once to each rank that has one of its experts, where the partial sum of
             these experts is made; one row back from there
    gather   all rows to all ranks, and the partial results added up on the way back, for large k

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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foreroute.engine.config import ParallelConfig
from foreroute.engine.config.enums import Backend
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.in_flight import AsyncCollective
from foreroute.engine.routing.exchange_choice import use_gather, wire_dtype
from foreroute.engine.routing.live_plan import build_live_plan
from foreroute.engine.routing.plan import Chunk, Plan, Route, build_plan
from foreroute.engine.tracing import span
from foreroute.kernels import ExpertRows, combine, permute_rows


class Local:
    """Exchange of a one-rank expert group: no collective, no copy, zero bytes."""

    def plan(self, route: Route, num_experts: int, x_TD: Tensor) -> Plan:
        """Make the plan of a live router's route."""
        return build_plan(route, num_experts)

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Return the received rows [R, D], here the tokens themselves."""
        check_plan(x_TD, plan, ranks=1)
        return x_TD

    def combine(self, partial_RD: Tensor, plan: Plan) -> Tensor:
        """Return the output rows [T, D], here the partial results themselves."""
        return partial_RD


class Transfer(Protocol):
    """What the exchange reads of a Chunk."""

    @property
    def send(self) -> ExpertRows | None:
        """Rows to send, rank by rank."""

    @property
    def send_splits(self) -> tuple[int, ...]:
        """Rows to each rank."""

    @property
    def recv_splits(self) -> tuple[int, ...]:
        """Rows from each rank."""


@dataclass(frozen=True, slots=True)
class Moving:
    """Rows on their way."""

    collective: AsyncCollective
    finish: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        """Give them where they arrive."""
        return self.finish(self.collective.wait())


class Exchange:
    """Exchange over a process group."""

    def __init__(self, comm: ExpertGroupComm, parallel: ParallelConfig, backend: str | None = None) -> None:
        """Take the group; rows travel in the configuration's number format (on a GPU, gather adds them up in it).

        Args:
            backend: of the kernels that pack rows and add them up; None goes by their device.
        """
        self.comm, self.parallel, self.backend = comm, parallel, backend
        self.number = next(_numbers)  # by which operators find it
        _exchanges[self.number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """A group is neither copied nor pickled: a copy of a layer is not connected, and refuses plans of several
        ranks."""
        return Local, ()

    def plan(self, route: Route, num_experts: int, x_TD: Tensor) -> Plan:
        """Make the plan of a live router's routes, one of each rank; a collective (engine/routing/live_plan.py)."""
        tokens, width = x_TD.shape
        gather = use_gather(
            self.parallel,
            experts=num_experts,
            ranks=self.comm.ranks,
            k=route.expert_TK.shape[1],
            tokens=tokens,
            width=width,
            itemsize=wire_dtype(self.parallel, x_TD.dtype).itemsize,
        )
        return build_live_plan(route, num_experts, self.comm, gather=gather, chunks=self.parallel.chunks)

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Return the received rows [R, D]: rank by rank, in the order of the sender's tokens."""
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
        """Send a chunk's rows from tokens to experts, without autograd; the received rows arrive."""
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
        """Send a chunk's rows from experts to tokens, without autograd; the sum of each token's rows arrives."""
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
    """Make the exchange of a process group."""
    if comm.ranks == 1:
        return Local()
    return Exchange(comm, parallel, None if backend is Backend.auto else backend.value)


def check_plan(x_TD: Tensor, plan: Plan, *, ranks: int) -> None:
    """Raise ValueError unless a plan is for so many ranks and for these tokens."""
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


class _Sent(NamedTuple):
    """A Transfer."""

    send: ExpertRows | None
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]


def _flat(chunk: Chunk) -> tuple[list[Tensor], list[int], list[int]]:
    return [] if chunk.send is None else list(chunk.send.tensors()), list(chunk.send_splits), list(chunk.recv_splits)


def _whole(send: list[Tensor], send_splits: list[int], recv_splits: list[int]) -> _Sent:
    return _Sent(ExpertRows(*send) if send else None, tuple(send_splits), tuple(recv_splits))


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
