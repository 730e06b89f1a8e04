"""expert_ffn: the feed-forward of every expert over its expert rows, in one operation.

    y[n] = dropout(act(x[source[n]] @ w1[e].T + b1[e])) @ w2[e] + b2[e],   e the expert of expert row n
    act = relu, silu, gelu or gelu_tanh (kernels/activations.py); with w3 (the gate) act(.) * (x[source[n]] @ w3[e].T)

Token rows are read through an index, and an expert may have any number of expert rows: nothing is permuted, padded or
dropped. Backends: kernels/cpu/expert_ffn.py, kernels/gpu/expert_ffn.py (Triton), and the plain loops below. A weighted
sum usually follows; kernels.moe_ffn computes both, and its backward pass does not need y.

Letters: R token rows, N expert rows, L experts here, D width, F expert hidden width.
"""

import torch
from torch import Tensor

from foreroute.kernels.activations import ACTIVATIONS
from foreroute.kernels.dropout import Dropout, keep_mask, row_hash, unit_hash
from foreroute.kernels.expert_index import ExpertRows
from foreroute.kernels.operands import (
    ExpertWeights,
    check_dropout,
    check_rows,
    check_weights,
    resolve_activation,
    resolve_options,
    wants_grad,
)
from foreroute.kernels.ops.ffn_operator import FfnCall, ffn


def expert_ffn(
    x_RD: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    *,
    activation: str | None = None,
    dropout: Dropout | None = None,
    backend: str | None = None,
    mode: str = "lean",
    precision: str = "ieee",
    debug: bool = False,
) -> Tensor:
    """Apply each expert to its expert rows.

    Args:
        x_RD: token rows, contiguous; fp32, bf16 or fp16 (on the CPU also fp64). On "triton" the tensor must start at
            an address that is a multiple of 16.
        weights: stacked expert parameters, dtype of x; with w3 the experts have a gate.
        rows: the token row of each expert row (kernels/expert_index.py). Outputs of padding, and gradients of its
            mixing weights, are undefined.
        activation: "relu", "silu", "gelu" (erf) or "gelu_tanh" (tanh approximation); by default "silu" with a gate
            (SwiGLU), else "relu".
        dropout: Dropout(rate, seed, token_R) on the hidden units, a function of seed, token, expert and unit alone.
        backend: "cpu", "triton" or "reference" (plain loops in fp64); by default "triton" on a GPU and "cpu" elsewhere.
        mode: tensors saved for backward. "lean": x and N * F numbers: the pre-activation, for "relu" without a gate the
            hidden units; with a gate also its input, N * F more. "fast", on the CPU only: also the gathered token
            rows, N * D numbers.
        precision: of fp32 matrix products on "triton": "ieee", or "tf32" (tensor cores, 10 bits of mantissa).
        debug: check every index on the host. Otherwise PyTorch may or may not detect an index that is out of range.

    Returns:
        y_ND, dtype of x: the output of expert row n, without its mixing weight.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and the allowed values.

    Example: two experts of one hidden unit. Token row 1 uses both, token row 0 uses expert 0:

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

    GELU with a gate (GEGLU): the pre-activations are 13, 17 and 19, where gelu(z) = z; the gates are x @ [1, 0]:

        >>> w3 = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
        >>> expert_ffn(x, ExpertWeights(w1, b1, w2, b2, w3), rows, activation="gelu").tolist()
        [[13.0, 0.5], [51.0, 0.5], [0.0, 114.5]]
    """
    options = resolve_options(x_RD, backend, mode, precision)
    check_rows(rows, x_RD, debug=debug)
    check_weights(x_RD, weights, rows, options.backend)
    check_dropout(dropout, x_RD)
    activation = resolve_activation(activation, weights)
    if options.backend == "reference":
        return expert_ffn_reference(x_RD, weights, rows, activation, dropout)
    call = FfnCall(wants_grad(x_RD, *weights), False, False, activation, *options)
    y_ND, _ = ffn(x_RD, None, weights, rows, dropout, call)
    return y_ND


def expert_ffn_reference(
    x_RD: Tensor, weights: ExpertWeights, rows: ExpertRows, activation: str, dropout: Dropout | None = None
) -> Tensor:
    """Compute expert_ffn one expert row at a time in fp64, differentiated by autograd: the reference for tests."""
    x = x_RD.double()
    w1, b1, w2, b2 = (tensor.double() for tensor in weights[:4])
    w3 = None if weights.w3_LFD is None else weights.w3_LFD.double()
    out = []
    for e, r in zip(rows.expert_N().tolist(), rows.source_N.tolist(), strict=False):  # without padding
        hidden = ACTIVATIONS[activation].formula(w1[e] @ x[r] + b1[e])
        if w3 is not None:
            hidden = hidden * (w3[e] @ x[r])
        if dropout is not None:
            row = row_hash(dropout, dropout.token_R[r : r + 1], e)
            unit_F = unit_hash(hidden.numel(), x.device)
            hidden = hidden * keep_mask(row, unit_F, dropout.threshold)[0] * dropout.scale
        out.append(hidden @ w2[e] + b2[e])
    padding = [x.new_zeros(x.shape[1])] * (rows.num_rows - len(out))
    return torch.stack(out + padding).to(x_RD.dtype) if out or padding else x_RD[:0]
