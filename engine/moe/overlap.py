"""Overlap of exchange and computation: while experts compute a chunk, token rows of the next chunk and results of the
previous one are sent.

    forward    send 0 | send 1, experts 0, return 0 | send 2, experts 1, return 1 | ... | wait for all results
    backward   the same, with the gradients of the results sent out and the gradients of the token rows returned

One autograd function computes all chunks, so it sums a parameter's gradient over the chunks, in fp32 at least, and
returns it once. It saves the same tensors for backward as separate chunks would. These include the parameters
themselves, not views or copies, which would be empty under ZeRO-3. All are saved by save_for_backward, so activation
checkpointing drops them.

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
from foreroute.kernels.operands import Saved, pack_weights, wants_grad


class ChunkCall(NamedTuple):
    """The call of the experts for one chunk."""

    chunk: Chunk
    weight_N: Tensor  # mixing weights, as for kernels.moe_ffn
    options: dict[str, Any]  # the keyword arguments of kernels.moe_ffn


@dataclass(frozen=True, slots=True)
class _Trip:
    """The function's arguments that are not tensors."""

    calls: Sequence[ChunkCall]
    exchange: Exchange
    save: bool  # backward may follow


def run_in_chunks(x_TD: Tensor, calls: Sequence[ChunkCall], weights: ExpertWeights, exchange: Exchange) -> Tensor:
    """Run dispatch, experts and combine chunk by chunk; return y_TD."""
    weights_N = [call.weight_N for call in calls]
    parameters = pack_weights(weights)
    trip = _Trip(calls, exchange, wants_grad(x_TD, *weights_N, *parameters))
    y_TD: Tensor = _InChunks.apply(trip, x_TD.contiguous(), *weights_N, *parameters)  # type: ignore[no-untyped-call]
    return y_TD


def _sent(x_TD: Tensor, trip: _Trip) -> Iterator[Tensor]:
    """Send all chunks to their experts; yield each chunk's received rows after the next chunk has been sent."""
    chunks = [call.chunk for call in trip.calls]
    x_chunks = x_TD.split([chunk.num_tokens for chunk in chunks])
    coming: Moving | None = None
    for x_tD, chunk in zip(x_chunks, chunks, strict=True):
        following = trip.exchange.to_experts(x_tD, chunk)
        if coming is not None:
            yield coming.wait()
        coming = following
    assert coming is not None
    yield coming.wait()


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: _Trip, x_TD: Tensor, *tensors: Tensor) -> Tensor:
        weights = ExpertWeights(*tensors[len(trip.calls) :])
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
        weights_N, weights = tensors[:num_chunks], ExpertWeights(*tensors[num_chunks:num_inputs])
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
            found = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in pack_weights(gradients.weights)]
            if d_parameters:
                torch._foreach_add_(d_parameters, found)
            else:
                d_parameters = found
        d_x_TD = torch.cat([moving.wait() for moving in going]) if going else None
        parameters = tensors[num_chunks:num_inputs]
        d_parameters = [d.to(p.dtype) for d, p in zip(d_parameters, parameters, strict=True)]
        return None, d_x_TD, *d_weights_N, *d_parameters
