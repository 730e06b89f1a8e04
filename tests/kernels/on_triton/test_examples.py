"""The worked examples of the kernels' docstrings, one kernel launched alone."""

import torch

from foreroute.kernels.gpu import combine_permute_kernels as rows
from foreroute.kernels.gpu import expert_ffn_backward_kernels as backward
from foreroute.kernels.gpu import expert_ffn_forward_kernels as ffn
from foreroute.kernels.gpu.expert_ffn import NO_DROPOUT
from foreroute.kernels.launching import launch
from foreroute.kernels.tiles import Tile

SMALL = Tile(16, 16, 16, 1, 1)
BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}


def tensors(device, **values):
    """Floats as fp32, indices as their kernels want them."""
    kinds = {"offset_ptr": torch.int32, "tile_ptr": torch.int32}
    kinds |= dict.fromkeys(("source_ptr", "slot_ptr", "slot_offset_ptr", "index_ptr"), torch.int64)
    return {
        name: None if value is None else torch.tensor(value, dtype=kinds.get(name, torch.float32), device=device)
        for name, value in values.items()
    }


def tile_map(offset, device, num_tiles):
    offset = torch.tensor(offset, dtype=torch.int32, device=device)
    tiles = torch.empty(num_tiles, 2, dtype=torch.int32, device=device)
    launch(
        ffn._tile_map_kernel,
        offset.numel(),
        SMALL,
        offset_ptr=offset,
        tile_ptr=tiles,
        num_tiles=num_tiles,
        EXPERTS=offset.numel(),
        BLOCK_E=4,
        BLOCK_M=16,
    )
    return {"offset_ptr": offset, "tile_ptr": tiles, "num_tiles": num_tiles}


def test_tile_map(device):
    tiles = tile_map([20, 20, 23], device, 7)["tile_ptr"]
    assert tiles.tolist() == [[0, 0], [0, 16], [2, 20]] + [[-1, 0]] * 4


def test_up(device):
    shared = tile_map([1, 3], device, 2)
    a = torch.empty(3, 1, device=device)
    operands = tensors(
        device, x_ptr=[[1, 2], [3, 4]], w1_ptr=[[[1, 1]], [[1, -1]]], b1_ptr=[[10], [20]], source_ptr=[1, 0, 1]
    )
    launch(
        ffn._up_kernel,
        2,
        SMALL,
        **operands,
        **shared,
        **NO_DROPOUT,
        **BLOCKS,
        a_ptr=a,
        w3_ptr=None,
        z_ptr=None,
        u_ptr=None,
        D=2,
        F=1,
        ACTIVATION="relu",
        GATED=False,
        SAVE=True,
        PRECISION="ieee",
    )
    assert a.tolist() == [[17], [19], [19]]


def test_down(device):
    shared = tile_map([1, 2], device, 2)
    y = torch.empty(2, 2, device=device)
    operands = tensors(device, a_ptr=[[2], [3]], w_ptr=[[[1, 10]], [[2, 20]]], b_ptr=[[0, 1], [0, 5]])
    launch(
        ffn._down_kernel,
        2,
        SMALL,
        **operands,
        **shared,
        **BLOCKS,
        y_ptr=y,
        a2_ptr=None,
        w2_ptr=None,
        D=2,
        F=1,
        BIAS=True,
        SECOND=False,
        PRECISION="ieee",
    )
    assert y.tolist() == [[2, 21], [6, 65]]


def test_down_backward(device):
    shared = tile_map([1], device, 1)
    dz, ga, partial = (torch.empty(1, n, device=device) for n in (2, 2, 1))
    operands = tensors(
        device, dout_ptr=[[1, 2]], w2_ptr=[[[3, 4], [5, 6]]], weight_ptr=[0.5], source_ptr=[0], hidden_ptr=[[0, 7]]
    )
    launch(
        backward._down_backward_kernel,
        1,
        SMALL,
        **operands,
        **shared,
        **NO_DROPOUT,
        **BLOCKS,
        u_ptr=None,
        dz_ptr=dz,
        du_ptr=None,
        ga_ptr=ga,
        partial_ptr=partial,
        D=2,
        F=2,
        ACTIVATION="relu",
        GATED=False,
        GATHER=True,
        WEIGHTED=True,
        DWEIGHT=True,
        PRECISION="ieee",
    )
    assert dz.tolist() == [[0, 8.5]] and ga.tolist() == [[0, 3.5]] and partial.tolist() == [[119]]


def test_weights(device):
    dw, db = torch.empty(2, 1, 2, device=device), torch.empty(2, 1, device=device)
    operands = tensors(
        device, left_ptr=[[1], [2], [3]], right_ptr=[[10, 20], [30, 40]], source_ptr=[1, 0, 1], offset_ptr=[1, 3]
    )
    launch(
        backward._weights_kernel,
        2,
        SMALL,
        **operands,
        left2_ptr=None,
        weight_ptr=None,
        dw_ptr=dw,
        dw2_ptr=None,
        db_ptr=db,
        D=2,
        F=1,
        GATHER=True,
        WEIGHTED=False,
        BIAS="left",
        PAIR=False,
        PRECISION="ieee",
        BLOCK_F=16,
        BLOCK_D=16,
        BLOCK_M=16,
    )
    assert dw.tolist() == [[[30, 40]], [[110, 160]]] and db.tolist() == [[1], [5]]


def test_combine(device):
    out = torch.empty(2, 2, device=device)
    operands = tensors(
        device, y_ptr=[[1, 2], [10, 20], [100, 200]], weight_ptr=[1, 2, 3], slot_ptr=[2, 0, 1], slot_offset_ptr=[0, 2]
    )
    launch(
        rows._combine_kernel,
        2,
        SMALL,
        **operands,
        out_ptr=out,
        num_inputs=2,
        num_slots=3,
        D=2,
        WEIGHTED=True,
        BLOCK_D=16,
    )
    assert out.tolist() == [[301, 602], [20, 40]]


def test_combine_backward(device):
    dy, dweight = torch.empty(2, 2, device=device), torch.empty(2, device=device)
    operands = tensors(device, dout_ptr=[[1, 2], [3, 4]], y_ptr=[[5, 6], [7, 8]], weight_ptr=[2, 10], source_ptr=[1, 0])
    launch(
        rows._combine_backward_kernel,
        2,
        SMALL,
        **operands,
        dy_ptr=dy,
        dweight_ptr=dweight,
        D=2,
        WEIGHTED=True,
        DWEIGHT=True,
        BLOCK_D=16,
    )
    assert dy.tolist() == [[6, 8], [10, 20]] and dweight.tolist() == [39, 23]


def test_permute(device):
    out = torch.empty(3, 2, device=device)
    operands = tensors(device, x_ptr=[[1, 2], [3, 4], [5, 6]], index_ptr=[2, 0, 2])
    launch(rows._permute_kernel, 3, SMALL, **operands, out_ptr=out, D=2, SCATTER=False, BLOCK_D=16)
    assert out.tolist() == [[5, 6], [1, 2], [5, 6]]
    out = torch.empty(2, 2, device=device)
    operands = tensors(device, x_ptr=[[1, 2], [3, 4]], index_ptr=[1, 0])
    launch(rows._permute_kernel, 2, SMALL, **operands, out_ptr=out, D=2, SCATTER=True, BLOCK_D=16)
    assert out.tolist() == [[3, 4], [1, 2]]
