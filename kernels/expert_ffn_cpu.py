"""Backend "cpu" of the expert feed-forward: one product an expert, on PyTorch's matrix library.

Rows are gathered for all experts at once; then each expert runs alone, so that its hidden units stay in the cache
between two products. Hidden units are activated in place and kept so: for ReLU they also say which units were active
and which were dropped. Mode "fast" keeps the gathered input rows for backward, "lean" gathers them again.

Letters: R input rows, N expert rows, n rows of one expert, D width, F expert hidden width.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.combine_cpu import combine_forward, take_rows
from kernels.dropout import Dropout, keep_mask, row_hash, unit_hash
from kernels.operands import ExpertWeights, FfnGradients, Saved
from kernels.rows import ExpertRows


@torch.autocast("cpu", enabled=False)
def ffn_forward(
    x_RD: Tensor, weights: ExpertWeights, rows: ExpertRows, dropout: Dropout | None, *, save: bool, mode: str
) -> tuple[Tensor, Saved]:  # fmt: skip
    """Give the unweighted output y_ND of every expert row, and what backward needs."""
    width_F = weights.w1_LFD.shape[1]
    gated = weights.w3_LFD is not None
    masks = Masks(dropout, width_F, x_RD.device)
    x_ND = x_RD.index_select(0, rows.source_N)
    y_ND = torch.empty_like(x_ND)
    hidden_NF = x_RD.new_empty(rows.num_rows, width_F)
    gate_NF = x_RD.new_empty(rows.num_rows if gated else 0, width_F)
    for expert, span in spans(rows):
        x_nD, hidden_nF, gate_nF = x_ND[span], hidden_NF[span], None
        torch.addmm(weights.b1_LF[expert], x_nD, weights.w1_LFD[expert].T, out=hidden_nF)
        if weights.w3_LFD is None:
            hidden_nF.relu_()
        else:
            gate_nF = torch.mm(x_nD, weights.w3_LFD[expert].T, out=gate_NF[span])
        keep_nF = masks.keep(expert, rows.source_N[span])
        a_nF = hidden_units(hidden_nF, gate_nF, keep_nF)
        if gate_nF is None and keep_nF is not None:
            a_nF.mul_(keep_nF)  # ReLU's are saved as they leave here
        second = weights.b2_LD[expert], a_nF, weights.w2_LFD[expert]
        torch.addmm(*second, alpha=masks.scale, out=y_ND[span])
    kept = x_ND if mode == "fast" and save else x_RD.new_empty(0)
    return y_ND, Saved(hidden_NF, gate_NF, kept)


@torch.autocast("cpu", enabled=False)
def ffn_backward(
    dout: Tensor, x_RD: Tensor, weights: ExpertWeights, rows: ExpertRows, dropout: Dropout | None, saved: Saved, *,
    weight_N: Tensor | None, dweight: bool,
) -> FfnGradients:  # fmt: skip
    """Give every gradient of the feed-forward (arguments: see kernels/expert_ffn_launch.py)."""
    masks = Masks(dropout, weights.w1_LFD.shape[1], x_RD.device)
    lean = saved.x_ND.dim() == 1
    x_ND = x_RD.index_select(0, rows.source_N) if lean else saved.x_ND
    dy_ND = dout if weight_N is None else take_rows(dout, rows.source_N, weight_N)
    plain_ND = dout.index_select(0, rows.source_N) if dweight else None
    grads = ExpertWeights(*(None if w is None else torch.empty_like(w) for w in weights))  # type: ignore[arg-type]
    dweight_N = torch.empty_like(weight_N) if dweight and weight_N is not None else None
    dx_ND = torch.empty_like(x_ND)
    for expert, span in spans(rows):
        hidden_nF = saved.hidden_NF[span]
        gate_nF = None if weights.w3_LFD is None else saved.gate_NF[span]
        keep_nF = None if gate_nF is None else masks.keep(expert, rows.source_N[span])
        a_nF = hidden_units(hidden_nF, gate_nF, keep_nF)
        if dweight_N is not None and plain_ND is not None:
            weight_gradient(weights, expert, plain_ND[span], a_nF, masks.scale, out=dweight_N[span])
        dy_nD = dy_ND[span]
        dw2_FD = grads.w2_LFD[expert]
        torch.addmm(dw2_FD, a_nF.T, dy_nD, beta=0, alpha=masks.scale, out=dw2_FD)
        torch.sum(dy_nD, 0, out=grads.b2_LD[expert])
        da_nF = dy_nD @ weights.w2_LFD[expert].T
        if masks.scale != 1.0:
            da_nF.mul_(masks.scale)
        dz_nF, du_nF = activate_backward(da_nF, hidden_nF, gate_nF, keep_nF)
        input_gradients(weights, grads, expert, x_ND[span], dz_nF, du_nF, out=dx_ND[span])
    return FfnGradients(combine_forward(dx_ND, None, rows), grads, dweight_N)


def hidden_units(hidden_nF: Tensor, gate_nF: Tensor | None, keep_nF: Tensor | None) -> Tensor:
    """Hidden units after activation and dropout from what is saved: for ReLU that is they."""
    if gate_nF is None:
        return hidden_nF
    a_nF = F.silu(hidden_nF).mul_(gate_nF)
    return a_nF if keep_nF is None else a_nF.mul_(keep_nF)


def activate_backward(
    da_nF: Tensor, hidden_nF: Tensor, gate_nF: Tensor | None, keep_nF: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradient at the pre-activation (in place of da_nF for ReLU) and at the gate's input."""
    if gate_nF is None:
        if da_nF.numel():  # PyTorch's out variant refuses empty tensors
            threshold = torch.ops.aten.threshold_backward.grad_input
            threshold(da_nF, hidden_nF, 0, grad_input=da_nF)
        return da_nF, None
    if keep_nF is not None:
        da_nF.mul_(keep_nF)
    dz_nF = torch.ops.aten.silu_backward(da_nF * gate_nF, hidden_nF)
    return dz_nF, F.silu(hidden_nF).mul_(da_nF)


