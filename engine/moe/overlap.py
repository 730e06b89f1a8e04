"""A layer in chunks: while experts compute one chunk, the rows of the next one come and the results before it go back.

    forward    send 0 | send 1, experts 0, return 0 | send 2, experts 1, return 1 | ... | wait for all that returns
    backward   the same, with the gradients of the results going out and those of the rows coming back

One autograd function holds all chunks, so every gradient of a parameter is the sum over the chunks, added up in its own
number format, and arrives once. It keeps for backward what the chunks one by one would keep, the parameters themselves
among it (not views or copies, which ZeRO-3 would leave empty), all through save_for_backward, so recomputation drops
it.

Letters: T local tokens (t: of one chunk), D width, R received rows, N expert rows, of one chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foreroute.engine.moe.exchange import Exchange, Moving
from foreroute.engine.routing.plan import Chunk
from foreroute.engine.tracing import span
from foreroute.kernels import ExpertWeights, moe_ffn_backward, moe_ffn_forward
from foreroute.kernels.operands import Saved, pack_weights, unpack_weights, wants_grad


class ChunkCall(NamedTuple):
    """The experts of one chunk."""

    chunk: Chunk
    weight_N: Tensor  # mixing weights, as kernels.moe_ffn wants them
    options: dict[str, Any]  # the keyword arguments of kernels.moe_ffn


@dataclass(frozen=True, slots=True)
class _Trip:
    """What the function needs besides tensors."""

    calls: Sequence[ChunkCall]
    exchange: Exchange
    save: bool  # backward may follow

    @property
    def chunks(self) -> list[Chunk]:
        return [call.chunk for call in self.calls]


def run_in_chunks(x_TD: Tensor, calls: Sequence[ChunkCall], weights: ExpertWeights, exchange: Exchange) -> Tensor:
    """Exchange and compute chunk by chunk: dispatch, experts and combine in one; gives y_TD."""
    weights_N = [call.weight_N for call in calls]
    parameters = pack_weights(weights)
    trip = _Trip(calls, exchange, wants_grad(x_TD, *weights_N, *parameters))
    y_TD: Tensor = _InChunks.apply(trip, x_TD.contiguous(), *weights_N, *parameters)  # type: ignore[no-untyped-call]
    return y_TD


def _sent(x_TD: Tensor, trip: _Trip) -> Iterator[Tensor]:
    """Send all chunks to their experts and give what arrives, each after the one behind it has been sent."""
    x_chunks = x_TD.split([chunk.num_tokens for chunk in trip.chunks])
    coming: Moving | None = None
    for x_tD, chunk in zip(x_chunks, trip.chunks, strict=True):
        behind = trip.exchange.to_experts(x_tD, chunk)
        if coming is not None:
            yield coming.wait()
        coming = behind
    assert coming is not None
    yield coming.wait()


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: _Trip, x_TD: Tensor, *tensors: Tensor) -> Tensor:
        weights = unpack_weights(list(tensors[len(trip.calls) :]))
        kept: list[Tensor] = []
        going: list[Moving] = []
        dweight = trip.save and any(ctx.needs_input_grad[2 : 2 + len(trip.calls)])
        coming = _sent(x_TD, trip)
        for received_RD, call, weight_N in zip(coming, trip.calls, tensors, strict=False):
            with span("experts"):
                partial_RD, saved = moe_ffn_forward(
                    received_RD, weight_N, weights, call.chunk.rows, save=trip.save, dweight=dweight, **call.options
                )
            going.append(trip.exchange.to_tokens(partial_RD, call.chunk))
            if trip.save:
                kept += [received_RD, *saved]
        ctx.trip, ctx.dweight = trip, dweight
        ctx.save_for_backward(*tensors, *kept)
        return torch.cat([moving.wait() for moving in going])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Any, ...]:
        trip: _Trip = ctx.trip
        num_chunks, num_inputs = len(trip.calls), len(ctx.needs_input_grad) - 2
        tensors = ctx.saved_tensors
        weights_N, weights = tensors[:num_chunks], unpack_weights(tensors[num_chunks:num_inputs])
        kept = iter(tensors[num_inputs:])
        going: list[Moving] = []
        d_weights_N: list[Tensor | None] = []
        d_parameters: list[Tensor] = []
        coming = _sent(d_y_TD.contiguous(), trip)
        for d_partial_RD, call, weight_N in zip(coming, trip.calls, weights_N, strict=True):
            received_RD, *saved = (next(kept) for _ in range(1 + len(Saved._fields)))
            with span("experts"):
                gradients = moe_ffn_backward(
                    d_partial_RD,
                    received_RD,
                    weight_N,
                    weights,
                    call.chunk.rows,
                    Saved(*saved),
                    dweight=ctx.dweight,
                    **call.options,
                )
            if ctx.needs_input_grad[1]:
                going.append(trip.exchange.to_tokens(gradients.x_RD, call.chunk))
            d_weights_N.append(gradients.weight_N)
            found = [_wide(gradient) for gradient in pack_weights(gradients.weights)]
            if d_parameters:
                torch._foreach_add_(d_parameters, found)
            else:
                d_parameters = found
        d_x_TD = torch.cat([moving.wait() for moving in going]) if going else None
        parameters = tensors[num_chunks:num_inputs]
        d_parameters = [d.to(p.dtype) for d, p in zip(d_parameters, parameters, strict=True)]
        return None, d_x_TD, *d_weights_N, *d_parameters


def _wide(gradient: Tensor) -> Tensor:
    """Parts are added up in fp32 at least."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
