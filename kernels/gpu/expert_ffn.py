"""Backend "triton" of the expert feed-forward: the order, the tiles and the arguments of its kernels.

Forward: list the row tiles, first product, second product. Backward: gradient of the hidden units, of the token rows
(summed by kernels/gpu/combine_permute.py), and of two or three weight matrices with their biases; for live routers also
of the mixing weights. The kernels are in expert_ffn_forward_kernels.py and expert_ffn_backward_kernels.py. Nothing is
read back from the GPU.

Letters: R token rows, N expert rows, L experts here, D width, F expert hidden width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from foreroute.kernels.activations import saves_pre
from foreroute.kernels.dropout import Dropout
from foreroute.kernels.expert_index import ExpertRows
from foreroute.kernels.gpu import expert_ffn_backward_kernels as backward
from foreroute.kernels.gpu import expert_ffn_forward_kernels as forward
from foreroute.kernels.gpu.combine_permute import combine_triton
from foreroute.kernels.launching import arch_of, launch
from foreroute.kernels.operands import ExpertWeights, FfnGradients, Saved
from foreroute.kernels.tiles import Tile, Tiles, ffn_tiles, power_of_two


def ffn_forward_triton(
    x_RD: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    dropout: Dropout | None,
    *,
    activation: str,
    save: bool,
    precision: str,
) -> tuple[Tensor, Saved]:
    """Compute the unweighted output y_ND of every expert row, and the tensors saved for backward."""
    width_F, gated = weights.w1_LFD.shape[1], weights.w3_LFD is not None
    pre = saves_pre(activation, gated=gated)
    tiles = _tiles(x_RD, weights, rows, precision, pre=pre)
    tile_map = _tile_map(rows, tiles.up.rows)
    shared = _shared_arguments(weights, rows, tile_map, precision)
    a_NF = x_RD.new_empty(rows.num_rows, width_F)
    z_NF, u_NF = (torch.empty_like(a_NF) if needed and save else a_NF.new_empty(0) for needed in (pre, gated))
    launch(
        forward._up_kernel,
        tile_map.shape[0] * cdiv(width_F, tiles.up.columns),
        tiles.up,
        x_ptr=x_RD,
        w1_ptr=weights.w1_LFD,
        b1_ptr=weights.b1_LF,
        w3_ptr=weights.w3_LFD,
        source_ptr=rows.source_N,
        a_ptr=a_NF,
        z_ptr=z_NF,
        u_ptr=u_NF,
        ACTIVATION=activation,
        GATED=gated,
        SAVE=save,
        **shared,
        **_dropout(dropout),
        **_blocks(tiles.up),
    )
    y_ND = _product(a_NF, weights.w2_LFD, tiles.down, shared, bias_LD=weights.b2_LD)
    return y_ND, Saved(z_NF if pre else a_NF, u_NF, a_NF.new_empty(0), tile_map if save else tile_map.new_empty(0, 2))


def ffn_backward_triton(
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
    precision: str,
) -> FfnGradients:
    """Compute every gradient of the feed-forward.

    Args:
        dout: [N, D], gradient of y_ND; with weight_N [R, D], gradient of the weighted sum, read through the index.
        activation: a key of kernels.activations.ACTIVATIONS.
        weight_N: mixing weights, if the operation includes the weighted sum.
        dweight: whether to compute the gradient of weight_N.
    """
    pre = saves_pre(activation, gated=weights.w3_LFD is not None)
    tiles = _tiles(x_RD, weights, rows, precision, pre=pre)
    shared = _shared_arguments(weights, rows, saved.tile_map, precision)
    hidden = _hidden_gradients(
        dout,
        weights,
        rows,
        dropout,
        saved,
        shared,
        tiles.down_backward,
        activation=activation,
        weight_N=weight_N,
        dweight=dweight,
    )
    dweight_N = None
    if hidden.partial is not None:
        dweight_N = _dweight(hidden.partial, dout, weights, rows, saved.tile_map, tiles.down_backward.rows)
    dx_ND = _product(hidden.dz_NF, weights.w1_LFD, tiles.up_backward, shared, second=(hidden.du_NF, weights.w3_LFD))
    gather = weight_N is not None
    dw2, _, db2 = _weights_gradient(
        hidden.ga_NF,
        None,
        dout,
        weights,
        rows,
        tiles.weights,
        precision,
        weight_N=weight_N,
        bias="right",
        gather=gather,
    )
    tile = tiles.weights if weights.w3_LFD is None else tiles.weights_pair
    dw1, dw3, db1 = _weights_gradient(hidden.dz_NF, hidden.du_NF, x_RD, weights, rows, tile, precision, bias="left")
    dx_RD = combine_triton(dx_ND, None, rows)
    return FfnGradients(dx_RD, ExpertWeights(dw1, db1, dw2, db2, dw3), dweight_N)


class _HiddenGradients(NamedTuple):
    """The results of _down_backward_kernel."""

    dz_NF: Tensor  # gradient of the pre-activation
    du_NF: Tensor | None  # gradient of the gate's input
    ga_NF: Tensor  # hidden units times the mixing weights
    partial: Tensor | None  # fp32: partial sums of the mixing weights' gradient


def _hidden_gradients(
    dout: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    dropout: Dropout | None,
    saved: Saved,
    shared: dict[str, Any],
    tile: Tile,
    *,
    activation: str,
    weight_N: Tensor | None,
    dweight: bool,
) -> _HiddenGradients:
    """Compute the gradients of the hidden units."""
    gated, weighted = weights.w3_LFD is not None, weight_N is not None
    columns = cdiv(shared["F"], tile.columns)
    dz_NF = torch.empty_like(saved.hidden_NF)
    du_NF = torch.empty_like(dz_NF) if gated else None
    made = weighted or saves_pre(activation, gated=gated)
    ga_NF = torch.empty_like(dz_NF) if made else saved.hidden_NF
    partial = dz_NF.new_empty(rows.num_rows, columns, dtype=torch.float32) if dweight else None
    launch(
        backward._down_backward_kernel,
        shared["num_tiles"] * columns,
        tile,
        dout_ptr=dout,
        w2_ptr=weights.w2_LFD,
        weight_ptr=weight_N,
        source_ptr=rows.source_N,
        hidden_ptr=saved.hidden_NF,
        u_ptr=saved.gate_NF,
        dz_ptr=dz_NF,
        du_ptr=du_NF,
        ga_ptr=ga_NF,
        partial_ptr=partial,
        ACTIVATION=activation,
        GATED=gated,
        GATHER=weighted,
        WEIGHTED=weighted,
        DWEIGHT=dweight,
        **shared,
        **_dropout(dropout),
        **_blocks(tile),
    )
    return _HiddenGradients(dz_NF, du_NF, ga_NF, partial)


def _product(
    a_NF: Tensor,
    w_LFD: Tensor,
    tile: Tile,
    shared: dict[str, Any],
    *,
    second: tuple[Tensor | None, Tensor | None] = (None, None),
    bias_LD: Tensor | None = None,
) -> Tensor:
    """Compute y[n] = a[n] w[e], plus a second such product and a bias if they are given; return y_ND."""
    y_ND = a_NF.new_empty(a_NF.shape[0], shared["D"])
    launch(
        forward._down_kernel,
        shared["num_tiles"] * cdiv(shared["D"], tile.columns),
        tile,
        a_ptr=a_NF,
        w_ptr=w_LFD,
        a2_ptr=second[0],
        w2_ptr=second[1],
        b_ptr=bias_LD,
        y_ptr=y_ND,
        BIAS=bias_LD is not None,
        SECOND=second[0] is not None,
        **shared,
        **_blocks(tile),
    )
    return y_ND


def _weights_gradient(
    left_NF: Tensor,
    left2_NF: Tensor | None,
    right: Tensor,
    weights: ExpertWeights,
    rows: ExpertRows,
    tile: Tile,
    precision: str,
    *,
    bias: str,
    gather: bool = True,
    weight_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute the gradients [L, F, D] of a weight matrix and of one with the same right operand, and of the bias."""
    num_experts, width_F, width_D = weights.w1_LFD.shape
    dw_LFD = torch.empty_like(weights.w1_LFD)
    dw2_LFD = None if left2_NF is None else torch.empty_like(dw_LFD)
    db = torch.empty_like(weights.b1_LF if bias == "left" else weights.b2_LD)
    programs = num_experts * cdiv(width_F, tile.rows) * cdiv(width_D, tile.columns)
    launch(
        backward._weights_kernel,
        programs,
        tile,
        left_ptr=left_NF,
        left2_ptr=left2_NF,
        right_ptr=right,
        source_ptr=rows.source_N,
        weight_ptr=weight_N,
        offset_ptr=rows.offset_L,
        dw_ptr=dw_LFD,
        dw2_ptr=dw2_LFD,
        db_ptr=db,
        D=width_D,
        F=width_F,
        GATHER=gather,
        WEIGHTED=weight_N is not None,
        BIAS=bias,
        PAIR=left2_NF is not None,
        PRECISION=precision,
        BLOCK_F=tile.rows,
        BLOCK_D=tile.columns,
        BLOCK_M=tile.depth,
    )
    return dw_LFD, dw2_LFD, db


