"""moe_ffn: the expert layer as one operation: expert_ffn, then combine.

    out[r] = sum over the expert rows n of r:  weight[n] * FFN_e(n)(x[r])

Fusing the two saves memory in backward. The output's gradient is read through the index, without a copy for each expert
row. The gradient of the mixing weights is computed by a formula that needs no saved expert outputs; weights of planned
routers are constants, and their gradient is not computed. On the CPU, `masked` sends all token rows through all
experts, which is faster when k is near E (kernels/cpu/masked_ffn.py).

Letters: R token rows, D width, L experts here, F expert hidden width, N expert rows.
"""

import torch
from torch import Tensor

from foreroute.kernels.dropout import Dropout
from foreroute.kernels.expert_index import ExpertRows
from foreroute.kernels.operands import (
    ExpertWeights,
    FfnGradients,
    Options,
    Saved,
    check_dropout,
    check_rows,
    check_tensor,
    check_weights,
    resolve_activation,
    resolve_options,
    wants_grad,
)
from foreroute.kernels.ops.combine import check_weight, combine_reference
from foreroute.kernels.ops.expert_ffn import expert_ffn_reference
from foreroute.kernels.ops.ffn_operator import FfnCall, ffn, ffn_backward


def moe_ffn(
    x_RD: Tensor,
    weight_N: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    *,
    activation: str | None = None,
    dropout: Dropout | None = None,
    masked: bool = False,
    backend: str | None = None,
    mode: str = "lean",
    precision: str = "ieee",
    debug: bool = False,
) -> Tensor:
    """Apply the experts of each token row and sum their weighted outputs.

    Args:
        x_RD: token rows, contiguous; fp32, bf16 or fp16 (on the CPU also fp64).
        weight_N: fp32 mixing weight of each expert row: `weight_RK.flatten()[choice_N]`, where choice_N is the second
            result of expert_rows. The CPU rounds it to the dtype of x. Its gradient is computed only if it is required.
        masked: on the CPU, multiply all token rows by all experts instead of only the chosen ones. Saves R * L * F
            numbers in either mode. An expert that overflows also affects token rows that did not choose it. A token row
            must not choose an expert twice (debug checks this).
        weights, rows, activation, dropout, backend, mode, precision, debug: see kernels.expert_ffn.

    Returns:
        out_RD, dtype of x. A token row without expert rows is zero.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and the allowed values.

    Example: the expert rows and experts of kernels.expert_ffn. Token row 1 mixes [17, 0.5] and [0, 38.5]:

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
    activation = resolve_activation(activation, weights)
    if options.backend == "reference":
        y_ND = expert_ffn_reference(x_RD, weights, rows, activation, dropout)
        return combine_reference(y_ND, weight_N, rows)
    save, dweight = wants_grad(x_RD, weight_N, *weights), wants_grad(weight_N)
    call = FfnCall(save, dweight, masked, activation, *options)
    out_RD, _ = ffn(x_RD, weight_N, weights, rows, dropout, call)
    return out_RD


def moe_ffn_forward(
    x_RD: Tensor,
    weight_N: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    *,
    save: bool,
    dweight: bool,
    activation: str | None = None,
    dropout: Dropout | None = None,
    masked: bool = False,
    backend: str | None = None,
    mode: str = "lean",
    precision: str = "ieee",
    debug: bool = False,
) -> tuple[Tensor, Saved]:
    """Run moe_ffn without autograd, for a caller that writes its own autograd function.

    Args:
        save: whether moe_ffn_backward follows; without it the saved tensors are incomplete.
        dweight: whether moe_ffn_backward will compute the gradient of weight_N.
        others: as for moe_ffn; backend "reference" is refused, as it has no backward pass of its own.

    Returns:
        out_RD, and the tensors that moe_ffn_backward needs besides the arguments.
    """
    options = resolve_options(x_RD, backend, mode, precision)
    _check(x_RD, weight_N, weights, rows, dropout, options, masked=masked, debug=debug)
    if options.backend == "reference":
        raise ValueError("backend='reference': has no backward pass of its own; use moe_ffn")
    call = FfnCall(save, dweight, masked, resolve_activation(activation, weights), *options)
    with torch.no_grad():
        return ffn(x_RD, weight_N, weights, rows, dropout, call)


def moe_ffn_backward(
    dout_RD: Tensor,
    x_RD: Tensor,
    weight_N: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    saved: Saved,
    *,
    dweight: bool,
    activation: str | None = None,
    dropout: Dropout | None = None,
    masked: bool = False,
    backend: str | None = None,
    mode: str = "lean",
    precision: str = "ieee",
    debug: bool = False,
) -> FfnGradients:
    """Compute the gradients of moe_ffn_forward for the same arguments.

    Args:
        dout_RD: gradient of out_RD, contiguous.
        saved: the second result of moe_ffn_forward.
        others: as for moe_ffn_forward.
    """
    options = resolve_options(x_RD, backend, mode, precision)
    check_tensor("dout_RD", dout_RD, tuple(x_RD.shape), x_RD)
    call = FfnCall(True, dweight, masked, resolve_activation(activation, weights), *options)
    with torch.no_grad():
        return ffn_backward(dout_RD, x_RD, weight_N, weights, rows, saved, dropout, call)


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
