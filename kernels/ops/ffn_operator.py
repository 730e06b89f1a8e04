"""The operator behind expert_ffn and moe_ffn, as autograd, torch.compile and fake tensors see it.

    foreroute::ffn           out, and the tensors saved for backward; out is y_ND, or with mixing weights out_RD
    foreroute::ffn_backward  the gradients of the token rows, the mixing weights and the parameters

Arguments are flat, as operators require, and already checked. The host limits the speed of a small model, so a
benchmark counts the calls made here (benchmarks/bench_host.py). The operator is registered with torch.library.Library:
the wrappers of torch.library.custom_op traverse all arguments several times, 0.2 ms a layer. If no tool observes
operators, the same functions are called without the dispatcher.

Letters: R token rows, D width, L experts here, F expert hidden width, N expert rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from foreroute.kernels.activations import saves_pre
from foreroute.kernels.cpu.combine_permute import combine_cpu
from foreroute.kernels.cpu.expert_ffn import ffn_backward_cpu, ffn_forward_cpu
from foreroute.kernels.cpu.masked_ffn import masked_backward, masked_forward
from foreroute.kernels.dropout import Dropout
from foreroute.kernels.expert_index import ExpertRows
from foreroute.kernels.gpu.combine_permute import combine_triton
from foreroute.kernels.gpu.expert_ffn import ffn_backward_triton, ffn_forward_triton, num_row_tiles
from foreroute.kernels.launching import arch_of
from foreroute.kernels.operands import ExpertWeights, FfnGradients, Saved, pack_weights
from foreroute.kernels.tiles import row_block

_NUM_ROWS = len(ExpertRows.__slots__)  # index tensors
_NUM_SAVED = len(Saved._fields)


class FfnCall(NamedTuple):
    """The options of one call of the operator."""

    save: bool  # backward may follow
    dweight: bool  # backward computes the gradient of the mixing weights
    masked: bool
    activation: str
    backend: str
    mode: str
    precision: str


class _Operands(NamedTuple):
    """The operator's flat arguments, in order; the fields of a FfnCall follow them."""

    x_RD: Tensor
    weight_N: Tensor | None
    weights: list[Tensor]
    rows: list[Tensor]
    token_R: Tensor | None
    seed: Tensor | None
    rate: float
    first_expert: int

    @property
    def dropout(self) -> Dropout | None:
        """The dropout, or None."""
        if self.token_R is None or self.seed is None:
            return None
        return Dropout(self.rate, self.seed, self.token_R, self.first_expert)


def ffn(
    x_RD: Tensor,
    weight_N: Tensor | None,
    weights: ExpertWeights,
    rows: ExpertRows,
    dropout: Dropout | None,
    call: FfnCall,
) -> tuple[Tensor, Saved]:
    """Run the operator; the result is differentiable if call.save is set."""
    run = _differentiable if _unobserved(x_RD) else _ffn
    out, *saved = run(*_flat(x_RD, weight_N, weights, rows, dropout), *call)
    return out, Saved(*saved)


def ffn_backward(
    dout: Tensor,
    x_RD: Tensor,
    weight_N: Tensor | None,
    weights: ExpertWeights,
    rows: ExpertRows,
    saved: Saved,
    dropout: Dropout | None,
    call: FfnCall,
) -> FfnGradients:
    """Run the operator's backward pass."""
    operands = _flat(x_RD, weight_N, weights, rows, dropout)
    dx_RD, dweight_N, *dweights = _run_backward(dout, list(saved), *operands, *call)
    return FfnGradients(dx_RD, ExpertWeights(*dweights), dweight_N if call.dweight else None)


def _flat(
    x_RD: Tensor, weight_N: Tensor | None, weights: ExpertWeights, rows: ExpertRows, dropout: Dropout | None
) -> _Operands:
    index = list(rows.tensors())
    if dropout is None:
        return _Operands(x_RD, weight_N, pack_weights(weights), index, None, None, 0.0, 0)
    masks = dropout.token_R, dropout.words(), dropout.rate, dropout.first_expert
    return _Operands(x_RD, weight_N, pack_weights(weights), index, *masks)


