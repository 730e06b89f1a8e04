"""The tile sizes of every Triton matrix product: a table keyed by architecture, arithmetic, widths and expert rows.

No autotuning: the same call always runs the same code, and an import measures nothing. The sizes were chosen by the
compiler's reports (benchmarks/kernels_static/program.py: no spills, shared memory within the chip, tensor-core
instructions, 128-bit accesses). None was timed on a GPU yet.

Letters: M expert rows, D width, F expert hidden width.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """Output rows x output columns x contraction step of one program, and its launch options."""

    rows: int
    columns: int
    depth: int
    num_warps: int = 4
    num_stages: int = 3


class Tiles(NamedTuple):
    """Tiles of the matrix products of an expert feed-forward; the first four share their number of rows."""

    up: Tile  # [M, D] x [D, F]: first product (and the gate's)
    down: Tile  # [M, F] x [F, D]: second product
    down_backward: Tile  # [M, D] x [D, F]: gradient of the hidden units
    up_backward: Tile  # [M, F] x [F, D]: gradient of the token rows
    weights: Tile  # [F, M] x [M, D]: gradient of a weight matrix
    weights_pair: Tile  # the same for w1 and w3 at once, which share the right side


FEW_ROWS = 64  # expert rows per expert below which small tiles waste less


class Entry(NamedTuple):
    """One entry of the table: tiles for experts with and without a gate.

    All but the last two have the same number of rows. `down` also computes the gradient of the token rows.
    """

    up: Tile
    gated_up: Tile
    down: Tile
    backward: Tile
    gated_backward: Tile
    weights: Tile
    pair: Tile

    def tiles(self, *, gated: bool) -> Tiles:
        """Return the tiles for experts with or without a gate."""
        up, backward = (self.gated_up, self.gated_backward) if gated else (self.up, self.backward)
        return Tiles(up, self.down, backward, self.down, self.weights, self.pair)


# The gradient of the hidden units has the longest epilogue: wider tiles spill registers on sm_80 and sm_90.
_SM80_HALF = Entry(
    up=Tile(128, 128, 64, 8, 3),
    gated_up=Tile(128, 64, 64, 8, 3),
    down=Tile(128, 128, 64, 8, 3),
    backward=Tile(128, 64, 64, 8, 3),
    gated_backward=Tile(128, 32, 64, 8, 3),
    weights=Tile(128, 128, 32, 8, 3),
    pair=Tile(128, 64, 32, 8, 3),
)
_SM90_HALF = _SM80_HALF._replace(gated_backward=Tile(128, 64, 64, 8, 3))
_SM100_HALF = _SM90_HALF._replace(
    backward=Tile(128, 128, 64, 8, 3),
    pair=Tile(128, 64, 64, 8, 3),  # depth 32 spills one register
)
_HALF_FEW = Entry(
    up=Tile(32, 128, 64, 8, 3),
    gated_up=Tile(32, 64, 64, 8, 3),
    down=Tile(32, 128, 64, 8, 3),
    backward=Tile(32, 128, 64, 8, 3),
    gated_backward=Tile(32, 64, 64, 8, 3),
    weights=Tile(128, 128, 32, 8, 3),
    pair=Tile(128, 64, 64, 8, 3),
)
_SM80_TF32 = Entry(
    up=Tile(128, 128, 32, 8, 3),
    gated_up=Tile(128, 64, 32, 8, 3),
    down=Tile(128, 128, 32, 8, 3),
    backward=Tile(128, 64, 32, 8, 3),
    gated_backward=Tile(128, 32, 32, 8, 3),
    weights=Tile(128, 128, 32, 8, 2),
    pair=Tile(128, 64, 32, 8, 2),
)
# From sm_90 on, a product of 64 rows and 4 warps uses instructions that require fp32 operands contiguous along the
# contraction; other operands would be copied four bytes at a time. Two warps, or 32 rows, avoid these instructions.
_SM90_TF32 = Entry(
    up=Tile(64, 128, 32, 8, 3),
    gated_up=Tile(64, 64, 32, 4, 3),
    down=Tile(64, 64, 32, 2, 3),
    backward=Tile(64, 64, 32, 4, 3),
    gated_backward=Tile(64, 64, 32, 8, 3),
    weights=Tile(32, 128, 32, 4, 3),
    pair=Tile(32, 128, 32, 4, 2),
)
_TF32_FEW = Entry(
    up=Tile(32, 64, 32, 4, 3),
    gated_up=Tile(32, 64, 32, 4, 3),
    down=Tile(32, 64, 32, 4, 3),
    backward=Tile(32, 64, 32, 4, 3),
    gated_backward=Tile(32, 64, 32, 4, 3),
    weights=Tile(32, 128, 32, 4, 3),
    pair=Tile(32, 128, 32, 4, 2),
)
_IEEE = Entry(Tile(64, 64, 16, 4, 2), *[Tile(64, 64, 16, 8, 3)] * 6)
_AMD_HALF_MANY = Entry(
    up=Tile(128, 128, 64, 8, 2),
    gated_up=Tile(128, 64, 64, 8, 2),
    down=Tile(128, 128, 64, 8, 2),
    backward=Tile(128, 128, 64, 8, 2),
    gated_backward=Tile(128, 64, 64, 8, 2),
    weights=Tile(128, 128, 32, 8, 2),
    pair=Tile(128, 64, 32, 8, 2),
)
_AMD_HALF_FEW = Entry(
    up=Tile(32, 128, 64, 4, 2),
    gated_up=Tile(32, 64, 64, 4, 2),
    down=Tile(32, 128, 64, 4, 2),
    backward=Tile(32, 128, 64, 4, 2),
    gated_backward=Tile(32, 64, 64, 4, 2),
    weights=Tile(128, 128, 32, 8, 2),
    pair=Tile(128, 64, 32, 8, 2),
)
_AMD_IEEE = Entry(*[Tile(64, 64, 16, 8, 2)] * 7)
_INTERPRETER = Entry(
    up=Tile(16, 32, 16, 1, 1),
    gated_up=Tile(16, 16, 32, 1, 1),
    down=Tile(16, 32, 16, 1, 1),
    backward=Tile(16, 32, 16, 1, 1),
    gated_backward=Tile(16, 16, 32, 1, 1),
    weights=Tile(16, 32, 16, 1, 1),
    pair=Tile(16, 16, 16, 1, 1),
)

# architecture, then arithmetic: many expert rows per expert, few expert rows per expert
_TABLE = {
    "sm_80": {"half": (_SM80_HALF, _HALF_FEW), "tf32": (_SM80_TF32, _TF32_FEW), "ieee": (_IEEE, _IEEE)},
    "sm_90": {"half": (_SM90_HALF, _HALF_FEW), "tf32": (_SM90_TF32, _TF32_FEW), "ieee": (_IEEE, _IEEE)},
    "sm_100": {"half": (_SM100_HALF, _HALF_FEW), "tf32": (_SM90_TF32, _TF32_FEW), "ieee": (_IEEE, _IEEE)},
    "gfx942": {"half": (_AMD_HALF_MANY, _AMD_HALF_FEW), "tf32": (_AMD_IEEE, _AMD_IEEE), "ieee": (_AMD_IEEE, _AMD_IEEE)},
}

# SiLU and GELU without a gate have the tiles of a gate here: in wider ones their epilogues spill.
_TILES_OF_A_GATE = {("sm_100", "half")}


def ffn_tiles(
    arch: str,
    dtype: torch.dtype,
    precision: str,
    *,
    gated: bool,
    rows: int,
    experts: int,
    width: int,
    hidden: int,
    pre: bool = False,
) -> Tiles:
    """Return the tiles of an expert feed-forward, narrowed to its widths.

    Args:
        arch: a name from kernels.launching.arch_of; an architecture without entries uses those of a similar chip.
        precision: "ieee" or "tf32", the arithmetic for fp32 operands.
        rows: number of expert rows of all experts together.
        pre: kernels.activations.saves_pre.
    """
    gated = gated or (pre and (_like(arch), _arithmetic(dtype, precision)) in _TILES_OF_A_GATE)
    return _ffn_tiles(arch, dtype, precision, gated, _few(rows, experts), width, hidden)


def row_block(arch: str, dtype: torch.dtype, precision: str, *, gated: bool, rows: int, experts: int) -> int:
    """Return the number of expert rows in a tile; arguments as for ffn_tiles."""
    return _entry(arch, dtype, precision, gated, _few(rows, experts)).up.rows


def _few(rows: int, experts: int) -> bool:
    return bool(rows < FEW_ROWS * max(experts, 1))


def _entry(arch: str, dtype: torch.dtype, precision: str, gated: bool, few: bool) -> Tiles:
    return entry_of(arch, _arithmetic(dtype, precision), few=few).tiles(gated=gated)


def _arithmetic(dtype: torch.dtype, precision: str) -> str:
    return precision if dtype == torch.float32 else "half"


@cache
def _ffn_tiles(arch: str, dtype: torch.dtype, precision: str, gated: bool, few: bool, width: int, hidden: int) -> Tiles:
    found = _entry(arch, dtype, precision, gated, few)
    wide = partial(_narrowed, columns=hidden, depth=width)
    deep = partial(_narrowed, columns=width, depth=hidden)
    return Tiles(
        wide(found.up),
        deep(found.down),
        wide(found.down_backward),
        deep(found.up_backward),
        *(
            replace(tile, rows=min(tile.rows, power_of_two(hidden)), columns=min(tile.columns, power_of_two(width)))
            for tile in (found.weights, found.weights_pair)
        ),
    )


def entry_of(arch: str, arithmetic: str, *, few: bool) -> Entry:
    """Look up an entry of the table.

    Args:
        arch: as for ffn_tiles.
        arithmetic: "half", "tf32" or "ieee".
        few: whether there are few expert rows per expert.
    """
    return _INTERPRETER if arch == "interpreter" else _TABLE[_like(arch)][arithmetic][few]


@cache
def row_tile(columns: int, item_bytes: int) -> Tile:
    """Return the tile of a kernel that moves whole rows: one row a program, 16 bytes or more a thread."""
    block = min(power_of_two(columns), 4096 // item_bytes)
    warps = max(1, min(4, block * item_bytes // (32 * 16)))
    return Tile(1, block, 1, warps, 1)


def _like(arch: str) -> str:
    """Return the architecture whose entries fit: a data centre chip's generation; sm_80 for all other NVIDIA chips."""
    if arch.startswith("gfx"):
        return "gfx942"
    if arch.startswith("sm_10"):
        return "sm_100"
    return "sm_90" if arch.startswith("sm_9") else "sm_80"


def _narrowed(tile: Tile, *, columns: int, depth: int) -> Tile:
    return replace(tile, columns=min(tile.columns, power_of_two(columns)), depth=min(tile.depth, power_of_two(depth)))


def power_of_two(width: int, least: int = 16) -> int:
    """Return the smallest power of two not below width; tensor cores need at least 16."""
    return max(least, 1 << max(width - 1, 0).bit_length())
