"""Backend "triton" of combine, permute_rows and unpermute_rows: launches the kernels of combine_permute_kernels.py.

Letters: N expert rows, R token rows, M permuted rows, D columns.
"""

import torch
from torch import Tensor

from foreroute.kernels.expert_index import ExpertRows
from foreroute.kernels.gpu import combine_permute_kernels as jit
from foreroute.kernels.launching import launch
from foreroute.kernels.tiles import row_tile


def combine_triton(y_ND: Tensor, weight_N: Tensor | None, rows: ExpertRows) -> Tensor:
    """Sum each token row's expert rows, weighted if weight_N is given."""
    return add_rows_triton(y_ND, rows.slot_N, rows.slot_offset_R, y_ND.dtype, weight_N)


def add_rows_triton(
    y_ND: Tensor, slot_N: Tensor, slot_offset_R: Tensor, dtype: torch.dtype, weight_N: Tensor | None = None
) -> Tensor:
    """Sum the (weighted) rows slot[slot_offset[r]:slot_offset[r + 1]] of y into row r."""
    width, num_inputs = y_ND.shape[1], slot_offset_R.numel()
    out_RD = y_ND.new_empty(num_inputs, width, dtype=dtype)
    tile = row_tile(width, min(y_ND.element_size(), out_RD.element_size()))
    launch(
        jit._combine_kernel,
        num_inputs * -(-width // tile.columns),
        tile,
        y_ptr=y_ND,
        weight_ptr=weight_N,
        slot_ptr=slot_N,
        slot_offset_ptr=slot_offset_R,
        out_ptr=out_RD,
        num_inputs=num_inputs,
        num_slots=slot_N.numel(),
        D=width,
        WEIGHTED=weight_N is not None,
        BLOCK_D=tile.columns,
    )
    return out_RD


def combine_backward_triton(
    dout_RD: Tensor, y_ND: Tensor | None, weight_N: Tensor | None, rows: ExpertRows
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradient of the expert rows and, if y_ND is given, of their weights."""
    width = dout_RD.shape[1]
    dy_ND = dout_RD.new_empty(rows.num_rows, width)
    dweight_N = None if y_ND is None else dout_RD.new_empty(rows.num_rows, dtype=torch.float32)
    tile = row_tile(width, dout_RD.element_size())
    launch(
        jit._combine_backward_kernel,
        rows.num_rows,
        tile,
        dout_ptr=dout_RD,
        y_ptr=y_ND,
        weight_ptr=weight_N,
        source_ptr=rows.source_N,
        dy_ptr=dy_ND,
        dweight_ptr=dweight_N,
        D=width,
        WEIGHTED=weight_N is not None,
        DWEIGHT=y_ND is not None,
        BLOCK_D=tile.columns,
    )
    return dy_ND, dweight_N


def copy_rows_triton(x: Tensor, index_M: Tensor, out: Tensor, *, scatter: bool) -> None:
    """Copy rows: out[m] = x[index[m]], or out[index[m]] = x[m] if scatter; convert if the dtypes differ."""
    width = x.shape[1]
    tile = row_tile(width, min(x.element_size(), out.element_size()))
    launch(
        jit._permute_kernel,
        index_M.numel() * -(-width // tile.columns),
        tile,
        x_ptr=x,
        index_ptr=index_M,
        out_ptr=out,
        D=width,
        SCATTER=scatter,
        BLOCK_D=tile.columns,
    )
