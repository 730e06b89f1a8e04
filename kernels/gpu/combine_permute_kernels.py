"""Triton kernels that move whole rows: combine and its backward, permute and unpermute; one row a program.

A thread accesses 16 bytes where the bytes of a row allow it. Offsets are int64. Sums are in fp32, in a fixed order.

Letters: N expert rows, R token rows, M permuted rows, D columns.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_inputs", "num_slots"])
def _combine_kernel(
    y_ptr,  # [N, D]
    weight_ptr,  # [N] fp32, only if WEIGHTED
    slot_ptr,  # [num_slots] int64: rows of y in the order of summation
    slot_offset_ptr,  # [R] int64: start of each output row's slots
    out_ptr,  # [R, D], output
    num_inputs,  # R
    num_slots,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute out[r] = sum over the slots n of r, in order, of weight[n] y[n] (1 without WEIGHTED), in fp32.

    Example: y = [[1, 2], [10, 20], [100, 200]], weight = [1, 2, 3], slot = [2, 0, 1], slot_offset = [0, 2]:
    out = [[3*100 + 1, 3*200 + 2], [2*10, 2*20]] = [[301, 602], [20, 40]].
    """
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    r = tl.program_id(0) // BLOCKS
    d = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(slot_offset_ptr + r).to(tl.int32)
    end = tl.load(slot_offset_ptr + r + 1, mask=r + 1 < num_inputs, other=num_slots).to(tl.int32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for s in range(start, end):
        n = tl.load(slot_ptr + s)
        y = tl.load(y_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        if WEIGHTED:
            y = y * tl.load(weight_ptr + n)
        total += y
    tl.store(out_ptr + r.to(tl.int64) * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _combine_backward_kernel(
    dout_ptr,  # [R, D]
    y_ptr,  # [N, D], only if DWEIGHT
    weight_ptr,  # [N] fp32, only if WEIGHTED
    source_ptr,  # [N] int64: the output row whose sum includes row n
    dy_ptr,  # [N, D], output
    dweight_ptr,  # [N] fp32, output if DWEIGHT
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DWEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute dy[n] = weight[n] dout[source[n]] and dweight[n] = <dout[source[n]], y[n]>.

    Example: dout = [[1, 2], [3, 4]], y = [[5, 6], [7, 8]], weight = [2, 10], source = [1, 0]:
    dy = [[6, 8], [10, 20]], dweight = [3*5 + 4*6, 1*7 + 2*8] = [39, 23].
    """
    n = tl.program_id(0).to(tl.int64)
    source = tl.load(source_ptr + n)
    total = tl.zeros((BLOCK_D,), tl.float32)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weight_ptr + n)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        dout = tl.load(dout_ptr + source * D + d, mask=d < D, other=0.0).to(tl.float32)
        if DWEIGHT:
            total += dout * tl.load(y_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(dy_ptr + n * D + d, (dout * weight).to(dy_ptr.dtype.element_ty), mask=d < D)
    if DWEIGHT:
        tl.store(dweight_ptr + n, tl.sum(total))


@triton.jit
def _permute_kernel(
    x_ptr,  # [R, D]
    index_ptr,  # [M] int64
    out_ptr,  # [M, D], output; [R, D] if SCATTER
    D: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy out[m] = x[index[m]], or out[index[m]] = x[m] if SCATTER; convert if the dtypes differ.

    Example: x = [[1, 2], [3, 4], [5, 6]], index = [2, 0, 2] gives [[5, 6], [1, 2], [5, 6]]; with SCATTER,
    x = [[1, 2], [3, 4]], index = [1, 0] gives [[3, 4], [1, 2]].
    """
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    m = (tl.program_id(0) // BLOCKS).to(tl.int64)
    d = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    index = tl.load(index_ptr + m)
    read = m if SCATTER else index
    write = index if SCATTER else m
    row = tl.load(x_ptr + read * D + d, mask=d < D)
    tl.store(out_ptr + write * D + d, row.to(out_ptr.dtype.element_ty), mask=d < D)
