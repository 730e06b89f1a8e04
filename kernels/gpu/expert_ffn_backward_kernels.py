"""Triton kernels of the backward expert feed-forward: hidden units, mixing weights, weight matrices with their biases.

The gradient of the token rows is computed by _down_kernel of expert_ffn_forward_kernels.py. Both sides of the product
for a weight matrix's gradient are read in place; rows of x and of the output's gradient are read through the index, so
nothing is permuted first.

Letters: M expert rows of a tile, N expert rows, D width, F expert hidden width, L experts, R token rows.
"""

import triton
import triton.language as tl

from foreroute.kernels.gpu.activation_kernels import activation_and_slope
from foreroute.kernels.gpu.expert_ffn_forward_kernels import CHANGING, keep_mask_of, product_of, rows_of_tile, swizzle


@triton.jit(do_not_specialize=CHANGING)
def _down_backward_kernel(
    dout_ptr,  # [R, D] if GATHER, else [N, D]
    w2_ptr,  # [L, F, D]
    weight_ptr,  # [N] fp32, only if WEIGHTED
    source_ptr,  # [N] int64, only if GATHER or DROPOUT
    offset_ptr,  # [L] int32
    tile_ptr,  # [num_tiles, 2] int32
    token_ptr,  # [R] int64, only if PRE and DROPOUT
    seed_ptr,  # [2] int32, only if PRE and DROPOUT
    hidden_ptr,  # [N, F]: a, or z if PRE
    u_ptr,  # [N, F], only if GATED
    dz_ptr,  # [N, F], output
    du_ptr,  # [N, F], output if GATED
    ga_ptr,  # [N, F], output if WEIGHTED or PRE: hidden units times the mixing weight
    partial_ptr,  # [N, COLUMNS] fp32, output if DWEIGHT: part of the mixing weight's gradient
    num_tiles,
    first_expert,
    threshold,
    keep_scale,
    D: tl.constexpr,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,  # key of kernels.activations.ACTIVATIONS
    GATED: tl.constexpr,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DROPOUT: tl.constexpr,
    DWEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the gradients of an expert row's hidden units and pre-activation from the output's gradient.

    da[n] = w2[e] dout[source[n]]; dz = weight * da where a > 0. Otherwise (PRE) a and dz follow from the pre-activation
    z, with a gate also du: a = act(z) u, dz = weight * da act'(z) u, du = weight * da act(z).

    The gradient of the mixing weight, <dout, y> = <dout, w2[e]^T a + b2[e]> = <da, a> + <dout, b2[e]>, needs no saved
    y. Its first term is stored as one partial sum for each block of hidden units.

    Example, with ReLU: dout = [[1, 2]], w2 = [[[3, 4], [5, 6]]], weight = [0.5], source = [0], a = [[0, 7]]:
    da = [[11, 17]], dz = [[0, 8.5]], ga = [[0, 3.5]], partial = [[119]].
    """
    PRE: tl.constexpr = GATED or ACTIVATION != "relu"  # kernels.activations.saves_pre
    COLUMNS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    EVEN_N: tl.constexpr = F % BLOCK_N == 0
    tile, column = swizzle(tl.program_id(0), num_tiles, COLUMNS, 8)
    expert, row_M, in_M = rows_of_tile(tile_ptr, offset_ptr, tile, BLOCK_M)
    if expert < 0:
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_N = n < F
    k = tl.arange(0, BLOCK_K)
    source_M = tl.where(in_M, row_M, 0).to(tl.int64)
    if GATHER:
        source_M = tl.load(source_ptr + row_M, mask=in_M, other=0)
    w2_ptrs = w2_ptr + expert.to(tl.int64) * F * D + n[None, :] * D + k[:, None]
    da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    da = product_of(dout_ptr + source_M[:, None] * D + k[None, :], w2_ptrs, 1, da, in_N, D, EVEN_N, BLOCK_K, PRECISION)
    spot = row_M.to(tl.int64)[:, None] * F + n[None, :]
    inside = in_M[:, None] & in_N[None, :]
    hidden = tl.load(hidden_ptr + spot, mask=inside, other=0.0).to(tl.float32)
    if PRE:
        act, factor = activation_and_slope(hidden, ACTIVATION)
        a = act
        if GATED:
            u = tl.load(u_ptr + spot, mask=inside, other=0.0).to(tl.float32)
            a = act * u
            factor = factor * u
        if DROPOUT:
            token_source_M = tl.load(source_ptr + row_M, mask=in_M, other=0)
            token_M = tl.load(token_ptr + token_source_M, mask=in_M, other=0)
            keep = keep_mask_of(token_M, first_expert + expert, n, seed_ptr, threshold)
            a = tl.where(keep, a * keep_scale, 0.0)
            factor = tl.where(keep, factor * keep_scale, 0.0)
            act = tl.where(keep, act * keep_scale, 0.0)
    else:
        a = hidden
        factor = tl.where(a <= 0.0, 0.0, keep_scale)
    if DWEIGHT:
        partial_M = tl.sum(da * a, axis=1)
        tl.store(partial_ptr + row_M.to(tl.int64) * COLUMNS + column, partial_M, mask=in_M)
    if WEIGHTED:
        weight_M = tl.load(weight_ptr + row_M, mask=in_M, other=0.0)
        da = da * weight_M[:, None]
        a = a * weight_M[:, None]
    tl.store(dz_ptr + spot, (da * factor).to(dz_ptr.dtype.element_ty), mask=inside)
    if GATED:
        tl.store(du_ptr + spot, (da * act).to(du_ptr.dtype.element_ty), mask=inside)
    if WEIGHTED or PRE:
        tl.store(ga_ptr + spot, a.to(ga_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dweight_kernel(
    partial_ptr,  # [N, COLUMNS] fp32
    dout_ptr,  # [R, D]
    b2_ptr,  # [L, D]
    source_ptr,  # [N] int64
    offset_ptr,  # [L] int32
    tile_ptr,  # [num_tiles, 2] int32
    dweight_ptr,  # [N] fp32, output
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the mixing weights' gradient, sum of partial[n] + <dout[source[n]], b2[e]>, in a fixed order."""
    expert, row_M, in_M = rows_of_tile(tile_ptr, offset_ptr, tl.program_id(0), BLOCK_M)
    if expert < 0:
        return
    c = tl.arange(0, BLOCK_C)
    partial_ptrs = partial_ptr + row_M.to(tl.int64)[:, None] * COLUMNS + c[None, :]
    partial = tl.load(partial_ptrs, mask=in_M[:, None] & (c < COLUMNS)[None, :], other=0.0)
    total_M = tl.sum(partial, axis=1)
    source_M = tl.load(source_ptr + row_M, mask=in_M, other=0)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside = in_M[:, None] & (d < D)[None, :]
        dout = tl.load(dout_ptr + source_M[:, None] * D + d[None, :], mask=inside, other=0.0)
        b2 = tl.load(b2_ptr + expert * D + d, mask=d < D, other=0.0).to(tl.float32)
        total_M += tl.sum(dout.to(tl.float32) * b2[None, :], axis=1)
    tl.store(dweight_ptr + row_M, total_M, mask=in_M)


@triton.jit
def _weights_kernel(
    left_ptr,  # [N, F]
    left2_ptr,  # [N, F], only if PAIR
    right_ptr,  # [R, D] if GATHER, else [N, D]
    source_ptr,  # [N] int64, only if GATHER
    weight_ptr,  # [N] fp32, only if WEIGHTED
    offset_ptr,  # [L] int32
    dw_ptr,  # [L, F, D], output
    dw2_ptr,  # [L, F, D], output if PAIR
    db_ptr,  # [L, F] or [L, D], output by BIAS
    D: tl.constexpr,
    F: tl.constexpr,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIAS: tl.constexpr,
    PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute dw[e] = left^T right over the rows of expert e; right is read through the index if GATHER.

    PAIR: also dw2[e] = left2^T right, with the right rows read once (w1 and w3).
    BIAS "left": db[e] is the sum of the left rows (b1: the gradient of the pre-activation). BIAS "right": db[e] is the
    sum of the right rows times their mixing weight (b2). The gradients of an expert without rows are zero.

    Example: left = [[1], [2], [3]], right = [[10, 20], [30, 40]], source = [1, 0, 1], offset = [1, 3]:
    dw = [[[30, 40]], [[2*10 + 3*30, 2*20 + 3*40]]] = [[[30, 40]], [[110, 160]]]; BIAS "left": db = [[1], [5]].
    """
    COLUMNS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    ROWS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)
    column = pid % COLUMNS
    row = pid // COLUMNS % ROWS
    expert = pid // (COLUMNS * ROWS)
    end = tl.load(offset_ptr + expert)
    start = tl.load(offset_ptr + expert - 1, mask=expert > 0, other=0)
    f = row * BLOCK_F + tl.arange(0, BLOCK_F)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    if PAIR:
        acc2 = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    if BIAS == "left":
        bias = tl.zeros((BLOCK_F,), tl.float32)
    else:
        bias = tl.zeros((BLOCK_D,), tl.float32)
    for m0 in range(start, end, BLOCK_M):
        row_M = m0 + m
        in_M = row_M < end
        row64_M = row_M.to(tl.int64)
        right_row_M = row64_M
        if GATHER:
            right_row_M = tl.load(source_ptr + row_M, mask=in_M, other=0)
        left_spot = row64_M[None, :] * F + f[:, None]
        in_left = in_M[None, :] & (f < F)[:, None]
        left = tl.load(left_ptr + left_spot, mask=in_left, other=0.0)
        right_spot = right_row_M[:, None] * D + d[None, :]
        right = tl.load(right_ptr + right_spot, mask=in_M[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if PAIR:
            left2 = tl.load(left2_ptr + left_spot, mask=in_left, other=0.0)
            acc2 = tl.dot(left2, right, acc2, input_precision=PRECISION)
        if BIAS == "left":
            if column == 0:
                bias += tl.sum(left.to(tl.float32), axis=1)
        if BIAS == "right":
            if row == 0:
                scaled = right.to(tl.float32)
                if WEIGHTED:
                    weight_M = tl.load(weight_ptr + row_M, mask=in_M, other=0.0)
                    scaled = scaled * weight_M[:, None]
                bias += tl.sum(scaled, axis=0)
    spot = expert.to(tl.int64) * F * D + f[:, None] * D + d[None, :]
    inside = (f < F)[:, None] & (d < D)[None, :]
    tl.store(dw_ptr + spot, acc.to(dw_ptr.dtype.element_ty), mask=inside)
    if PAIR:
        tl.store(dw2_ptr + spot, acc2.to(dw2_ptr.dtype.element_ty), mask=inside)
    if BIAS == "left":
        if column == 0:
            tl.store(db_ptr + expert * F + f, bias.to(db_ptr.dtype.element_ty), mask=f < F)
    if BIAS == "right":
        if row == 0:
            tl.store(db_ptr + expert * D + d, bias.to(db_ptr.dtype.element_ty), mask=d < D)
