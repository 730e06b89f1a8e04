"""Backend "cpu" of the expert feed-forward: one matrix product per expert, by PyTorch's matrix library.

Token rows are gathered for all experts at once. Then each expert runs alone, so that its hidden units stay in the cache
between its two products. ReLU's hidden units are activated in place and saved so: they show which units were active and
which were dropped. Other activations and gates save the pre-activation, and backward activates it again. Mode "fast"
saves the gathered token rows for backward, "lean" gathers them again.

The library compiles a bf16 product for each new number of rows, which takes as long as the product itself, and the
numbers change with every batch. So in half precision each product also takes the next few expert rows, up to a multiple
of 8 (M, m). These belong to the following experts, whose own products overwrite the results later; in backward they
have gradients of 0. Nothing is stored for them. If they are infinite, the gradients of this expert become NaN, as do
those of the experts to which they belong.

Letters: R token rows, N expert rows, n of one expert, M and m the same rounded up, D width, F expert hidden width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foreroute.kernels.activations import ACTIVATIONS, saves_pre
from foreroute.kernels.cpu.combine_permute import combine_cpu, take_rows
from foreroute.kernels.dropout import Dropout, keep_mask, row_hash, unit_hash
from foreroute.kernels.expert_index import ExpertRows
from foreroute.kernels.operands import ExpertWeights, FfnGradients, Saved

_MULTIPLE = 8  # expert rows; the fastest of 1 to 64 when every batch has a new routing


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def ffn_forward_cpu(
    x_RD: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    dropout: Dropout | None,
    *,
    activation: str,
    save: bool,
    mode: str,
) -> tuple[Tensor, Saved]:
    """Compute the unweighted output y_ND of every expert row, and the tensors saved for backward."""
    num_rows, width_F = rows.num_rows, weights.w1_LFD.shape[1]
    masks, pre = Masks(dropout, width_F, x_RD.device), saves_pre(activation, gated=weights.w3_LFD is not None)
    segments = _segments(rows, x_RD.dtype)
    x_MD = _gathered(x_RD, rows, segments)
    y_MD = torch.empty_like(x_MD)
    hidden_NF = x_RD.new_empty(num_rows, width_F)
    gate_NF = x_RD.new_empty(0 if weights.w3_LFD is None else num_rows, width_F)
    for segment in segments:
        expert, x_mD = segment.expert, x_MD[segment.wide]
        hidden_mF, gate_mF = segment.output(hidden_NF), None
        torch.addmm(weights.b1_LF[expert], x_mD, weights.w1_LFD[expert].T, out=hidden_mF)
        if weights.w3_LFD is not None:
            gate_mF = torch.mm(x_mD, weights.w3_LFD[expert].T, out=segment.output(gate_NF))
        if not pre:
            hidden_mF.relu_()
        keep_nF = masks.keep(expert, rows.source_N[segment.own])
        a_mF = hidden_units(activation, hidden_mF, gate_mF, None)
        if keep_nF is not None:  # without pre this is also the saved tensor
            a_mF[: segment.count].mul_(keep_nF)
        second = weights.b2_LD[expert], a_mF, weights.w2_LFD[expert]
        torch.addmm(*second, alpha=masks.scale, out=y_MD[segment.wide])
        segment.copy_back(hidden_NF, hidden_mF)
        if gate_mF is not None:
            segment.copy_back(gate_NF, gate_mF)
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
    activation: str,
    weight_N: Tensor | None,
    dweight: bool,
) -> FfnGradients:
    """Compute every gradient of the feed-forward; arguments as for kernels/gpu/expert_ffn.py."""
    masks = Masks(dropout, weights.w1_LFD.shape[1], x_RD.device)
    pre = saves_pre(activation, gated=weights.w3_LFD is not None)
    segments = _segments(rows, x_RD.dtype)
    x_MD = _gathered(x_RD, rows, segments, saved.x_ND)
    dy_ND = dout if weight_N is None else take_rows(dout, rows.source_N, weight_N)
    plain_ND = dout.index_select(0, rows.source_N) if dweight else None
    grads = ExpertWeights(*(None if w is None else torch.empty_like(w) for w in weights))  # type: ignore[arg-type]
    dweight_N = torch.empty_like(weight_N) if dweight and weight_N is not None else None
    dx_MD = torch.empty_like(x_MD)
    for segment in segments:
        expert, own, scale = segment.expert, segment.own, masks.scale
        hidden_mF = segment.with_next(saved.hidden_NF)
        gate_mF = None if weights.w3_LFD is None else segment.with_next(saved.gate_NF)
        keep_nF = masks.keep(expert, rows.source_N[own]) if pre else None
        a_mF = hidden_units(activation, hidden_mF, gate_mF, keep_nF)
        if dweight_N is not None and plain_ND is not None:
            weight_gradient(weights, expert, plain_ND[own], a_mF[: segment.count], scale, out=dweight_N[own])
        dy_mD, dw2_FD = segment.with_zeros(dy_ND), grads.w2_LFD[expert]
        torch.addmm(dw2_FD, a_mF.T, dy_mD, beta=0, alpha=scale, out=dw2_FD)
        torch.sum(dy_ND[own], 0, out=grads.b2_LD[expert])
        da_mF = dy_mD @ weights.w2_LFD[expert].T
        if scale != 1.0:
            da_mF.mul_(scale)
        dz_mF, du_mF = activate_backward(activation, da_mF, hidden_mF, gate_mF, keep_nF)
        input_gradients(weights, grads, expert, x_MD[segment.wide], dz_mF, du_mF, out=dx_MD[segment.wide])
    return FfnGradients(combine_cpu(dx_MD[: rows.num_rows], None, rows), grads, dweight_N)


def hidden_units(activation: str, hidden_mF: Tensor, gate_mF: Tensor | None, keep_nF: Tensor | None) -> Tensor:
    """Compute the hidden units after activation and dropout from the saved tensors, which may be the hidden units."""
    if not saves_pre(activation, gated=gate_mF is not None):
        return hidden_mF
    a_mF = ACTIVATIONS[activation].apply(hidden_mF)
    if gate_mF is not None:
        a_mF.mul_(gate_mF)
    if keep_nF is not None:
        a_mF[: keep_nF.shape[0]].mul_(keep_nF)
    return a_mF


def activate_backward(
    activation: str, da_mF: Tensor, hidden_mF: Tensor, gate_mF: Tensor | None, keep_nF: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of the pre-activation (without a gate in place of da_mF) and of the gate's input."""
    if keep_nF is not None:
        da_mF[: keep_nF.shape[0]].mul_(keep_nF)
    dz_mF = da_mF if gate_mF is None else da_mF * gate_mF
    if dz_mF.numel():  # PyTorch's out variants refuse empty tensors
        ACTIVATIONS[activation].backward_(dz_mF, hidden_mF)
    return dz_mF, None if gate_mF is None else ACTIVATIONS[activation].apply(hidden_mF).mul_(da_mF)


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
    """Compute the gradients of one expert's first matrices, and of its token rows into `out`."""
    torch.mm(dz_nF.T, x_nD, out=grads.w1_LFD[expert])
    torch.sum(dz_nF, 0, out=grads.b1_LF[expert])
    torch.mm(dz_nF, weights.w1_LFD[expert], out=out)
    if du_nF is not None and weights.w3_LFD is not None and grads.w3_LFD is not None:
        torch.mm(du_nF.T, x_nD, out=grads.w3_LFD[expert])
        out.addmm_(du_nF, weights.w3_LFD[expert])