def _whole(arguments: tuple[Any, ...]) -> tuple[_Operands, FfnCall]:
    """Split the flat arguments."""
    count = len(_Operands._fields)
    return _Operands(*arguments[:count]), FfnCall(*arguments[count:])


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    operands, call = _whole(arguments)
    x_RD, weight_N = operands.x_RD, operands.weight_N
    experts, index = ExpertWeights(*operands.weights), ExpertRows(*operands.rows)
    dropout, activation = operands.dropout, call.activation
    if call.backend == "triton":
        out, saved = ffn_forward_triton(
            x_RD, experts, index, dropout, activation=activation, save=call.save, precision=call.precision
        )
        if weight_N is not None:
            out = combine_triton(out, weight_N, index)
    elif call.masked and weight_N is not None:
        whole = x_RD, weight_N, experts, index, dropout
        out, saved = masked_forward(*whole, activation=activation, dweight=call.dweight)
    else:
        out, saved = ffn_forward_cpu(
            x_RD, experts, index, dropout, activation=activation, save=call.save, mode=call.mode
        )
        if weight_N is not None:
            out = combine_cpu(out, weight_N, index)
    return out, *saved


def _backward(dout: Tensor, saved: list[Tensor], *arguments: Any) -> list[Tensor]:
    operands, call = _whole(arguments)
    x_RD, weight_N = operands.x_RD, operands.weight_N
    experts, index = ExpertWeights(*operands.weights), ExpertRows(*operands.rows)
    whole = dout, x_RD, experts, index, operands.dropout, Saved(*saved)
    activation, dweight = call.activation, call.dweight
    if call.backend == "triton":
        found = ffn_backward_triton(
            *whole, activation=activation, weight_N=weight_N, dweight=dweight, precision=call.precision
        )
    elif call.masked and weight_N is not None:
        masked = dout, x_RD, weight_N, *whole[2:]
        found = masked_backward(*masked, activation=activation, dweight=dweight)
    else:
        found = ffn_backward_cpu(*whole, activation=activation, weight_N=weight_N, dweight=dweight)
    dweight_N = x_RD.new_empty(0) if found.weight_N is None else found.weight_N
    return [found.x_RD, dweight_N, *pack_weights(found.weights)]


