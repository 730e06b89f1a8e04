"""moe_ffn: the expert layer as one operation: expert_ffn, then combine.

    out[r] = sum over the expert rows n of r:  weight[n] * FFN_e(n)(x[r])

What the pair gains by being one: backward reads the output's gradient through the index (no copy of it for each expert
row), and the gradient of the weights, if anybody wants it, is rewritten so that the experts' outputs are not saved.
Planned routers' weights are constants and their gradient is not computed. On the CPU, `masked` computes the same with
all rows through all experts, which wins when k is near E (kernels/cpu/masked_ffn.py).

Letters: R input rows, D width, L experts here, F expert hidden width, N expert rows.
"""

from typing import Any

import torch
from torch import Tensor

from foreroute.kernels.combine import check_weight, combine_forward, combine_reference
from foreroute.kernels.cpu.masked_ffn import masked_backward, masked_forward
from foreroute.kernels.dropout import Dropout
from foreroute.kernels.expert_ffn import expert_ffn_reference, fake_saved, ffn_backward, ffn_forward, split
from foreroute.kernels.expert_rows import ExpertRows
from foreroute.kernels.operands import (
    ExpertWeights,
    FfnGradients,
    Options,
    Saved,
    check_dropout,
    check_rows,
    check_tensor,
    check_weights,
    pack_dropout,
    pack_weights,
    resolve_options,
    unpack_dropout,
    unpack_weights,
    wants_grad,
)


def moe_ffn(
    x_RD: Tensor,
    weight_N: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    *,
    dropout: Dropout | None = None,
    masked: bool = False,
    backend: str | None = None,
    mode: str = "lean",
    precision: str = "ieee",
    debug: bool = False,
) -> Tensor:
    """Apply each row's experts and add up their weighted outputs.

    Args:
        x_RD: input rows, contiguous; fp32, bf16 or fp16 (fp64 too on the CPU).
        weight_N: fp32 mixing weight of each expert row, in their order: `weight_RK.flatten()[choice_N]`, where choice_N
            is the second result of expert_rows. The CPU rounds it to the dtype of x. Gets a gradient only if it asks
            for one.
        masked: on the CPU, multiply all rows by all experts instead of only the chosen ones; keeps R * L * F numbers in
            either mode, and lets an expert that overflows reach rows that did not choose it. An input row must not
            choose an expert twice (debug checks it).
        weights, rows, dropout, backend, mode, precision, debug: see kernels.expert_ffn.

    Returns:
        out_RD, dtype of x. A row without expert rows gives zeros.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is allowed.

    Example, the rows and experts of kernels.expert_ffn; row 1 mixes [17, 0.5] and [0, 38.5]:

        >>> import torch
        >>> from foreroute.kernels import ExpertWeights, expert_rows_from_lists, moe_ffn
        >>> rows = expert_rows_from_lists([[0], [0, 1]], num_experts=2)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> w1 = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])
        >>> b1 = torch.tensor([[10.0], [20.0]])
        >>> w2 = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> b2 = torch.tensor([[0.0, 0.5], [0.0, 0.5]])
        >>> moe_ffn(x, torch.tensor([1.0, 0.5, 0.5]), ExpertWeights(w1, b1, w2, b2), rows).tolist()
        [[13.0, 0.5], [8.5, 19.5]]
    """
    options = resolve_options(x_RD, backend, mode, precision)
    _check(x_RD, weight_N, weights, rows, dropout, options, masked=masked, debug=debug)
    if options.backend == "reference":
        y_ND = expert_ffn_reference(x_RD, weights, rows, dropout)
        return combine_reference(y_ND, weight_N, rows)
    save, dweight = wants_grad(x_RD, weight_N, *weights), wants_grad(weight_N)
    out_RD: Tensor
    out_RD, *_ = _moe_ffn(
        x_RD,
        weight_N,
        pack_weights(weights),
        list(rows.tensors()),
        *pack_dropout(dropout),
        save,
        dweight,
        masked,
        *options,
    )
    return out_RD


def moe_ffn_forward(
    x_RD: Tensor,
    weight_N: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    *,
    save: bool,
    dweight: bool,
    dropout: Dropout | None = None,
    masked: bool = False,
    backend: str | None = None,
    mode: str = "lean",
    precision: str = "ieee",
    debug: bool = False,
) -> tuple[Tensor, Saved]:
    """Run moe_ffn without autograd, for a caller that writes its own autograd function.

    Args:
        save: moe_ffn_backward will follow; otherwise what is given for it is incomplete.
        dweight: it will be asked for the gradient of weight_N.
        others: as for moe_ffn; backend "reference" has no backward pass of its own and is refused.

    Returns:
        out_RD, and what moe_ffn_backward needs besides the arguments.
    """
    options = resolve_options(x_RD, backend, mode, precision)
    _check(x_RD, weight_N, weights, rows, dropout, options, masked=masked, debug=debug)
    if options.backend == "reference":
        raise ValueError("backend='reference': has no backward pass of its own; use moe_ffn")
    with torch.no_grad():
        out_RD, *saved = _moe_ffn(
            x_RD,
            weight_N,
            pack_weights(weights),
            list(rows.tensors()),
            *pack_dropout(dropout),
            save,
            dweight,
            masked,
            *options,
        )
    return out_RD, Saved(*saved)