def weight_gradient(
    weights: ExpertWeights, expert: int, dout_nD: Tensor, a_nF: Tensor, scale: float, *, out: Tensor
) -> None:
    """Compute the gradient of the mixing weights, <dout, y> = <dout w2^T, a> scale + <dout, b2>, without y."""
    hidden_n = ((dout_nD @ weights.w2_LFD[expert].T) * a_nF).sum(1, dtype=out.dtype)
    torch.add(dout_nD @ weights.b2_LD[expert], hidden_n, alpha=scale, out=out)


@dataclass(frozen=True, slots=True)
class _Segment:
    """The range of one expert's rows, and the same range rounded up into the rows that follow."""

    expert: int
    own: slice
    wide: slice

    @property
    def count(self) -> int:
        """The number of the expert's rows."""
        return int(self.own.stop - self.own.start)

    def output(self, buffer_NF: Tensor) -> Tensor:
        """Return memory for a result: the wide range of the buffer, or a new tensor where the buffer is too short."""
        if self.wide.stop <= buffer_NF.shape[0]:
            return buffer_NF[self.wide]
        return buffer_NF.new_empty(self.wide.stop - self.wide.start, buffer_NF.shape[1])

    def copy_back(self, buffer_NF: Tensor, result_mF: Tensor) -> None:
        """Copy a result from a new tensor into the buffer."""
        if self.wide.stop > buffer_NF.shape[0]:
            buffer_NF[self.own] = result_mF[: self.count]

    def with_next(self, rows_ND: Tensor) -> Tensor:
        """Return the expert's rows, then those that follow, or zeros at the end."""
        return rows_ND[self.wide] if self.wide.stop <= rows_ND.shape[0] else self.with_zeros(rows_ND)

    def with_zeros(self, rows_ND: Tensor) -> Tensor:
        """Return the expert's rows, then zeros."""
        if self.wide == self.own:
            return rows_ND[self.own]
        return F.pad(rows_ND[self.own], (0, 0, 0, self.wide.stop - self.own.stop))


def _segments(rows: ExpertRows, dtype: torch.dtype) -> list[_Segment]:
    """Return each local expert's range of expert rows.

    Raises:
        ValueError: offset_L contradicts the number of expert rows.
    """
    counts = rows.counts()
    padding = int(rows.slot_offset_R[0]) if rows.num_inputs else 0
    if min(counts, default=0) < 0 or sum(counts) + padding != rows.num_rows:
        raise ValueError(f"rows.offset_L counts {counts}: must add up to {rows.num_rows - padding} expert rows")
    multiple = _MULTIPLE if dtype in (torch.bfloat16, torch.float16) else 1
    segments, start = [], 0
    for expert, count in enumerate(counts):
        wide = -(-count // multiple) * multiple
        segments.append(_Segment(expert, slice(start, start + count), slice(start, start + wide)))
        start += count
    return segments


def _gathered(x_RD: Tensor, rows: ExpertRows, segments: list[_Segment], known_ND: Tensor | None = None) -> Tensor:
    """Gather the token rows of all experts, then zeros up to the end of the last product's operand."""
    num_rows = rows.num_rows
    end = max((segment.wide.stop for segment in segments), default=num_rows)
    end = max(end, num_rows)  # padding comes last
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
    """Dropout masks of one operation, computed one expert at a time."""

    def __init__(self, dropout: Dropout | None, width: int, device: torch.device) -> None:
        self.dropout = dropout
        self.scale = 1.0 if dropout is None else dropout.scale
        self.unit_F = None if dropout is None else unit_hash(width, device)

    def keep(self, expert: int, source_n: Tensor) -> Tensor | None:
        """Return the mask [n, F] of an expert for the given token rows; None without dropout."""
        if self.dropout is None or self.unit_F is None:
            return None
        token_n = self.dropout.token_R.index_select(0, source_n)
        row_n = row_hash(self.dropout, token_n, expert)
        return keep_mask(row_n, self.unit_F, self.dropout.threshold)
