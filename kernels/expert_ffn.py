"""expert_ffn: the feed-forward of every expert over the rows that chose it, in one operation.

    y[n] = dropout(act(x[source[n]] @ w1[e].T + b1[e])) @ w2[e] + b2[e],   e the expert of expert row n
    act = ReLU, or with w3 SwiGLU: silu(.) * (x[source[n]] @ w3[e].T)

Input rows are read through an index and experts may have any number of rows: nothing is permuted, padded or dropped.
Backends: kernels/cpu/expert_ffn.py, kernels/gpu/expert_ffn.py (Triton), and the plain loops below. For the weighted
sum that usually follows use kernels.moe_ffn: its backward pass does not need y.

Letters: R input rows, N expert rows, L experts here, D width, F expert hidden width.
"""

from typing import Any

import torch
from torch import Tensor

from foreroute.kernels.cpu import expert_ffn as expert_ffn_cpu
from foreroute.kernels.dropout import Dropout, keep_mask, row_hash, unit_hash
from foreroute.kernels.expert_rows import ExpertRows
from foreroute.kernels.gpu import expert_ffn as expert_ffn_launch
from foreroute.kernels.operands import (
    ExpertWeights,
    FfnGradients,
    Options,
    Saved,
    check_dropout,
    check_rows,
    check_weights,
    pack_dropout,
    pack_weights,
    resolve_options,
    unpack_dropout,
    unpack_weights,
    wants_grad,
)


def expert_ffn(
    x_RD: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    *,
    dropout: Dropout | None = None,
    backend: str | None = None,
    mode: str = "lean",
    precision: str = "ieee",
    debug: bool = False,
) -> Tensor:
    """Apply its expert to each expert row.

    Args:
        x_RD: input rows, contiguous; fp32, bf16 or fp16 (fp64 too on the CPU). On "triton" all numbers start at an
            address that 16 divides.
        weights: stacked expert parameters, dtype of x; with w3 the activation is SwiGLU.
        rows: which input row each expert row reads (kernels/expert_rows.py).
        dropout: Dropout(rate, seed, token_R) on the hidden units, a function of seed, token, expert and unit alone.
        backend: "cpu", "triton" or "reference" (plain loops in fp64); by default "triton" on a GPU and "cpu" elsewhere.
        mode: what is kept for backward: "lean" x and the hidden units, N * F numbers (2 N * F for SwiGLU); "fast", on
            the CPU only, also the gathered input rows, N * D numbers.
        precision: of fp32 products on "triton": "ieee", or "tf32" (tensor cores, 10 bits of mantissa).
        debug: check every index on the host. Otherwise an index out of range is an error of PyTorch's at best.

    Returns:
        y_ND, dtype of x: the output of expert row n, not weighted.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is allowed.

    Example, two experts of one hidden unit; row 1 uses both, row 0 expert 0 only:

        >>> import torch
        >>> from foreroute.kernels import ExpertWeights, expert_ffn, expert_rows_from_lists
        >>> rows = expert_rows_from_lists([[0], [0, 1]], num_experts=2)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> w1 = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])
        >>> b1 = torch.tensor([[10.0], [20.0]])
        >>> w2 = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> b2 = torch.tensor([[0.0, 0.5], [0.0, 0.5]])
        >>> expert_ffn(x, ExpertWeights(w1, b1, w2, b2), rows).tolist()
        [[13.0, 0.5], [17.0, 0.5], [0.0, 38.5]]
    """
    options = resolve_options(x_RD, backend, mode, precision)
    check_rows(rows, x_RD, debug=debug)
    check_weights(x_RD, weights, rows, options.backend)
    check_dropout(dropout, x_RD)
    if options.backend == "reference":
        return expert_ffn_reference(x_RD, weights, rows, dropout)
    save = wants_grad(x_RD, *weights)
    y_ND: Tensor
    y_ND, *_ = _expert_ffn(x_RD, pack_weights(weights), list(rows.tensors()), *pack_dropout(dropout), save, *options)
    return y_ND


def expert_ffn_reference(
    x_RD: Tensor, weights: ExpertWeights, rows: ExpertRows, dropout: Dropout | None = None
) -> Tensor:
    """Compute expert_ffn one expert row at a time in fp64, differentiated by autograd: the truth for tests."""
    x = x_RD.double()
    w1, b1, w2, b2 = (tensor.double() for tensor in weights[:4])
    w3 = None if weights.w3_LFD is None else weights.w3_LFD.double()
    out = []
    for e, r in zip(rows.expert_N().tolist(), rows.source_N.tolist(), strict=True):
        z = w1[e] @ x[r] + b1[e]
        hidden = torch.relu(z) if w3 is None else z * torch.sigmoid(z) * (w3[e] @ x[r])
        if dropout is not None:
            row = row_hash(dropout, dropout.token_R[r : r + 1], e)
            unit_F = unit_hash(hidden.numel(), x.device)
            hidden = hidden * keep_mask(row, unit_F, dropout.threshold)[0] * dropout.scale
        out.append(hidden @ w2[e] + b2[e])
    return torch.stack(out).to(x_RD.dtype) if out else x_RD[:0]


