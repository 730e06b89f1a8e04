"""Triton kernels of the forward expert feed-forward, and helpers shared with expert_ffn_backward_kernels.py.

The launchers are in kernels/gpu/expert_ffn.py. Expert rows are in expert-major order, and all rows of a tile belong to
one expert. The product reads token rows through an index, so no permuted copy is written, and experts are not padded.
The host launches an upper bound of the number of tiles and reads nothing back: programs after the last tile return at
once. Offsets are int64. No atomics.

Letters: M expert rows of a tile, N expert rows, D width, F expert hidden width, L experts, R token rows.
"""

import triton
import triton.language as tl

from foreroute.kernels.gpu.activation_kernels import activation_of

# Numbers that change from step to step: a kernel must not be compiled again when one is 1 or a multiple of 16.
CHANGING = ["num_tiles", "first_expert", "threshold"]


@triton.jit(do_not_specialize=["num_tiles"])
def _tile_map_kernel(
    offset_ptr,  # [L] int32, end of each expert's rows
    tile_ptr,  # [num_tiles, 2] int32, output: expert (-1: no tile) and first row
    num_tiles,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """List the tiles expert by expert; program e lists those of expert e, the last program also marks unused entries.

    Example: 16 rows per tile, offset_L = [20, 20, 23]: [[0, 0], [0, 16], [2, 20], [-1, 0], ...].
    """
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    end_e = tl.load(offset_ptr + e, mask=e < EXPERTS, other=0)
    start_e = tl.load(offset_ptr + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    tiles_e = tl.where(e < EXPERTS, (end_e - start_e + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(e < expert, tiles_e, 0))
    count = tl.sum(tl.where(e == expert, tiles_e, 0))
    start = tl.sum(tl.where(e == expert, start_e, 0))
    for i in range(0, count, BLOCK_E):
        tile = i + e
        inside = (tile < count) & (first + tile < num_tiles)  # also if offset_L is wrong
        tl.store(tile_ptr + 2 * (first + tile), tl.zeros_like(tile) + expert, mask=inside)
        tl.store(tile_ptr + 2 * (first + tile) + 1, start + tile * BLOCK_M, mask=inside)
    if expert == EXPERTS - 1:
        for i in range(first + count, num_tiles, BLOCK_E):
            tile = i + e
            tl.store(tile_ptr + 2 * tile, tl.full((BLOCK_E,), -1, tl.int32), mask=tile < num_tiles)
            tl.store(tile_ptr + 2 * tile + 1, tl.zeros((BLOCK_E,), tl.int32), mask=tile < num_tiles)


@triton.jit
def swizzle(pid, num_tiles, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Order programs so that GROUP row tiles use the same columns of a weight while the cache holds them."""
    per_group = GROUP * COLUMNS
    first = pid // per_group * GROUP
    size = min(num_tiles - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def rows_of_tile(tile_ptr, offset_ptr, tile, BLOCK_M: tl.constexpr):
    """Return a tile's expert (-1: an unused tile), its row numbers [M] and a mask of the expert's rows."""
    expert = tl.load(tile_ptr + 2 * tile)
    row_M = tl.load(tile_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_M)
    end = tl.load(offset_ptr + tl.maximum(expert, 0))
    return expert, row_M, row_M < end


@triton.jit
def _hash32(value):
    """Avalanche uint32, as hash32 of kernels/dropout.py does."""
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    return value ^ (value >> 16)


@triton.jit
def keep_mask_of(token_M, expert, unit_N, seed_ptr, threshold):
    """Return the dropout mask [M, N] of kernels/dropout.py, a function of seed, token, global expert and unit alone."""
    low = tl.load(seed_ptr).to(tl.uint32)
    high = tl.load(seed_ptr + 1).to(tl.uint32)
    mixed_M = _hash32(token_M.to(tl.uint32) ^ low)
    mixed_M = _hash32(mixed_M ^ (token_M >> 32).to(tl.uint32) ^ high)
    row_M = _hash32(mixed_M + expert.to(tl.uint32) * 0x9E3779B1) | 1
    unit_hash_N = _hash32((unit_N + 1).to(tl.uint32) * 0x9E3779B1) | 1
    product = (row_M[:, None] * unit_hash_N[None, :]).to(tl.int32, bitcast=True)
    return product >= threshold


@triton.jit
def product_of(
    a_ptrs,
    b_ptrs,
    b_step,
    acc,
    in_N,
    DEPTH: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a [M, DEPTH] @ b [DEPTH, N] to acc; along the contraction a is contiguous, and b has a stride of b_step."""
    k = tl.arange(0, BLOCK_K)
    for k0 in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k < DEPTH - k0)[None, :], other=0.0)
        if DEPTH % BLOCK_K == 0 and EVEN_N:
            b = tl.load(b_ptrs)
        else:
            b = tl.load(b_ptrs, mask=(k < DEPTH - k0)[:, None] & in_N[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * b_step
    return acc


@triton.jit(do_not_specialize=CHANGING)
def _up_kernel(
    x_ptr,  # [R, D]
    w1_ptr,  # [L, F, D]
    b1_ptr,  # [L, F]
    w3_ptr,  # [L, F, D], only if GATED
    source_ptr,  # [N] int64
    offset_ptr,  # [L] int32
    tile_ptr,  # [num_tiles, 2] int32
    token_ptr,  # [R] int64, only if DROPOUT
    seed_ptr,  # [2] int32, only if DROPOUT
    a_ptr,  # [N, F], output: hidden units after activation and dropout
    z_ptr,  # [N, F], output if PRE and SAVE: pre-activation
    u_ptr,  # [N, F], output if GATED and SAVE: gate input
    num_tiles,
    first_expert,
    threshold,
    keep_scale,
    D: tl.constexpr,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,  # key of kernels.activations.ACTIVATIONS
    GATED: tl.constexpr,
    SAVE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute a[n] = dropout(act(w1[e] x[source[n]] + b1[e])), if GATED times (w3[e] x[source[n]]) before dropout.

    Example: x = [[1, 2], [3, 4]], w1 = [[[1, 1]], [[1, -1]]], b1 = [[10], [20]], source = [1, 0, 1], offset = [1, 3]:
    expert 0 reads row 1, expert 1 rows 0 and 1, so with ReLU a = [[3+4+10], [1-2+20], [3-4+20]] = [[17], [19], [19]].
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
    # Rows after the expert's last one read token row 0 and are not stored.
    source_M = tl.load(source_ptr + row_M, mask=in_M, other=0)
    x_ptrs = x_ptr + source_M[:, None] * D + k[None, :]
    w_offset = expert.to(tl.int64) * F * D + n[None, :] * D + k[:, None]
    w1_ptrs = w1_ptr + w_offset
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        w3_ptrs = w3_ptr + w_offset
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, D, BLOCK_K):
            if D % BLOCK_K == 0 and EVEN_N:
                x = tl.load(x_ptrs)
                w1 = tl.load(w1_ptrs)
                w3 = tl.load(w3_ptrs)
            else:
                in_K = k < D - k0
                x = tl.load(x_ptrs, mask=in_K[None, :], other=0.0)
                w1 = tl.load(w1_ptrs, mask=in_K[:, None] & in_N[None, :], other=0.0)
                w3 = tl.load(w3_ptrs, mask=in_K[:, None] & in_N[None, :], other=0.0)
            acc = tl.dot(x, w1, acc, input_precision=PRECISION)
            gate = tl.dot(x, w3, gate, input_precision=PRECISION)
            x_ptrs += BLOCK_K
            w1_ptrs += BLOCK_K
            w3_ptrs += BLOCK_K
    else:
        acc = product_of(x_ptrs, w1_ptrs, 1, acc, in_N, D, EVEN_N, BLOCK_K, PRECISION)
    acc += tl.load(b1_ptr + expert * F + n, mask=in_N, other=0.0).to(tl.float32)[None, :]
    out = row_M.to(tl.int64)[:, None] * F + n[None, :]
    inside = in_M[:, None] & in_N[None, :]
    if PRE and SAVE:
        tl.store(z_ptr + out, acc.to(z_ptr.dtype.element_ty), mask=inside)
    hidden = activation_of(acc, ACTIVATION)
    if GATED:
        if SAVE:
            tl.store(u_ptr + out, gate.to(u_ptr.dtype.element_ty), mask=inside)
        hidden = hidden * gate
    if DROPOUT:
        token_M = tl.load(token_ptr + source_M, mask=in_M, other=0)
        keep = keep_mask_of(token_M, first_expert + expert, n, seed_ptr, threshold)
        hidden = tl.where(keep, hidden * keep_scale, 0.0)
    tl.store(a_ptr + out, hidden.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tiles"])
def _down_kernel(
    a_ptr,  # [N, F]
    w_ptr,  # [L, F, D]
    a2_ptr,  # [N, F], only if SECOND
    w2_ptr,  # [L, F, D], only if SECOND
    b_ptr,  # [L, D], only if BIAS
    offset_ptr,  # [L] int32
    tile_ptr,  # [num_tiles, 2] int32
    y_ptr,  # [N, D], output
    num_tiles,
    D: tl.constexpr,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute y[n] = a[n] w[e] (+ a2[n] w2[e]) (+ b[e]): the second product, and the gradient of the token rows.

    Example: a = [[2], [3]], w = [[[1, 10]], [[2, 20]]], b = [[0, 1], [0, 5]], offset = [1, 2]: y = [[2, 21], [6, 65]].
    """
    COLUMNS: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    EVEN_N: tl.constexpr = D % BLOCK_N == 0
    tile, column = swizzle(tl.program_id(0), num_tiles, COLUMNS, 8)
    expert, row_M, in_M = rows_of_tile(tile_ptr, offset_ptr, tile, BLOCK_M)
    if expert < 0:
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_N = n < D
    k = tl.arange(0, BLOCK_K)
    row64_M = row_M.to(tl.int64)
    a_offset = tl.where(in_M, row64_M, 0)[:, None] * F + k[None, :]
    w_offset = expert.to(tl.int64) * F * D + k[:, None] * D + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = product_of(a_ptr + a_offset, w_ptr + w_offset, D, acc, in_N, F, EVEN_N, BLOCK_K, PRECISION)
    if SECOND:
        acc = product_of(a2_ptr + a_offset, w2_ptr + w_offset, D, acc, in_N, F, EVEN_N, BLOCK_K, PRECISION)
    if BIAS:
        acc += tl.load(b_ptr + expert * D + n, mask=in_N, other=0.0).to(tl.float32)[None, :]
    inside = in_M[:, None] & in_N[None, :]
    tl.store(y_ptr + row64_M[:, None] * D + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)
