"""Overlap of exchange and computation: while experts compute a chunk, token rows of the next chunk and results of the
previous one are sent.

    forward    send 0 | send 1, experts 0, return 0 | send 2, experts 1, return 1 | ... | wait for all results
    backward   the same, with the gradients of the results sent out and the gradients of the token rows returned

One autograd function computes all chunks, so it sums a parameter's gradient over the chunks, in fp32 at least, and
returns it once. It saves the same tensors for backward as separate chunks would. These include the parameters
themselves, not views or copies, which would be empty under ZeRO-3. All are saved by save_for_backward, so activation
checkpointing drops them. A gate weighs the rows of a chunk when they have arrived, and again in backward. Its weight
belongs to another module: DeepSpeed sees it read in this call, and gathers it around the call as around its own.

Letters: T local tokens (t: of one chunk), D width, R received rows, N expert rows, of one chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foreroute.engine.moe.exchange import Exchange, Moving
from foreroute.engine.moe.gate import LiveGate
from foreroute.engine.routing.plan import Chunk
from foreroute.engine.tracing import span
from foreroute.kernels import ExpertWeights, moe_ffn_backward, moe_ffn_forward
from foreroute.kernels.operands import Saved, pack_weights, wants_grad


class ChunkCall(NamedTuple):
    """The call of the experts for one chunk."""

    chunk: Chunk
    weight_N: Tensor | None  # mixing weights, as for kernels.moe_ffn; None: those of a gate
    options: dict[str, Any]  # the keyword arguments of kernels.moe_ffn


@dataclass(frozen=True, slots=True)
class _Trip:
    """The function's arguments that are not tensors."""

    calls: Sequence[ChunkCall]
    exchange: Exchange
    gate: LiveGate | None
    save: bool  # backward may follow


def run_in_chunks(
    x_TD: Tensor, calls: Sequence[ChunkCall], weights: ExpertWeights, exchange: Exchange, gate: LiveGate | None = None
) -> Tensor:
    """Run dispatch, experts and combine chunk by chunk; return y_TD.

    Args:
        gate: makes the mixing weights.
    """
    weighing = [gate.weight] if gate is not None else [call.weight_N for call in calls if call.weight_N is not None]
    parameters = pack_weights(weights)
    trip = _Trip(calls, exchange, gate, wants_grad(x_TD, *weighing, *parameters))
    y_TD: Tensor = _InChunks.apply(trip, x_TD.contiguous(), *weighing, *parameters)  # type: ignore[no-untyped-call]
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
        num_weighing = 1 if trip.gate is not None else len(trip.calls)
        weights = ExpertWeights(*tensors[num_weighing:])
        kept: list[Tensor] = []
        going: list[Moving] = []
        dweight = trip.save and any(ctx.needs_input_grad[2 : 2 + num_weighing])
        dweight = dweight or (trip.save and trip.gate is not None and ctx.needs_input_grad[1])
        coming = _sent(x_TD, trip)
        for number, (received_RD, call) in enumerate(zip(coming, trip.calls, strict=True)):
            with span("experts"):
                weight_N = tensors[number] if trip.gate is None else _weigh(trip.gate, received_RD, tensors[0], call)
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
        num_weighing, num_inputs = len(trip.calls) if trip.gate is None else 1, len(ctx.needs_input_grad) - 2
        tensors = ctx.saved_tensors
        weights = ExpertWeights(*tensors[num_weighing:num_inputs])
        kept = iter(tensors[num_inputs:])
        going: list[Moving] = []
        d_weighing: list[Tensor | None] = []
        d_parameters: list[Tensor] = []
        coming = _sent(d_y_TD.contiguous(), trip)
        for number, (d_partial_RD, call) in enumerate(zip(coming, trip.calls, strict=True)):
            received_RD, *saved = (next(kept) for _ in range(1 + len(Saved._fields)))
            with span("experts"):
                weight_N = tensors[number] if trip.gate is None else _weigh(trip.gate, received_RD, tensors[0], call)
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
                d_x_RD, d_weight = gradients.x_RD, gradients.weight_N
                if trip.gate is not None and ctx.dweight:
                    more_RD, d_weight = _weigh_backward(trip.gate, received_RD, tensors[0], call, d_weight)
                    d_x_RD = d_x_RD + more_RD
            if ctx.needs_input_grad[1]:
                going.append(trip.exchange.to_tokens(d_x_RD, call.chunk))
            d_weighing.append(d_weight)
            found = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in pack_weights(gradients.weights)]
            if d_parameters:
                torch._foreach_add_(d_parameters, found)
            else:
                d_parameters = found
        d_x_TD = torch.cat([moving.wait() for moving in going]) if going else None
        parameters = tensors[num_weighing:num_inputs]
        d_parameters = [d.to(p.dtype) for d, p in zip(d_parameters, parameters, strict=True)]
        if trip.gate is not None:
            parts = [d_weight for d_weight in d_weighing if d_weight is not None]
            d_weighing = [torch.stack(parts).sum(dim=0).to(tensors[0].dtype) if parts else None]
        return None, d_x_TD, *d_weighing, *d_parameters


def _weigh(gate: LiveGate, received_RD: Tensor, weight_ED: Tensor, call: ChunkCall) -> Tensor:
    assert call.chunk.sets is not None, "a plan for live weights"
    with torch.no_grad():
        return gate.weigh(received_RD, weight_ED, call.chunk.sets)


def _weigh_backward(
    gate: LiveGate, received_RD: Tensor, weight_ED: Tensor, call: ChunkCall, d_weight_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the received rows and, in fp32 at least, of the gate."""
    assert call.chunk.sets is not None and d_weight_N is not None
    wide = torch.promote_types(weight_ED.dtype, torch.float32)
    with torch.enable_grad():
        x_RD, w_ED = received_RD.detach().requires_grad_(), weight_ED.detach().to(wide).requires_grad_()
        weight_N = gate.weigh(x_RD, w_ED, call.chunk.sets)
        d_x_RD, d_w_ED = torch.autograd.grad(weight_N, (x_RD, w_ED), d_weight_N.to(weight_N.dtype))
    return d_x_RD, d_w_ED
