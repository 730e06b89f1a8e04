"""moe_ffn on the CPU when k is near E: all token rows through all experts as one feed-forward of width L * F.

Hidden units are multiplied by the mixing weight of their token row and expert, 0 where the expert was not chosen.
Nothing is gathered or scattered, and all products are large; work of experts that were not chosen is wasted. Token
rows are processed in blocks, which bounds the memory besides the hidden units. An expert that overflows affects all
token rows: 0 times infinity is not 0.

Letters: R token rows, N expert rows, L experts here, D width, F expert hidden width, H = L * F, r token rows of a
block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from foreroute.kernels.activations import saves_pre
from foreroute.kernels.cpu.expert_ffn import activate_backward, hidden_units
from foreroute.kernels.dropout import Dropout, keep_mask, row_hash, unit_hash
from foreroute.kernels.expert_index import ExpertRows
from foreroute.kernels.operands import ExpertWeights, FfnGradients, Saved

# Less than 1,024 was slower, more made no difference (H = 8,192, 2 cores).
BLOCK_ROWS = 2048


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def masked_forward(
    x_RD: Tensor,
    weight_N: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    dropout: Dropout | None,
    *,
    activation: str,
    dweight: bool,
) -> tuple[Tensor, Saved]:
    """Compute the weighted sum out_RD, and the tensors saved for backward.

    Args:
        dweight: whether backward computes the gradient of weight_N.
    """
    w1_HD, w2_HD = weights.w1_LFD.flatten(0, 1), weights.w2_LFD.flatten(0, 1)
    weight_RL = _spread(weight_N, rows, x_RD.dtype)
    num_inputs, width_H = x_RD.shape[0], w1_HD.shape[0]
    hidden_RH = x_RD.new_empty(num_inputs, width_H)
    gate_RH = x_RD.new_empty(0 if weights.w3_LFD is None else num_inputs, width_H)
    out_RD = torch.empty_like(x_RD)
    pre = saves_pre(activation, gated=weights.w3_LFD is not None)
    kept = not pre and _keeps_weighted(weight_N, x_RD.dtype, dweight)
    for block in _blocks(num_inputs):
        x_rD, weight_rL = x_RD[block], weight_RL[block]
        torch.addmm(weights.b1_LF.flatten(), x_rD, w1_HD.T, out=hidden_RH[block])
        gate_rH = None
        if weights.w3_LFD is not None:
            gate_rH = torch.mm(x_rD, weights.w3_LFD.flatten(0, 1).T, out=gate_RH[block])
        if not pre:
            hidden_RH[block].relu_()
        a_rH = hidden_units(activation, hidden_RH[block], gate_rH, None)
        _drop(a_rH, dropout, block, weights)
        if kept:
            a_rH.unflatten(1, weights.b1_LF.shape).mul_(weight_rL[..., None])
        else:
            a_rH = _weighted(a_rH, weight_rL)
        alpha = 1.0 if dropout is None else dropout.scale
        torch.addmm(weight_rL @ weights.b2_LD, a_rH, w2_HD, alpha=alpha, out=out_RD[block])
    return out_RD, Saved(hidden_RH, gate_RH, x_RD.new_empty(0), rows.offset_L.new_empty(0, 2))


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def masked_backward(
    dout_RD: Tensor,
    x_RD: Tensor,
    weight_N: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    dropout: Dropout | None,
    saved: Saved,
    *,
    activation: str,
    dweight: bool,
) -> FfnGradients:
    """Compute every gradient; an expert that was not chosen has weight 0 and so a gradient of 0."""
    w1_HD, w2_HD = weights.w1_LFD.flatten(0, 1), weights.w2_LFD.flatten(0, 1)
    weight_RL = _spread(weight_N, rows, x_RD.dtype)
    scale = 1.0 if dropout is None else dropout.scale
    pre = saves_pre(activation, gated=weights.w3_LFD is not None)
    kept = not pre and _keeps_weighted(weight_N, x_RD.dtype, dweight)
    weighted_RH = saved.hidden_NF if kept else torch.empty_like(saved.hidden_NF)
    dz_RH, du_RH = torch.empty_like(saved.hidden_NF), torch.empty_like(saved.gate_NF)
    dweight_RL = torch.empty_like(weight_RL, dtype=weight_N.dtype) if dweight else None
    for block in _blocks(x_RD.shape[0]):
        dout_rD, weight_rL = dout_RD[block], weight_RL[block]
        hidden_rH, da_rH = saved.hidden_NF[block], dz_RH[block]
        gate_rH = None if weights.w3_LFD is None else saved.gate_NF[block]
        torch.mm(dout_rD, w2_HD.T, out=da_rH)
        if not kept:
            a_rH = hidden_units(activation, hidden_rH, gate_rH, None)
            if pre:
                _drop(a_rH, dropout, block, weights)
            weighted_RH[block] = _weighted(a_rH, weight_rL)
            if dweight_RL is not None:
                product_rLF = (da_rH * a_rH).unflatten(1, weights.b1_LF.shape)
                hidden_rL = product_rLF.sum(-1, dtype=weight_N.dtype)
                torch.add(dout_rD @ weights.b2_LD.T, hidden_rL, alpha=scale, out=dweight_RL[block])
        da_rH.unflatten(1, weights.b1_LF.shape).mul_(weight_rL[..., None] * scale)
        if pre:
            _drop(da_rH, dropout, block, weights)
        dz_rH, du_rH = activate_backward(activation, da_rH, hidden_rH, gate_rH, None)
        if du_rH is not None:
            dz_RH[block], du_RH[block] = dz_rH, du_rH
    dx_RD = dz_RH @ w1_HD
    dw3_LFD = None
    if weights.w3_LFD is not None:
        dx_RD.addmm_(du_RH, weights.w3_LFD.flatten(0, 1))
        dw3_LFD = (du_RH.T @ x_RD).view_as(weights.w3_LFD)
    grads = ExpertWeights(
        (dz_RH.T @ x_RD).view_as(weights.w1_LFD),
        dz_RH.sum(0).view_as(weights.b1_LF),
        torch.addmm(w2_HD, weighted_RH.T, dout_RD, beta=0, alpha=scale).view_as(weights.w2_LFD),
        weight_RL.T @ dout_RD,
        dw3_LFD,
    )
    dweight_N = None
    if dweight_RL is not None:
        expert_N = rows.expert_N()
        dweight_N = weight_N.new_zeros(rows.num_rows)
        dweight_N[: expert_N.numel()] = dweight_RL[rows.source_N[: expert_N.numel()], expert_N]
    return FfnGradients(dx_RD, grads, dweight_N)


def _keeps_weighted(weight_N: Tensor, dtype: torch.dtype, dweight: bool) -> bool:
    """Return whether ReLU's hidden units are saved multiplied by their mixing weight.

    The products still show the active units if no weight is negative and no product underflows, which excludes fp16.
    """
    if dweight or dtype == torch.float16:
        return False
    return bool((weight_N >= 0).all())


def _blocks(num_inputs: int) -> Iterator[slice]:
    for start in range(0, num_inputs, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, num_inputs))


def _spread(weight_N: Tensor, rows: ExpertRows, dtype: torch.dtype) -> Tensor:
    """Return the mixing weight of each token row and expert [R, L], 0 where not chosen."""
    weight_RL = weight_N.new_zeros(rows.num_inputs, rows.num_experts, dtype=dtype)
    expert_N = rows.expert_N()
    weight_RL[rows.source_N[: expert_N.numel()], expert_N] = weight_N[: expert_N.numel()].to(dtype)
    return weight_RL


def _weighted(a_rH: Tensor, weight_rL: Tensor) -> Tensor:
    a_rLF: Tensor = a_rH.unflatten(1, (weight_rL.shape[1], -1))
    return (a_rLF * weight_rL[..., None]).flatten(1)


def _drop(a_rH: Tensor, dropout: Dropout | None, block: slice, weights: ExpertWeights) -> None:
    """Set dropped units of all experts to 0, in place."""
    if dropout is None:
        return
    num_experts, width_F = weights.b1_LF.shape
    expert_L = torch.arange(num_experts, device=a_rH.device)
    row_rL = row_hash(dropout, dropout.token_R[block, None], expert_L)
    keep_NF = keep_mask(row_rL.flatten(), unit_hash(width_F, a_rH.device), dropout.threshold)
    a_rH.mul_(keep_NF.view(a_rH.shape))