def ffn_forward(
    x_RD: Tensor, weights: ExpertWeights, rows: ExpertRows, dropout: Dropout | None, save: bool, options: Options
) -> tuple[Tensor, Saved]:
    """Run the forward pass on the backend chosen."""
    if options.backend == "triton":
        return expert_ffn_launch.ffn_forward(x_RD, weights, rows, dropout, save=save, precision=options.precision)
    found: tuple[Tensor, Saved] = expert_ffn_cpu.ffn_forward(x_RD, weights, rows, dropout, save=save, mode=options.mode)
    return found


def ffn_backward(
    dout: Tensor,
    x_RD: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    dropout: Dropout | None,
    saved: Saved,
    *,
    weight_N: Tensor | None,
    dweight: bool,
    options: Options,
) -> FfnGradients:
    """Run the backward pass on the backend chosen (arguments: see kernels/gpu/expert_ffn.py)."""
    if options.backend == "triton":
        return expert_ffn_launch.ffn_backward(
            dout, x_RD, weights, rows, dropout, saved, weight_N=weight_N, dweight=dweight, precision=options.precision
        )
    gradients: FfnGradients = expert_ffn_cpu.ffn_backward(
        dout, x_RD, weights, rows, dropout, saved, weight_N=weight_N, dweight=dweight
    )
    return gradients


@torch.library.custom_op("foreroute::expert_ffn", mutates_args=())
def _expert_ffn(
    x_RD: Tensor,
    weights: list[Tensor],
    rows: list[Tensor],
    token_R: Tensor | None,
    rate: float,
    seed: int,
    first_expert: int,
    save: bool,
    backend: str,
    mode: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y_ND, then Saved."""
    dropout = unpack_dropout(token_R, rate, seed, first_expert)
    y_ND, saved = ffn_forward(
        x_RD, unpack_weights(weights), ExpertRows(*rows), dropout, save, Options(backend, mode, precision)
    )
    return y_ND, *saved


@_expert_ffn.register_fake
def _(x_RD: Tensor, weights: list[Tensor], rows: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    *_, save, backend, mode, _ = rest
    y_ND = x_RD.new_empty(rows[0].shape[0], x_RD.shape[1])
    return y_ND, *fake_saved(x_RD, weights, rows, save, backend, mode)


def fake_saved(x_RD: Tensor, weights: list[Tensor], rows: list[Tensor], save: bool, backend: str, mode: str) -> Saved:
    """Shapes of what ffn_forward saves."""
    num_rows, width_F = rows[0].shape[0], weights[0].shape[1]
    gated = len(weights) == 5
    if backend == "cpu":
        gate = (num_rows if gated else 0, width_F)
        kept = (num_rows, x_RD.shape[1]) if mode == "fast" and save else (0,)
        return Saved(x_RD.new_empty(num_rows, width_F), x_RD.new_empty(gate), x_RD.new_empty(kept))
    pre = (num_rows, width_F) if save or not gated else (0,)
    gate_shape = (num_rows, width_F) if save and gated else (0,)
    return Saved(x_RD.new_empty(pre), x_RD.new_empty(gate_shape), x_RD.new_empty(0))


@torch.library.custom_op("foreroute::expert_ffn_backward", mutates_args=())
def _expert_ffn_backward(
    dy_ND: Tensor,
    x_RD: Tensor,
    weights: list[Tensor],
    rows: list[Tensor],
    saved: list[Tensor],
    token_R: Tensor | None,
    rate: float,
    seed: int,
    first_expert: int,
    backend: str,
    mode: str,
    precision: str,
) -> list[Tensor]:
    """dx_RD, then the gradients of the weights."""
    grads = ffn_backward(
        dy_ND,
        x_RD,
        unpack_weights(weights),
        ExpertRows(*rows),
        unpack_dropout(token_R, rate, seed, first_expert),
        Saved(*saved),
        weight_N=None,
        dweight=False,
        options=Options(backend, mode, precision),
    )
    return [grads.x_RD, *pack_weights(grads.weights)]


@_expert_ffn_backward.register_fake
def _(dy_ND: Tensor, x_RD: Tensor, weights: list[Tensor], *rest: Any) -> list[Tensor]:
    return [torch.empty_like(x_RD), *(torch.empty_like(w) for w in weights)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_RD, weights, rows, token_R, *rest = inputs
    rate, seed, first_expert, _save, *ctx.options = rest
    ctx.dropout = rate, seed, first_expert
    ctx.num_weights = len(weights)
    ctx.save_for_backward(x_RD, *weights, *rows, *output[1:], token_R)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy_ND: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dy_ND is None:
        return None, [None] * ctx.num_weights, [None] * 4, *(None,) * 8
    x_RD, *tensors, token_R = ctx.saved_tensors
    weights, rows, saved = split(tensors, ctx.num_weights)
    dx_RD, *dweights = _expert_ffn_backward(
        dy_ND.contiguous(), x_RD, weights, rows, saved, token_R, *ctx.dropout, *ctx.options
    )
    return dx_RD, dweights, [None] * 4, *(None,) * 8


def split(tensors: list[Tensor], num_weights: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Take apart what a forward pass kept: weights, four index tensors, Saved."""
    return tensors[:num_weights], tensors[num_weights:-3], tensors[-3:]


_expert_ffn.register_autograd(_backward, setup_context=_setup_context)