def _dweight(
    partial: Tensor, dout_RD: Tensor, weights: ExpertWeights, rows: ExpertRows, tile_map: Tensor, block: int
) -> Tensor:
    """Compute the mixing weights' gradient from its partial sums."""
    width_D, columns = dout_RD.shape[1], partial.shape[1]
    dweight_N = partial.new_empty(rows.num_rows)
    block_c = power_of_two(columns, least=1)
    launch(
        backward._dweight_kernel,
        tile_map.shape[0],
        Tile(block, block_c, 1, 4, 1),
        partial_ptr=partial,
        dout_ptr=dout_RD,
        b2_ptr=weights.b2_LD,
        source_ptr=rows.source_N,
        offset_ptr=rows.offset_L,
        tile_ptr=tile_map,
        dweight_ptr=dweight_N,
        D=width_D,
        COLUMNS=columns,
        BLOCK_M=block,
        BLOCK_C=block_c,
        BLOCK_D=min(64, power_of_two(width_D, least=1)),
    )
    return dweight_N


def num_row_tiles(rows: ExpertRows, block: int) -> int:
    """Return an upper bound on the number of tiles of expert rows, without reading the counts.

    Each expert has at most one tile that is not full, so there are at most N // block + min(N, L).
    """
    return rows.num_rows // block + min(rows.num_rows, rows.num_experts)


