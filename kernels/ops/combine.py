"""combine: the weighted sum of expert rows into token rows; one pass, summed in fp32 in a fixed order.

    out[r] = sum over the expert rows n of r, in order, of weight[n] * y[n]

A token row may have any number of expert rows, or none. An expert rank sums the outputs of its own experts (a partial
result). The token's rank sums the partial results, without weights.

Letters: N expert rows, R token rows, D columns.
"""

from typing import Any

import torch
from torch import Tensor

from foreroute.kernels.cpu.combine_permute import combine_backward_cpu, combine_cpu
from foreroute.kernels.expert_index import ExpertRows
from foreroute.kernels.gpu.combine_permute import combine_backward_triton, combine_triton
from foreroute.kernels.operands import check_dtype, check_float, check_rows, check_tensor, resolve_backend


def combine(
    y_ND: Tensor, weight_N: Tensor | None, rows: ExpertRows, *, backend: str | None = None, debug: bool = False
) -> Tensor:
    """Sum each token row's expert rows.

    Args:
        y_ND: expert rows, contiguous; fp32, bf16 or fp16 (on the CPU also fp64).
        weight_N: fp32 weights (fp64 for fp64), or None for ones. The CPU rounds them to the dtype of y.
        rows: maps expert rows to token rows by source_N, slot_N and slot_offset_R (kernels/expert_index.py).
        backend: "cpu", "triton" or "reference"; by default "triton" on a GPU and "cpu" elsewhere.
        debug: check every index on the host.

    Returns:
        out_RD, dtype of y. A token row without expert rows is zero.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and the allowed values.

    Example:
        >>> import torch
        >>> from foreroute.kernels import combine, expert_rows_from_lists
        >>> rows = expert_rows_from_lists([[0], [1, 0], []], num_experts=2)
        >>> rows.slot_N.tolist()
        [0, 2, 1]
        >>> y = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
        >>> combine(y, torch.tensor([1.0, 0.5, 0.1]), rows).tolist()
        [[1.0, 2.0], [15.0, 30.0], [0.0, 0.0]]
    """
    backend = resolve_backend(y_ND, backend)
    check_float("y_ND", y_ND, backend)
    aligned = backend == "triton"
    if y_ND.dim() != 2:
        raise ValueError(f"y_ND has shape {tuple(y_ND.shape)}: must have two dimensions")
    check_tensor("y_ND", y_ND, (rows.num_rows, y_ND.shape[-1]), y_ND, aligned=aligned)
    if weight_N is not None:
        check_weight(weight_N, rows, y_ND)
    check_rows(rows, y_ND, debug=debug)
    if backend == "reference":
        return combine_reference(y_ND, weight_N, rows)
    out_RD: Tensor = _combine(y_ND, weight_N, list(rows.tensors()), backend)
    return out_RD


def check_weight(weight_N: Tensor, rows: ExpertRows, like: Tensor) -> None:
    """Raise ValueError unless mixing weights fit the expert rows."""
    check_tensor("weight_N", weight_N, (rows.num_rows,), like)
    check_dtype("weight_N", weight_N, (torch.promote_types(like.dtype, torch.float32),))


def combine_reference(y_ND: Tensor, weight_N: Tensor | None, rows: ExpertRows) -> Tensor:
    """Compute combine one token row at a time in fp64, differentiated by autograd: the reference for tests."""
    y = y_ND.double()
    weight = y.new_ones(y.shape[0]) if weight_N is None else weight_N.double()
    starts = [*rows.slot_offset_R.tolist(), rows.num_rows]
    out = []
    for r in range(rows.num_inputs):
        total = y.new_zeros(y.shape[1])
        for n in rows.slot_N[starts[r] : starts[r + 1]].tolist():
            total = total + weight[n] * y[n]
        out.append(total)
    return torch.stack(out).to(y_ND.dtype) if out else y_ND[:0]


@torch.library.custom_op("foreroute::combine", mutates_args=())
def _combine(y_ND: Tensor, weight_N: Tensor | None, rows: list[Tensor], backend: str) -> Tensor:
    run = combine_triton if backend == "triton" else combine_cpu
    return run(y_ND, weight_N, ExpertRows(*rows))


@_combine.register_fake
def _(y_ND: Tensor, weight_N: Tensor | None, rows: list[Tensor], backend: str) -> Tensor:
    return y_ND.new_empty(rows[3].shape[0], y_ND.shape[1])


@torch.library.custom_op("foreroute::combine_backward", mutates_args=())
def _combine_backward(
    dout_RD: Tensor, y_ND: Tensor | None, weight_N: Tensor | None, rows: list[Tensor], backend: str
) -> tuple[Tensor, Tensor]:
    """Return dy_ND and dweight_N (empty without y_ND)."""
    run = combine_backward_triton if backend == "triton" else combine_backward_cpu
    dy_ND, dweight_N = run(dout_RD, y_ND, weight_N, ExpertRows(*rows))
    return dy_ND, dout_RD.new_empty(0) if dweight_N is None else dweight_N


@_combine_backward.register_fake
def _(
    dout_RD: Tensor, y_ND: Tensor | None, weight_N: Tensor | None, rows: list[Tensor], backend: str
) -> tuple[Tensor, Tensor]:
    dy_ND = dout_RD.new_empty(rows[0].shape[0], dout_RD.shape[1])
    if y_ND is None or weight_N is None:
        return dy_ND, dout_RD.new_empty(0)
    return dy_ND, torch.empty_like(weight_N)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y_ND, weight_N, rows, ctx.backend = inputs
    ctx.dweight = weight_N is not None and weight_N.requires_grad
    ctx.save_for_backward(y_ND if ctx.dweight else None, weight_N, *rows)


def _backward(ctx: Any, dout_RD: Tensor) -> tuple[Any, ...]:
    y_ND, weight_N, *rows = ctx.saved_tensors
    dy_ND, dweight_N = _combine_backward(dout_RD.contiguous(), y_ND, weight_N, rows, ctx.backend)
    return dy_ND, dweight_N if ctx.dweight else None, [None] * 4, None


_combine.register_autograd(_backward, setup_context=_setup_context)
