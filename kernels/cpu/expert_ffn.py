"""Backend "cpu" of the expert feed-forward: one product an expert, on PyTorch's matrix library.

Rows are gathered for all experts at once; then each expert runs alone, so that its hidden units stay in the cache
between two products. Hidden units are activated in place and kept so: for ReLU they also say which units were active
and which were dropped. Mode "fast" keeps the gathered input rows for backward, "lean" gathers them again.

The library compiles a bf16 product for each new number of rows, which takes as long as the product, and experts have
new numbers in every batch. So in half precision products take a few rows more, up to a multiple: those of the experts
that follow, whose results are written after, with gradients of 0. Nothing is stored for them; where they are infinite,
the gradients of the expert before become NaN as theirs do.

Letters: R input rows, N expert rows, n rows of one expert, m the same rounded up, D width, F expert hidden width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foreroute.kernels.cpu.combine_permute import combine_cpu, take_rows
from foreroute.kernels.dropout import Dropout, keep_mask, row_hash, unit_hash
from foreroute.kernels.expert_index import ExpertRows
from foreroute.kernels.operands import ExpertWeights, FfnGradients, Saved

_MULTIPLE = 8  # rows; of 1 to 64 the fastest when every batch is routed anew


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def ffn_forward_cpu(
    x_RD: Tensor, weights: ExpertWeights, rows: ExpertRows, dropout: Dropout | None, *, save: bool, mode: str
) -> tuple[Tensor, Saved]:
    """Give the unweighted output y_ND of every expert row, and what backward needs."""
    num_rows, width_F = rows.num_rows, weights.w1_LFD.shape[1]
    masks = Masks(dropout, width_F, x_RD.device)
    parts = _parts(rows, x_RD.dtype)
    x_MD = _gathered(x_RD, rows, parts)
    y_MD = torch.empty_like(x_MD)
    hidden_NF = x_RD.new_empty(num_rows, width_F)
    gate_NF = x_RD.new_empty(0 if weights.w3_LFD is None else num_rows, width_F)
    for part in parts:
        expert, x_mD = part.expert, x_MD[part.wide]
        hidden_mF, gate_mF = part.room(hidden_NF), None
        torch.addmm(weights.b1_LF[expert], x_mD, weights.w1_LFD[expert].T, out=hidden_mF)
        if weights.w3_LFD is None:
            hidden_mF.relu_()
        else:
            gate_mF = torch.mm(x_mD, weights.w3_LFD[expert].T, out=part.room(gate_NF))
        keep_nF = masks.keep(expert, rows.source_N[part.own])
        a_mF = hidden_units(hidden_mF, gate_mF, None)
        if keep_nF is not None:  # ReLU's units are saved as they leave here
            a_mF[: part.count].mul_(keep_nF)
        second = weights.b2_LD[expert], a_mF, weights.w2_LFD[expert]
        torch.addmm(*second, alpha=masks.scale, out=y_MD[part.wide])
        part.keep(hidden_NF, hidden_mF)
        if gate_mF is not None:
            part.keep(gate_NF, gate_mF)
    kept = x_MD[:num_rows] if mode == "fast" and save else x_RD.new_empty(0)
    return y_MD[:num_rows], Saved(hidden_NF, gate_NF, kept, rows.offset_L.new_empty(0, 2))


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def ffn_backward_cpu(
    dout: Tensor,
    x_RD: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    dropout: Dropout | None,
    saved: Saved,
    *,
    weight_N: Tensor | None,
    dweight: bool,
) -> FfnGradients:
    """Give every gradient of the feed-forward (arguments: see kernels/gpu/expert_ffn.py)."""
    masks = Masks(dropout, weights.w1_LFD.shape[1], x_RD.device)
    parts = _parts(rows, x_RD.dtype)
    x_MD = _gathered(x_RD, rows, parts, saved.x_ND)
    dy_ND = dout if weight_N is None else take_rows(dout, rows.source_N, weight_N)
    plain_ND = dout.index_select(0, rows.source_N) if dweight else None
    grads = ExpertWeights(*(None if w is None else torch.empty_like(w) for w in weights))  # type: ignore[arg-type]
    dweight_N = torch.empty_like(weight_N) if dweight and weight_N is not None else None
    dx_MD = torch.empty_like(x_MD)
    for part in parts:
        expert, own, scale = part.expert, part.own, masks.scale
        hidden_mF = part.followed(saved.hidden_NF)
        gate_mF = None if weights.w3_LFD is None else part.followed(saved.gate_NF)
        keep_nF = None if gate_mF is None else masks.keep(expert, rows.source_N[own])
        a_mF = hidden_units(hidden_mF, gate_mF, keep_nF)
        if dweight_N is not None and plain_ND is not None:
            weight_gradient(weights, expert, plain_ND[own], a_mF[: part.count], scale, out=dweight_N[own])
        dy_mD, dw2_FD = part.alone(dy_ND), grads.w2_LFD[expert]
        torch.addmm(dw2_FD, a_mF.T, dy_mD, beta=0, alpha=scale, out=dw2_FD)
        torch.sum(dy_ND[own], 0, out=grads.b2_LD[expert])
        da_mF = dy_mD @ weights.w2_LFD[expert].T
        if scale != 1.0:
            da_mF.mul_(scale)
        dz_mF, du_mF = activate_backward(da_mF, hidden_mF, gate_mF, keep_nF)
        input_gradients(weights, grads, expert, x_MD[part.wide], dz_mF, du_mF, out=dx_MD[part.wide])
    return FfnGradients(combine_cpu(dx_MD[: rows.num_rows], None, rows), grads, dweight_N)


def hidden_units(hidden_mF: Tensor, gate_mF: Tensor | None, keep_nF: Tensor | None) -> Tensor:
    """Hidden units after activation and dropout from what is saved: for ReLU that is they."""
    if gate_mF is None:
        return hidden_mF
    a_mF = F.silu(hidden_mF).mul_(gate_mF)
    if keep_nF is not None:
        a_mF[: keep_nF.shape[0]].mul_(keep_nF)
    return a_mF


def activate_backward(
    da_mF: Tensor, hidden_mF: Tensor, gate_mF: Tensor | None, keep_nF: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradient at the pre-activation (in place of da_mF for ReLU) and at the gate's input."""
    if gate_mF is None:
        if da_mF.numel():  # PyTorch's out variant refuses empty tensors
            threshold = torch.ops.aten.threshold_backward.grad_input
            threshold(da_mF, hidden_mF, 0, grad_input=da_mF)
        return da_mF, None
    if keep_nF is not None:
        da_mF[: keep_nF.shape[0]].mul_(keep_nF)
    dz_mF = torch.ops.aten.silu_backward(da_mF * gate_mF, hidden_mF)
    return dz_mF, F.silu(hidden_mF).mul_(da_mF)