def _tile_map(rows: ExpertRows, block: int) -> Tensor:
    """List the tiles of expert rows."""
    num_tiles = num_row_tiles(rows, block)
    tile_map = rows.offset_L.new_empty(num_tiles, 2)
    if num_tiles:
        launch(
            forward._tile_map_kernel,
            rows.num_experts,
            Tile(block, 1, 1, 1, 1),
            offset_ptr=rows.offset_L,
            tile_ptr=tile_map,
            num_tiles=num_tiles,
            EXPERTS=rows.num_experts,
            BLOCK_E=max(32, power_of_two(rows.num_experts)),
            BLOCK_M=block,
        )
    return tile_map


def _tiles(x_RD: Tensor, weights: ExpertWeights, rows: ExpertRows, precision: str, *, pre: bool) -> Tiles:
    return ffn_tiles(
        arch_of(x_RD),
        x_RD.dtype,
        precision,
        gated=weights.w3_LFD is not None,
        rows=rows.num_rows,
        experts=rows.num_experts,
        width=x_RD.shape[1],
        hidden=weights.w1_LFD.shape[1],
        pre=pre,
    )


def _shared_arguments(weights: ExpertWeights, rows: ExpertRows, tile_map: Tensor, precision: str) -> dict[str, Any]:
    """Return the arguments that all products over tiles of expert rows have in common."""
    width_F, width_D = weights.w1_LFD.shape[1:]
    return {
        "offset_ptr": rows.offset_L,
        "tile_ptr": tile_map,
        "num_tiles": tile_map.shape[0],
        "PRECISION": precision,
        "D": width_D,
        "F": width_F,
    }


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}


def _dropout(dropout: Dropout | None) -> dict[str, Any]:
    if dropout is None:
        return NO_DROPOUT
    return {
        "token_ptr": dropout.token_R,
        "seed_ptr": dropout.words(),
        "first_expert": dropout.first_expert,
        "threshold": dropout.threshold,
        "keep_scale": dropout.scale,
        "DROPOUT": True,
    }


NO_DROPOUT = {
    "token_ptr": None,
    "seed_ptr": None,
    "first_expert": 0,
    "threshold": 0,
    "keep_scale": 1.0,
    "DROPOUT": False,
}