def input_gradients(
    weights: ExpertWeights, grads: ExpertWeights, expert: int, x_nD: Tensor, dz_nF: Tensor, du_nF: Tensor | None, *,
    out: Tensor,
) -> None:  # fmt: skip
    """Gradients of one expert's first matrices, and of its input rows into `out`."""
    torch.mm(dz_nF.T, x_nD, out=grads.w1_LFD[expert])
    torch.sum(dz_nF, 0, out=grads.b1_LF[expert])
    torch.mm(dz_nF, weights.w1_LFD[expert], out=out)
    if du_nF is not None and weights.w3_LFD is not None and grads.w3_LFD is not None:
        torch.mm(du_nF.T, x_nD, out=grads.w3_LFD[expert])
        out.addmm_(du_nF, weights.w3_LFD[expert])


def weight_gradient(
    weights: ExpertWeights, expert: int, dout_nD: Tensor, a_nF: Tensor, scale: float, *, out: Tensor
) -> None:
    """Gradient of the mixing weights, <dout, y> = <dout w2^T, a> scale + <dout, b2>: needs no saved y."""
    hidden_n = ((dout_nD @ weights.w2_LFD[expert].T) * a_nF).sum(1, dtype=out.dtype)
    torch.add(dout_nD @ weights.b2_LD[expert], hidden_n, alpha=scale, out=out)


def spans(rows: ExpertRows) -> Iterator[tuple[int, slice]]:
    """Give each local expert and its range of expert rows."""
    counts = rows.counts()
    if min(counts, default=0) < 0 or sum(counts) != rows.num_rows:
        raise ValueError(f"rows.offset_L counts {counts}: must add up to {rows.num_rows} rows")
    start = 0
    for expert, count in enumerate(counts):
        yield expert, slice(start, start + count)
        start += count


class Masks:
    """Dropout masks of one operation, made one expert at a time."""

    def __init__(self, dropout: Dropout | None, width: int, device: torch.device) -> None:
        self.dropout = dropout
        self.scale = 1.0 if dropout is None else dropout.scale
        self.unit_F = None if dropout is None else unit_hash(width, device)

    def keep(self, expert: int, source_n: Tensor | None) -> Tensor | None:
        """Mask [n, F] of an expert for the given input rows (None: all of them)."""
        if self.dropout is None or self.unit_F is None:
            return None
        token_R = self.dropout.token_R
        token_n = token_R if source_n is None else token_R.index_select(0, source_n)
        row_n = row_hash(self.dropout, token_n, expert)
        return keep_mask(row_n, self.unit_F, self.dropout.threshold)
