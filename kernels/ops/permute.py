"""permute_rows and unpermute_rows: copy whole rows by index, of any dtype, with an optional cast.

    permute_rows:    out[m] = x[index[m]]      the send side of the exchange: token rows in the order of their ranks
    unpermute_rows:  out[index[m]] = y[m]      its inverse; rows without an index are zero

Letters: R rows, M permuted rows, D columns.
"""

from typing import Any

import torch
from torch import Tensor

from foreroute.kernels.cpu.combine_permute import add_rows_cpu, copy_rows_cpu
from foreroute.kernels.expert_index import check_range
from foreroute.kernels.gpu.combine_permute import add_rows_triton, copy_rows_triton
from foreroute.kernels.launching import MAX_ROWS
from foreroute.kernels.operands import check_dtype, check_tensor, resolve_backend

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def permute_rows(
    x_RD: Tensor, index_M: Tensor, *, dtype: torch.dtype | None = None, backend: str | None = None, debug: bool = False
) -> Tensor:
    """Copy rows in the order of an index, which may repeat or skip rows.

    Args:
        x_RD: rows, contiguous, of any dtype of 1 to 8 bytes.
        index_M: int64, the source row of each result row.
        dtype: dtype of the result, by default that of x; only floats are converted.
        backend: "cpu", "triton" or "reference"; by default "triton" on a GPU and "cpu" elsewhere.
        debug: check every index on the host.

    Returns:
        out_MD. The gradient of a row is the sum over its copies, in fp32 and in the order of m.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and the allowed values.

    Example:
        >>> import torch
        >>> from foreroute.kernels import permute_rows, unpermute_rows
        >>> x = torch.tensor([[1, 2], [3, 4], [5, 6]])
        >>> permute_rows(x, torch.tensor([2, 0, 2])).tolist()
        [[5, 6], [1, 2], [5, 6]]
        >>> unpermute_rows(torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 0]), num_rows=3).tolist()
        [[3, 4], [0, 0], [1, 2]]
    """
    backend = _check("x_RD", x_RD, index_M, dtype, backend)
    if debug:
        check_range("index_M", index_M, x_RD.shape[0])
    if backend == "reference":
        wide = x_RD.double() if x_RD.is_floating_point() else x_RD
        rows = [wide[r].to(dtype or x_RD.dtype) for r in index_M.tolist()]
        return torch.stack(rows) if rows else x_RD.new_empty(0, x_RD.shape[1], dtype=dtype)
    out_MD: Tensor = _permute_rows(x_RD, index_M, dtype or x_RD.dtype, backend)
    return out_MD


def unpermute_rows(
    y_MD: Tensor,
    index_M: Tensor,
    num_rows: int,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    debug: bool = False,
) -> Tensor:
    """Undo permute_rows: copy each row back to its source.

    Args:
        y_MD: rows, as in permute_rows.
        index_M: int64, the result row of each row. It must not repeat a number (debug checks this); otherwise the
            result is undefined. Use kernels.combine to sum rows with one destination.
        num_rows: number of result rows; rows without an index are zero.
        dtype, backend, debug: as in permute_rows.

    Returns:
        out, num_rows rows.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and the allowed values.
    """
    backend = _check("y_MD", y_MD, index_M, dtype, backend)
    check_tensor("index_M", index_M, (y_MD.shape[0],), y_MD)
    if not 0 <= num_rows <= MAX_ROWS:
        raise ValueError(f"num_rows={num_rows}: must be from 0 to {MAX_ROWS}")
    if debug:
        check_range("index_M", index_M, num_rows)
        if index_M.unique().numel() != index_M.numel():
            raise ValueError(f"index_M={index_M.tolist()}: must not repeat a row")
    if backend == "reference":
        out = [y_MD.new_zeros(y_MD.shape[1], dtype=dtype) for _ in range(num_rows)]
        for m, r in enumerate(index_M.tolist()):
            out[r] = y_MD[m].to(dtype or y_MD.dtype)
        return torch.stack(out) if out else y_MD.new_empty(0, y_MD.shape[1], dtype=dtype)
    out_RD: Tensor = _unpermute_rows(y_MD, index_M, num_rows, dtype or y_MD.dtype, backend)
    return out_RD