def moe_ffn_backward(
    dout_RD: Tensor,
    x_RD: Tensor,
    weight_N: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    saved: Saved,
    *,
    dweight: bool,
    dropout: Dropout | None = None,
    masked: bool = False,
    backend: str | None = None,
    mode: str = "lean",
    precision: str = "ieee",
    debug: bool = False,
) -> FfnGradients:
    """Give the gradients of what moe_ffn_forward computed from the same arguments; dout_RD: of out_RD, contiguous."""
    options = resolve_options(x_RD, backend, mode, precision)
    check_tensor("dout_RD", dout_RD, tuple(x_RD.shape), x_RD)
    with torch.no_grad():
        dx_RD, dweight_N, *dweights = _moe_ffn_backward(
            dout_RD,
            x_RD,
            weight_N,
            pack_weights(weights),
            list(rows.tensors()),
            list(saved),
            *pack_dropout(dropout),
            dweight,
            masked,
            *options,
        )
    return FfnGradients(dx_RD, unpack_weights(dweights), dweight_N if dweight else None)


def _check(
    x_RD: Tensor,
    weight_N: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    dropout: Dropout | None,
    options: Options,
    *,
    masked: bool,
    debug: bool,
) -> None:
    check_rows(rows, x_RD, debug=debug)
    check_weights(x_RD, weights, rows, options.backend)
    check_weight(weight_N, rows, x_RD)
    check_dropout(dropout, x_RD)
    if masked and options.backend != "cpu":
        raise ValueError(f"masked=True: backend {options.backend!r} multiplies only the chosen experts")


@torch.library.custom_op("foreroute::moe_ffn", mutates_args=())
def _moe_ffn(
    x_RD: Tensor,
    weight_N: Tensor,
    weights: list[Tensor],
    rows: list[Tensor],
    token_R: Tensor | None,
    rate: float,
    seed: int,
    first_expert: int,
    save: bool,
    dweight: bool,
    masked: bool,
    backend: str,
    mode: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out_RD, then Saved."""
    dropout = unpack_dropout(token_R, rate, seed, first_expert)
    experts, index = unpack_weights(weights), ExpertRows(*rows)
    if masked:
        out_RD, saved = masked_forward(x_RD, weight_N, experts, index, dropout, dweight=dweight)
    else:
        options = Options(backend, mode, precision)
        y_ND, saved = ffn_forward(x_RD, experts, index, dropout, save, options)
        out_RD = combine_forward(y_ND, weight_N, index, backend)
    return out_RD, *saved


@_moe_ffn.register_fake
def _(x_RD: Tensor, weight_N: Tensor, weights: list[Tensor], rows: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    *_, save, _, masked, backend, mode, _ = rest
    if not masked:
        return torch.empty_like(x_RD), *fake_saved(x_RD, weights, rows, save, backend, mode)
    width = weights[1].shape[0] * weights[1].shape[1]
    num_gates = x_RD.shape[0] if len(weights) == 5 else 0
    hidden_RH, gate_RH = x_RD.new_empty(x_RD.shape[0], width), x_RD.new_empty(num_gates, width)
    return torch.empty_like(x_RD), hidden_RH, gate_RH, x_RD.new_empty(0)


@torch.library.custom_op("foreroute::moe_ffn_backward", mutates_args=())
def _moe_ffn_backward(
    dout_RD: Tensor,
    x_RD: Tensor,
    weight_N: Tensor,
    weights: list[Tensor],
    rows: list[Tensor],
    saved: list[Tensor],
    token_R: Tensor | None,
    rate: float,
    seed: int,
    first_expert: int,
    dweight: bool,
    masked: bool,
    backend: str,
    mode: str,
    precision: str,
) -> list[Tensor]:
    """dx_RD, dweight_N (empty unless dweight), then the gradients of the weights."""
    dropout = unpack_dropout(token_R, rate, seed, first_expert)
    experts, index = unpack_weights(weights), ExpertRows(*rows)
    if masked:
        grads = masked_backward(dout_RD, x_RD, weight_N, experts, index, dropout, Saved(*saved), dweight=dweight)
    else:
        grads = ffn_backward(
            dout_RD,
            x_RD,
            experts,
            index,
            dropout,
            Saved(*saved),
            weight_N=weight_N,
            dweight=dweight,
            options=Options(backend, mode, precision),
        )
    dweight_N = weight_N.new_empty(0) if grads.weight_N is None else grads.weight_N
    return [grads.x_RD, dweight_N, *pack_weights(grads.weights)]


@_moe_ffn_backward.register_fake
def _(
    dout_RD: Tensor, x_RD: Tensor, weight_N: Tensor, weights: list[Tensor], rows: list[Tensor], *rest: Any
) -> list[Tensor]:
    dweight = rest[5]
    dweight_N = torch.empty_like(weight_N) if dweight else weight_N.new_empty(0)
    return [torch.empty_like(x_RD), dweight_N, *(torch.empty_like(w) for w in weights)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_RD, weight_N, weights, rows, token_R, *rest = inputs
    rate, seed, first_expert, _save, ctx.dweight, *ctx.how = rest
    ctx.dropout = rate, seed, first_expert
    ctx.num_weights = len(weights)
    ctx.save_for_backward(x_RD, weight_N, *weights, *rows, *output[1:], token_R)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout_RD: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dout_RD is None:
        return None, None, [None] * ctx.num_weights, [None] * 4, *(None,) * 10
    x_RD, weight_N, *tensors, token_R = ctx.saved_tensors
    weights, rows, saved = split(tensors, ctx.num_weights)
    dx_RD, dweight_N, *dweights = _moe_ffn_backward(
        dout_RD.contiguous(), x_RD, weight_N, weights, rows, saved, token_R, *ctx.dropout, ctx.dweight, *ctx.how
    )
    return dx_RD, dweight_N if ctx.dweight else None, dweights, [None] * 4, *(None,) * 10


_moe_ffn.register_autograd(_backward, setup_context=_setup_context)