def input_gradients(
    weights: ExpertWeights,
    grads: ExpertWeights,
    expert: int,
    x_nD: Tensor,
    dz_nF: Tensor,
    du_nF: Tensor | None,
    *,
    out: Tensor,
) -> None:
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


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one expert, and the same rounded up into those that follow."""

    expert: int
    own: slice
    wide: slice

    @property
    def count(self) -> int:
        """Rows of the expert."""
        return int(self.own.stop - self.own.start)

    def room(self, buffer_NF: Tensor) -> Tensor:
        """Place for a result: in the buffer, whose next rows are written after this, or beside it at the end."""
        if self.wide.stop <= buffer_NF.shape[0]:
            return buffer_NF[self.wide]
        return buffer_NF.new_empty(self.wide.stop - self.wide.start, buffer_NF.shape[1])

    def keep(self, buffer_NF: Tensor, result_mF: Tensor) -> None:
        """Bring a result that lies beside the buffer into it."""
        if self.wide.stop > buffer_NF.shape[0]:
            buffer_NF[self.own] = result_mF[: self.count]

    def followed(self, rows_ND: Tensor) -> Tensor:
        """The expert's rows, followed by whatever comes next, or by zeros at the end."""
        return rows_ND[self.wide] if self.wide.stop <= rows_ND.shape[0] else self.alone(rows_ND)

    def alone(self, rows_ND: Tensor) -> Tensor:
        """The expert's rows, followed by zeros."""
        if self.wide == self.own:
            return rows_ND[self.own]
        return F.pad(rows_ND[self.own], (0, 0, 0, self.wide.stop - self.own.stop))


def _parts(rows: ExpertRows, dtype: torch.dtype) -> list[_Part]:
    """Give each local expert's rows.

    Raises:
        ValueError: offset_L contradicts the number of rows.
    """
    counts = rows.counts()
    padding = int(rows.slot_offset_R[0]) if rows.num_inputs else 0
    if min(counts, default=0) < 0 or sum(counts) + padding != rows.num_rows:
        raise ValueError(f"rows.offset_L counts {counts}: must add up to {rows.num_rows - padding} rows")
    multiple = _MULTIPLE if dtype in (torch.bfloat16, torch.float16) else 1
    parts, start = [], 0
    for expert, count in enumerate(counts):
        wide = -(-count // multiple) * multiple
        parts.append(_Part(expert, slice(start, start + count), slice(start, start + wide)))
        start += count
    return parts


def _gathered(x_RD: Tensor, rows: ExpertRows, parts: list[_Part], known_ND: Tensor | None = None) -> Tensor:
    """Input rows of all experts, and zeros up to where the last products reach."""
    num_rows = rows.num_rows
    end = max((part.wide.stop for part in parts), default=num_rows)
    end = max(end, num_rows)  # padding lies behind
    if known_ND is not None and known_ND.dim() == 2 and end == num_rows:
        return known_ND
    x_MD = x_RD.new_empty(end, x_RD.shape[1])
    if known_ND is not None and known_ND.dim() == 2:
        x_MD[:num_rows] = known_ND
    else:
        torch.index_select(x_RD, 0, rows.source_N, out=x_MD[:num_rows])
    x_MD[num_rows:] = 0
    return x_MD


class Masks:
    """Dropout masks of one operation, made one expert at a time."""

    def __init__(self, dropout: Dropout | None, width: int, device: torch.device) -> None:
        self.dropout = dropout
        self.scale = 1.0 if dropout is None else dropout.scale
        self.unit_F = None if dropout is None else unit_hash(width, device)

    def keep(self, expert: int, source_n: Tensor) -> Tensor | None:
        """Mask [n, F] of an expert for the given input rows; None without dropout."""
        if self.dropout is None or self.unit_F is None:
            return None
        token_n = self.dropout.token_R.index_select(0, source_n)
        row_n = row_hash(self.dropout, token_n, expert)
        return keep_mask(row_n, self.unit_F, self.dropout.threshold)