def _check(name: str, x: Tensor, index_M: Tensor, dtype: torch.dtype | None, backend: str | None) -> str:
    backend = resolve_backend(x, backend)
    if x.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: must have two dimensions")
    check_tensor(name, x, tuple(x.shape), x, aligned=backend == "triton")
    check_dtype("index_M", index_M, (torch.int64,))
    check_tensor("index_M", index_M, (index_M.numel(),), x)
    if max(index_M.numel(), x.shape[0]) > MAX_ROWS:
        raise ValueError(f"{name} or index_M has more than {MAX_ROWS} rows")
    if x.element_size() not in (1, 2, 4, 8):
        raise ValueError(f"{name} is {x.dtype}: must be a dtype of 1, 2, 4 or 8 bytes")
    if x.is_complex() and x.requires_grad:
        raise ValueError(f"{name} is {x.dtype} and requires a gradient: only real numbers have one here")
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if dtype not in (None, x.dtype) and not (dtype in floats and x.dtype in floats):
        raise ValueError(f"dtype={dtype}: {name} is {x.dtype}; only floats convert")
    return backend


def _copy(x: Tensor, index_M: Tensor, out: Tensor, backend: str, *, scatter: bool) -> Tensor:
    copy_rows = copy_rows_triton if backend == "triton" else copy_rows_cpu
    if x.dtype == out.dtype:  # a copy of bits
        word = _WORDS[x.element_size()]
        copy_rows(x.view(word), index_M, out.view(word), scatter=scatter)
    else:
        copy_rows(x, index_M, out, scatter=scatter)
    return out


@torch.library.custom_op("foreroute::permute_rows", mutates_args=())
def _permute_rows(x_RD: Tensor, index_M: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    out_MD = x_RD.new_empty(index_M.numel(), x_RD.shape[1], dtype=dtype)
    return _copy(x_RD, index_M, out_MD, backend, scatter=False)


@_permute_rows.register_fake
def _(x_RD: Tensor, index_M: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return x_RD.new_empty(index_M.shape[0], x_RD.shape[1], dtype=dtype)


@torch.library.custom_op("foreroute::permute_rows_backward", mutates_args=())
def _permute_rows_backward(dout_MD: Tensor, index_M: Tensor, num_rows: int, dtype: torch.dtype, backend: str) -> Tensor:
    """Sum the gradients of each row's copies."""
    order_M = torch.argsort(index_M, stable=True)
    row_R = torch.arange(num_rows, device=index_M.device)
    slot_offset_R = torch.searchsorted(index_M[order_M], row_R)
    add_rows = add_rows_triton if backend == "triton" else add_rows_cpu
    return add_rows(dout_MD, order_M, slot_offset_R, dtype)


@_permute_rows_backward.register_fake
def _(dout_MD: Tensor, index_M: Tensor, num_rows: int, dtype: torch.dtype, backend: str) -> Tensor:
    return dout_MD.new_empty(num_rows, dout_MD.shape[1], dtype=dtype)


@torch.library.custom_op("foreroute::unpermute_rows", mutates_args=())
def _unpermute_rows(y_MD: Tensor, index_M: Tensor, num_rows: int, dtype: torch.dtype, backend: str) -> Tensor:
    shape = num_rows, y_MD.shape[1]
    complete = index_M.numel() == num_rows  # distinct numbers: every row is written
    make = y_MD.new_empty if complete else y_MD.new_zeros
    return _copy(y_MD, index_M, make(shape, dtype=dtype), backend, scatter=True)


@_unpermute_rows.register_fake
def _(y_MD: Tensor, index_M: Tensor, num_rows: int, dtype: torch.dtype, backend: str) -> Tensor:
    return y_MD.new_empty(num_rows, y_MD.shape[1], dtype=dtype)


def _setup_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_RD, index_M, _, ctx.backend = inputs
    ctx.num_rows, ctx.dtype = x_RD.shape[0], x_RD.dtype
    ctx.save_for_backward(index_M)


def _backward_permute(ctx: Any, dout_MD: Tensor) -> tuple[Any, ...]:
    (index_M,) = ctx.saved_tensors
    dx_RD = _permute_rows_backward(dout_MD.contiguous(), index_M, ctx.num_rows, ctx.dtype, ctx.backend)
    return dx_RD, None, None, None


def _setup_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y_MD, index_M, _, _, ctx.backend = inputs
    ctx.dtype = y_MD.dtype
    ctx.save_for_backward(index_M)


def _backward_unpermute(ctx: Any, dout_RD: Tensor) -> tuple[Any, ...]:
    (index_M,) = ctx.saved_tensors
    dy_MD = _permute_rows(dout_RD.contiguous(), index_M, ctx.dtype, ctx.backend)
    return dy_MD, None, None, None, None


_permute_rows.register_autograd(_backward_permute, setup_context=_setup_permute)
_unpermute_rows.register_autograd(_backward_unpermute, setup_context=_setup_unpermute)
