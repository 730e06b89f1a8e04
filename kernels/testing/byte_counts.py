"""Access lists: the bytes that each launch of a kernel reads and writes, by argument.

`distinct` counts every byte once, as with perfect caches; `total` counts the requests of all programs, tile by tile.
Both assume that every token row is chosen and every expert has expert rows, which is the maximum. Tests compare them
with the addresses that the kernels access in Triton's interpreter. The static gate
(benchmarks/kernels_static/program.py) sums them for model shapes and compares the sums with the minimum.

Letters: N expert rows, L experts, D width, F expert hidden width; s bytes of a number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from foreroute.kernels.activations import saves_pre
from foreroute.kernels.launching import Launch

_INDEX = 8  # bytes of a row index or a token number
_COUNT = 4  # bytes of an entry of offset_L, of a tile map and of a mixing weight


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes of one kernel argument that one launch reads and writes."""

    argument: str
    read_bytes_distinct: int = 0
    read_bytes_total: int = 0
    written_bytes: int = 0  # every byte written is written once


def accesses(launch: Launch, *, row_tiles: int | None = None) -> list[Access]:
    """List the accesses of a launch.

    Args:
        row_tiles: number of tiles that hold expert rows; by default the upper bound for which programs are launched.

    Raises:
        ValueError: the kernel has no access list.
    """
    rule = _RULES.get(launch.name)
    if rule is None:
        raise ValueError(f"{launch.name} has no access list: must be one of {', '.join(_RULES)}")
    listed = rule(_Arguments(launch, row_tiles))
    return [access for access in listed if access.read_bytes_total or access.written_bytes]


class _Arguments:
    """A launch's arguments by short names, and the terms common to all matrix products."""

    def __init__(self, launch: Launch, row_tiles: int | None) -> None:
        self.values = launch.arguments
        self.programs = launch.programs
        self.width, self.hidden = self.values.get("D", 0), self.values.get("F", 0)
        bound = self.values.get("num_tiles", self.programs)
        self.tiles: int = bound if row_tiles is None else row_tiles
        self.tile_bound: int = bound

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def bytes(self, name: str) -> int:
        """Return the size of a tensor argument, 0 if there is none."""
        value = self.values[f"{name}_ptr"]
        return value.numel() * value.element_size() if isinstance(value, Tensor) else 0

    def item(self, name: str) -> int:
        """Return the size of one number of a tensor argument, 0 if there is none."""
        value = self.values[f"{name}_ptr"]
        return value.element_size() if isinstance(value, Tensor) else 0

    def rows(self, name: str) -> int:
        """Return the first size of a tensor argument."""
        return int(self.values[f"{name}_ptr"].shape[0])

    def whole(self, name: str, times: int = 1) -> Access:
        """Return the access that reads a whole tensor, `times` times."""
        return Access(f"{name}_ptr", self.bytes(name), times * self.bytes(name))

    def write(self, name: str) -> Access:
        """Return the access that writes a whole tensor."""
        return Access(f"{name}_ptr", written_bytes=self.bytes(name))

    def weight(self, name: str) -> Access:
        """Return the access that reads the matrices [L, F, D] of a product, one matrix per tile of expert rows."""
        total = self.tiles * self.hidden * self.width * self.item(name)
        return Access(f"{name}_ptr", self.bytes(name), total)

    def row_map(self, columns: int) -> list[Access]:
        """Return the accesses that read the tile map and the end of the expert's rows once per program."""
        return [
            Access("tile_ptr", self.bytes("tile"), columns * self.bytes("tile")),
            Access("offset_ptr", self.bytes("offset"), columns * self.tile_bound * _COUNT),
        ]


def _tile_map(a: _Arguments) -> list[Access]:
    experts = a.programs
    return [Access("offset_ptr", _COUNT * experts, _COUNT * experts * (2 * experts - 1)), a.write("tile")]


def _up(a: _Arguments) -> list[Access]:
    columns = triton.cdiv(a.hidden, a["BLOCK_N"])
    row_reads = columns * a.rows("a") * _INDEX
    tile_rows = a.tiles * a["BLOCK_M"] * a.width * a.item("x")
    return [
        *a.row_map(columns),
        Access("source_ptr", a.bytes("source"), row_reads),
        Access("token_ptr", a.bytes("token"), row_reads if a["DROPOUT"] else 0),
        Access("seed_ptr", a.bytes("seed"), columns * a.tiles * a.bytes("seed") if a["DROPOUT"] else 0),
        Access("x_ptr", a.bytes("x"), columns * tile_rows),
        a.weight("w1"),
        a.weight("w3"),
        Access("b1_ptr", a.bytes("b1"), a.tiles * a.hidden * a.item("b1")),
        *(a.write(name) for name in ("a", "z", "u")),
    ]


