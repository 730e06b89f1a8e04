"""The tile sizes of every Triton product: an explicit table keyed by architecture, arithmetic, widths and rows.

No autotuning: the same call always runs the same code, and importing measures nothing. The sizes were chosen from what
the compiler reports (benchmarks/kernels_static.py: no spills, shared memory within the chip, tensor-core instructions,
128-bit accesses); none was timed on a GPU yet.

Letters: M rows, D width, F expert hidden width.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """Output rows x output columns x contraction step of one program, and how it is executed."""

    rows: int
    columns: int
    depth: int
    num_warps: int = 4
    num_stages: int = 3


class Tiles(NamedTuple):
    """Tiles of the products of an expert feed-forward; the first four share their number of rows."""

    up: Tile  # [M, D] x [D, F]: first product (and the gate's)
    down: Tile  # [M, F] x [F, D]: second product
    down_backward: Tile  # [M, D] x [D, F]: gradient of the hidden units
    up_backward: Tile  # [M, F] x [F, D]: gradient of the input rows
    weights: Tile  # [F, M] x [M, D]: gradient of a weight matrix
    weights_pair: Tile  # the same for w1 and w3 at once, which share the right side


FEW_ROWS = 64  # rows per expert below which small tiles waste less

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def _square(tile: Tile, gated: Tile, weights: Tile) -> dict[bool, Tiles]:
    """Use one tile for the plain products and another where a program holds two accumulators or more operands."""
    pair = replace(weights, columns=weights.columns // 2)
    return {
        False: Tiles(tile, tile, tile, tile, weights, pair),
        True: Tiles(gated, tile, gated, tile, weights, pair),
    }


_HALF_MANY = _square(Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(128, 128, 32, 8, 3))
_HALF_FEW = _square(Tile(32, 128, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(128, 128, 32, 8, 3))
_TF32_MANY = _square(Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 128, 32, 8, 2))
_TF32_FEW = _square(Tile(32, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3), Tile(64, 64, 32, 4, 2))
_IEEE = _square(Tile(64, 64, 16, 8, 2), Tile(64, 32, 16, 8, 2), Tile(64, 64, 16, 8, 2))
_AMD_HALF_MANY = _square(
    Tile(128, 128, 64, 8, 2), Tile(128, 64, 64, 8, 2), Tile(128, 128, 32, 8, 2)
)
_AMD_HALF_FEW = _square(Tile(32, 128, 64, 4, 2), Tile(32, 64, 64, 4, 2), Tile(128, 128, 32, 8, 2))
_INTERPRETER = _square(Tile(16, 32, 16, 1, 1), Tile(16, 16, 32, 1, 1), Tile(16, 32, 16, 1, 1))

# (family, arithmetic, few rows per expert)
_TABLE: dict[tuple[str, str, bool], dict[bool, Tiles]] = {
    ("nvidia", "half", False): _HALF_MANY,
    ("nvidia", "half", True): _HALF_FEW,
    ("nvidia", "tf32", False): _TF32_MANY,
    ("nvidia", "tf32", True): _TF32_FEW,
    ("nvidia", "ieee", False): _IEEE,
    ("nvidia", "ieee", True): _IEEE,
    ("amd", "half", False): _AMD_HALF_MANY,
    ("amd", "half", True): _AMD_HALF_FEW,
    ("amd", "tf32", False): _IEEE,
    ("amd", "tf32", True): _IEEE,
    ("amd", "ieee", False): _IEEE,
    ("amd", "ieee", True): _IEEE,
}


def ffn_tiles(
    arch: str, dtype: torch.dtype, precision: str, *, gated: bool, rows: int, experts: int, width: int, hidden: int
) -> Tiles:  # fmt: skip
    """Look up the tiles of an expert feed-forward, narrowed to its widths.

    Args:
        arch: as kernels.launching.arch_of names it. Unknown ones use the entries of their maker.
        precision: "ieee" or "tf32", how fp32 operands are multiplied.
        rows: expert rows of all experts together.
    """
    if arch == "interpreter":
        found = _INTERPRETER[gated]
    else:
        arithmetic = precision if dtype == torch.float32 else "half"
        few = rows < FEW_ROWS * max(experts, 1)
        family = "amd" if arch.startswith("gfx") else "nvidia"
        found = _TABLE[family, arithmetic, few][gated]
    wide, deep = (
        lambda t: _narrowed(t, columns=hidden, depth=width),
        lambda t: _narrowed(t, columns=width, depth=hidden),
    )
    return Tiles(
        wide(found.up),
        deep(found.down),
        wide(found.down_backward),
        deep(found.up_backward),
        *(
            replace(
                tile,
                rows=min(tile.rows, _power_of_two(hidden)),
                columns=min(tile.columns, _power_of_two(width)),
            )
            for tile in (found.weights, found.weights_pair)
        ),
    )


def row_tile(columns: int, item_bytes: int) -> Tile:
    """Tile of a kernel that moves whole rows: one row a program, 16 bytes or more a thread."""
    block = min(_power_of_two(columns), 4096 // item_bytes)
    warps = max(1, min(4, block * item_bytes // (32 * 16)))
    return Tile(1, block, 1, warps, 1)


def _narrowed(tile: Tile, *, columns: int, depth: int) -> Tile:
    return replace(
        tile,
        columns=min(tile.columns, _power_of_two(columns)),
        depth=min(tile.depth, _power_of_two(depth)),
    )


def _power_of_two(width: int) -> int:
    """Smallest power of two that holds width; tensor cores want at least 16."""
    return max(16, 1 << max(width - 1, 0).bit_length())