def _unobserved(tensor: Tensor) -> bool:
    """Return whether a tensor is a real one and neither torch.compile nor a dispatch mode observes operators."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    operands, call = _whole(arguments)
    x_RD, experts, index = operands.x_RD, ExpertWeights(*operands.weights), ExpertRows(*operands.rows)
    (num_inputs, width_D), num_rows, (num_experts, width_F) = x_RD.shape, index.num_rows, experts.b1_LF.shape
    gated, nothing = experts.w3_LFD is not None, x_RD.new_empty
    out = x_RD.new_empty(num_rows if operands.weight_N is None else num_inputs, width_D)
    tile_map = index.offset_L.new_empty(0, 2)
    if call.masked:
        hidden = (num_inputs, num_experts * width_F)
        return out, x_RD.new_empty(hidden), x_RD.new_empty(hidden if gated else (0, hidden[1])), nothing(0), tile_map
    hidden = (num_rows, width_F)
    if call.backend == "cpu":
        x_ND = x_RD.new_empty(num_rows, width_D) if call.mode == "fast" and call.save else nothing(0)
        return out, x_RD.new_empty(hidden), x_RD.new_empty(hidden if gated else (0, width_F)), x_ND, tile_map
    empty_pre = not call.save and saves_pre(call.activation, gated=gated)
    pre_NF = nothing(0) if empty_pre else x_RD.new_empty(hidden)
    gate_NF = x_RD.new_empty(hidden) if call.save and gated else nothing(0)
    if call.save:
        block = row_block(
            arch_of(x_RD), x_RD.dtype, call.precision, gated=gated, rows=num_rows, experts=index.num_experts
        )
        tile_map = index.offset_L.new_empty(num_row_tiles(index, block), 2)
    return out, pre_NF, gate_NF, nothing(0), tile_map


def _fake_backward(dout: Tensor, saved: list[Tensor], *arguments: Any) -> list[Tensor]:
    operands, call = _whole(arguments)
    x_RD, weight_N = operands.x_RD, operands.weight_N
    dweight_N = torch.empty_like(weight_N) if call.dweight and weight_N is not None else x_RD.new_empty(0)
    return [torch.empty_like(x_RD), dweight_N, *(torch.empty_like(w) for w in operands.weights)]


def _run_forward(x_RD: Any, *arguments: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        if _unobserved(x_RD):
            return _forward(x_RD, *arguments)
        return _ffn(x_RD, *arguments)  # type: ignore[no-any-return]


def _run_backward(dout: Tensor, *arguments: Any) -> list[Tensor]:
    run = _backward if _unobserved(dout) else _ffn_backward
    return run(dout, *arguments)


class _Ffn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x_RD, weight_N, token_R, seed, *lists = tensors
        outputs = _run_forward(x_RD, weight_N, lists[:-_NUM_ROWS], lists[-_NUM_ROWS:], token_R, seed, *rest)
        ctx.rest, ctx.dweight = rest, FfnCall(*rest[-len(FfnCall._fields) :]).dweight
        ctx.save_for_backward(*tensors, *outputs[1:])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        x_RD, weight_N, token_R, seed, *lists = ctx.saved_tensors
        lists, saved = lists[:-_NUM_SAVED], lists[-_NUM_SAVED:]
        operands = x_RD, weight_N, lists[:-_NUM_ROWS], lists[-_NUM_ROWS:], token_R, seed
        dx_RD, dweight_N, *dweights = _run_backward(dout.contiguous(), saved, *operands, *ctx.rest)
        return None, dx_RD, dweight_N if ctx.dweight else None, None, None, *dweights, *(None,) * _NUM_ROWS


def _differentiable(*arguments: Any) -> tuple[Tensor, ...]:
    operands, call = _whole(arguments)
    if not (call.save and torch.is_grad_enabled()):
        return _run_forward(*arguments)
    x_RD, weight_N, weights, rows, token_R, seed, *numbers = operands
    return _Ffn.apply((*numbers, *call), x_RD, weight_N, token_R, seed, *weights, *rows)  # type: ignore[no-any-return, no-untyped-call]


_OPERANDS = (
    "Tensor x_RD, Tensor? weight_N, Tensor[] weights, Tensor[] rows, Tensor? token_R, Tensor? seed, float rate,"
    " int first_expert"
)
_CALL = "bool save, bool dweight, bool masked, str activation, str backend, str mode, str precision"
_library = torch.library.Library("foreroute", "FRAGMENT")
_traceable = {"tags": (torch.Tag.pt2_compliant_tag,)}
_library.define(f"ffn({_OPERANDS}, {_CALL}) -> ({', '.join(['Tensor'] * (1 + _NUM_SAVED))})", **_traceable)
_library.define(f"ffn_backward(Tensor dout, Tensor[] saved, {_OPERANDS}, {_CALL}) -> Tensor[]", **_traceable)
_library.impl("ffn", _forward, "CompositeExplicitAutograd")
_library.impl("ffn_backward", _backward, "CompositeExplicitAutograd")
_library.impl("ffn", _differentiable, "Autograd")
torch.library.register_fake("foreroute::ffn", _fake_forward, lib=_library)
torch.library.register_fake("foreroute::ffn_backward", _fake_backward, lib=_library)
_ffn = torch.ops.foreroute.ffn.default
_ffn_backward = torch.ops.foreroute.ffn_backward.default