def _down(a: _Arguments) -> list[Access]:
    columns = triton.cdiv(a.width, a["BLOCK_N"])
    tile_rows = columns * a.tiles * a["BLOCK_M"] * a.hidden
    return [
        *a.row_map(columns),
        Access("a_ptr", a.bytes("a"), tile_rows * a.item("a")),
        Access("a2_ptr", a.bytes("a2"), tile_rows * a.item("a2")),
        a.weight("w"),
        a.weight("w2"),
        Access("b_ptr", a.bytes("b"), a.tiles * a.width * a.item("b")),
        a.write("y"),
    ]


def _down_backward(a: _Arguments) -> list[Access]:
    columns = triton.cdiv(a.hidden, a["BLOCK_N"])
    row_reads = columns * a.rows("hidden")
    pre = saves_pre(a["ACTIVATION"], gated=a["GATED"])
    masked_again = pre and a["DROPOUT"]
    source_reads = row_reads * _INDEX * (a["GATHER"] + masked_again)
    tile_rows = a.tiles * a["BLOCK_M"] * a.width * a.item("dout")
    return [
        *a.row_map(columns),
        Access("source_ptr", a.bytes("source") if source_reads else 0, source_reads),
        Access("token_ptr", a.bytes("token"), row_reads * _INDEX if masked_again else 0),
        Access("seed_ptr", a.bytes("seed"), columns * a.tiles * a.bytes("seed") if masked_again else 0),
        Access("dout_ptr", a.bytes("dout"), columns * tile_rows),
        a.weight("w2"),
        Access("weight_ptr", a.bytes("weight"), row_reads * _COUNT if a["WEIGHTED"] else 0),
        a.whole("hidden"),
        a.whole("u"),
        *(a.write(name) for name in ("dz", "du", "partial")),
        *([a.write("ga")] if a["WEIGHTED"] or pre else []),
    ]


def _dweight(a: _Arguments) -> list[Access]:
    rows = a.rows("dweight")
    return [
        *a.row_map(1),
        a.whole("partial"),
        a.whole("source"),
        Access("dout_ptr", a.bytes("dout"), rows * a.width * a.item("dout")),
        Access("b2_ptr", a.bytes("b2"), a.tiles * a.width * a.item("b2")),
        a.write("dweight"),
    ]


def _weights(a: _Arguments) -> list[Access]:
    columns = triton.cdiv(a.width, a["BLOCK_D"])
    blocks = triton.cdiv(a.hidden, a["BLOCK_F"])
    rows, experts = a.rows("left"), a.rows("offset")
    weight_reads = columns * rows * _COUNT if a["WEIGHTED"] and a["BIAS"] == "right" else 0
    offset_reads = columns * blocks * (2 * experts - 1) * _COUNT
    return [
        Access("offset_ptr", a.bytes("offset"), offset_reads),
        *([a.whole("source", columns * blocks)] if a["GATHER"] else []),
        a.whole("left", columns),
        a.whole("left2", columns),
        Access("right_ptr", a.bytes("right"), blocks * rows * a.width * a.item("right")),
        Access("weight_ptr", a.bytes("weight"), weight_reads),
        *(a.write(name) for name in ("dw", "dw2", "db")),
    ]


def _combine(a: _Arguments) -> list[Access]:
    blocks = triton.cdiv(a.width, a["BLOCK_D"])
    rows = a.rows("out")
    return [
        Access("slot_offset_ptr", _INDEX * rows, blocks * (2 * rows - 1) * _INDEX),
        a.whole("slot", blocks),
        Access("y_ptr", a.bytes("y"), a.rows("slot") * a.width * a.item("y")),
        a.whole("weight", blocks),
        a.write("out"),
    ]


def _combine_backward(a: _Arguments) -> list[Access]:
    return [
        a.whole("source"),
        Access("dout_ptr", a.bytes("dout"), a.rows("dy") * a.width * a.item("dout")),
        a.whole("y"),
        a.whole("weight"),
        a.write("dy"),
        a.write("dweight"),
    ]


def _permute(a: _Arguments) -> list[Access]:
    moved = a.rows("index") * a.width
    blocks = triton.cdiv(a.width, a["BLOCK_D"])
    return [
        a.whole("index", blocks),
        Access("x_ptr", min(a.bytes("x"), moved * a.item("x")), moved * a.item("x")),
        Access("out_ptr", written_bytes=moved * a.item("out")),
    ]


_RULES: dict[str, Callable[[_Arguments], list[Access]]] = {
    "_tile_map_kernel": _tile_map,
    "_up_kernel": _up,
    "_down_kernel": _down,
    "_down_backward_kernel": _down_backward,
    "_dweight_kernel": _dweight,
    "_weights_kernel": _weights,
    "_combine_kernel": _combine,
    "_combine_backward_kernel": _combine_backward,
    "_permute_kernel": _permute,
}
