"""The table of tile sizes: what Triton can compile, and which entry a call gets."""

from dataclasses import astuple

import pytest
import torch

from foreroute.kernels import tiles
from foreroute.kernels.tiles import Tile, ffn_tiles, row_tile

ENTRIES = {
    f"{arch}-{arithmetic}-{'few' if few else 'many'}-{'gated' if gated else 'plain'}": entry.tiles(gated=gated)
    for arch, row in {**tiles._TABLE, "interpreter": {"any": (tiles._INTERPRETER,) * 2}}.items()
    for arithmetic, pair in row.items()
    for few, entry in enumerate(pair)
    for gated in (False, True)
}


def find(arch="sm_80", dtype=torch.bfloat16, *, precision="ieee", gated=False, rows=10**6, experts=4, **more):
    sizes = {"width": 512, "hidden": 512} | more
    return ffn_tiles(arch, dtype, precision, gated=gated, rows=rows, experts=experts, **sizes)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_can_be_compiled(name):
    """Triton wants powers of two, tensor cores 16 or more along each side."""
    entry = ENTRIES[name]
    for tile in entry:
        assert {size & (size - 1) for size in (tile.rows, tile.columns, tile.depth, tile.num_warps)} == {0}
        assert min(tile.rows, tile.columns, tile.depth) >= 16
        assert max(tile.rows, tile.columns) <= 128 and tile.depth <= 64
        assert 1 <= tile.num_warps <= 8 and 1 <= tile.num_stages <= 3
    # one map of row tiles serves the four products over expert rows
    assert len({tile.rows for tile in entry[:4]}) == 1


@pytest.mark.parametrize("arch", tiles._TABLE)
def test_activations_that_need_more_registers_get_narrower_tiles(arch):
    plain, gated = find(arch), find(arch, gated=True)
    assert plain != gated and find(arch, gated=True, pre=True) == gated
    assert find(arch, pre=True) == (gated if arch == "sm_100" else plain)
    for precision in ("ieee", "tf32"):
        assert find(arch, torch.float32, precision=precision, pre=True) == find(
            arch, torch.float32, precision=precision
        )


def test_few_rows_get_low_tiles():
    """Below 64 rows an expert; without experts as with one."""
    for experts, least in ((4, 256), (1, 64), (0, 64)):
        assert find(rows=least - 1, experts=experts).up.rows == 32
        assert find(rows=least, experts=experts).up.rows == 128


@pytest.mark.parametrize(
    ("arch", "like"),
    [
        ("sm_75", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_120", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_100", "sm_100"),
        ("sm_103", "sm_100"),
        ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
    ],
)
def test_chips_without_entries_use_those_of_one_like_them(arch, like):
    for number, arithmetic in ((torch.bfloat16, "half"), (torch.float32, "tf32"), (torch.float32, "ieee")):
        for gated in (False, True):
            for few in (False, True):
                found = find(arch, number, precision=arithmetic, gated=gated, rows=1 if few else 10**6)
                assert found == tiles._TABLE[like][arithmetic][few].tiles(gated=gated)


def test_the_interpreter_has_tiles_of_its_own():
    for gated in (False, True):
        assert find("interpreter", torch.float32, gated=gated) == tiles._INTERPRETER.tiles(gated=gated)


def test_tiles_are_narrowed_to_the_widths():
    """Width 24 fits into 32, hidden width 70 into 128, 3 into 16; the other side is the tile's own."""
    wide = find(width=24, hidden=70)
    assert astuple(wide.up) == (128, 128, 32, 8, 3)  # [M, D] x [D, F]
    assert astuple(wide.down) == (128, 32, 64, 8, 3)  # [M, F] x [F, D]
    assert astuple(wide.down_backward) == (128, 64, 32, 8, 3)
    assert astuple(wide.up_backward) == (128, 32, 64, 8, 3)
    assert astuple(wide.weights) == (128, 32, 32, 8, 3)  # [F, M] x [M, D]
    assert astuple(wide.weights_pair) == (128, 32, 32, 8, 3)
    narrow = find(width=3, hidden=3)
    assert [(tile.columns, tile.depth) for tile in narrow[:4]] == [(16, 16)] * 4
    assert [(tile.rows, tile.columns) for tile in narrow[4:]] == [(16, 16)] * 2
    assert [tiles.power_of_two(width) for width in (0, 1, 16, 17, 32, 33)] == [16, 16, 16, 32, 32, 64]


def test_a_row_is_moved_by_16_bytes_a_thread():
    """32 threads a warp: 512 bytes each, 4 warps at most, 4 KiB a program."""
    assert row_tile(512, 4) == Tile(1, 512, 1, 4, 1)
    assert row_tile(300, 2) == Tile(1, 512, 1, 2, 1)
    assert row_tile(100, 2) == Tile(1, 128, 1, 1, 1)
    assert row_tile(8192, 4) == Tile(1, 1024, 1, 4, 1)
    assert row_tile(8192, 2) == Tile(1, 2048, 1, 4, 1)
