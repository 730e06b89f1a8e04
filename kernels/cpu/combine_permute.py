"""Backend "cpu" of combine, permute_rows and unpermute_rows: PyTorch's embedding_bag, which sums any dtype in fp32.

Letters: N expert rows, R token rows, M permuted rows, D columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from foreroute.kernels.expert_index import ExpertRows


def combine_cpu(y_ND: Tensor, weight_N: Tensor | None, rows: ExpertRows) -> Tensor:
    """Sum each token row's expert rows; weights are rounded to the dtype of y."""
    slot_N, slot_offset_R = _without_padding(rows.slot_N, rows.slot_offset_R)
    slot_weight_N = None
    if weight_N is not None:
        slot_weight_N = weight_N.to(y_ND.dtype).index_select(0, slot_N)
    return F.embedding_bag(slot_N, y_ND, slot_offset_R, mode="sum", per_sample_weights=slot_weight_N)


def _without_padding(slot_N: Tensor, slot_offset_R: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the slots of padding, which embedding_bag does not accept."""
    first = int(slot_offset_R[0]) if slot_offset_R.numel() else 0
    return (slot_N[first:], slot_offset_R - first) if first else (slot_N, slot_offset_R)


def combine_backward_cpu(
    dout_RD: Tensor, y_ND: Tensor | None, weight_N: Tensor | None, rows: ExpertRows
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradient of the expert rows and, if y_ND is given, of their weights."""
    dout_ND = dout_RD.index_select(0, rows.source_N)
    dweight_N = None
    if y_ND is not None:
        wide = torch.promote_types(y_ND.dtype, torch.float32)
        dweight_N = (dout_ND * y_ND).sum(1, dtype=wide)
    if weight_N is not None:
        dout_ND.mul_(weight_N[:, None].to(dout_ND.dtype))
    return dout_ND, dweight_N


def take_rows(x_RD: Tensor, source_N: Tensor, weight_N: Tensor) -> Tensor:
    """Compute weight[n] * x[source[n]] in one pass."""
    each = torch.arange(source_N.numel(), device=source_N.device)
    return F.embedding_bag(source_N, x_RD, each, mode="sum", per_sample_weights=weight_N.to(x_RD.dtype))


def add_rows_cpu(y_MD: Tensor, slot_M: Tensor, slot_offset_R: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows slot[slot_offset[r]:slot_offset[r + 1]] of y into row r."""
    wide = y_MD.to(torch.promote_types(y_MD.dtype, dtype))
    return F.embedding_bag(slot_M, wide, slot_offset_R, mode="sum").to(dtype)


def copy_rows_cpu(x: Tensor, index_M: Tensor, out: Tensor, *, scatter: bool) -> None:
    """Copy rows: out[m] = x[index[m]], or out[index[m]] = x[m] if scatter; convert if the dtypes differ."""
    if scatter:
        out.index_copy_(0, index_M, x.to(out.dtype))
    elif x.dtype == out.dtype:
        torch.index_select(x, 0, index_M, out=out)
    else:
        out.copy_(x.index_select(0, index_M))
