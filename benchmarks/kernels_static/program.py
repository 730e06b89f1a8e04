"""Compile every Triton kernel for four architectures and count the bytes it moves, all without a GPU.

The real launchers are driven with tensors on the meta device, so the compiled launches are those that a GPU would get:
every dtype and tile size, with and without gate, dropout and the mixing weights' gradient, ReLU and SwiGLU; other
activations with many rows, dropout and that gradient. Then the bytes that the launches of five named model shapes move
are counted, against the least that fused kernels must move. Nothing is timed.

`python -m benchmarks.kernels_static` compiles all, `--quick` the selection that the tests compile. The exit code is 1
if anything fails.
"""

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import positive, print_result, print_table
from benchmarks.kernels_static import aot
from foreroute.kernels import Dropout, ExpertRows, ExpertWeights
from foreroute.kernels.activations import ACTIVATIONS
from foreroute.kernels.gpu.combine_permute import (
    add_rows_triton,
    combine_backward_triton,
    combine_triton,
    copy_rows_triton,
)
from foreroute.kernels.gpu.expert_ffn import ffn_backward_triton, ffn_forward_triton
from foreroute.kernels.launching import Launch, recording
from foreroute.kernels.operands import resolve_activation
from foreroute.kernels.testing.byte_counts import accesses


class Shape(NamedTuple):
    """Sizes of an expert layer."""

    tokens: int
    width: int
    hidden: int
    experts: int
    active: int  # per token


MANY_ROWS = Shape(4096, 512, 1024, 16, 2)
FEW_ROWS = Shape(128, 512, 1024, 16, 2)
MODELS = {
    "small": Shape(4096, 512, 512, 16, 2),
    "mixtral": Shape(8192, 4096, 14336, 8, 2),
    "olmoe": Shape(16384, 2048, 1024, 64, 8),
    "qwen3-30b-a3b": Shape(16384, 2048, 768, 128, 8),
    "fine-grained": Shape(32768, 1536, 256, 128, 8),
}
ARITHMETIC = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One configuration of the expert layer."""

    shape: Shape
    arithmetic: str  # key of ARITHMETIC
    gated: bool
    dropout: bool = False
    dweight: bool = False  # the mixing weights want a gradient
    alone: bool = False  # expert_ffn without combine
    activation: str | None = None  # as for kernels.moe_ffn


class Build(NamedTuple):
    """One distinct compilation."""

    arch: str
    launch: Launch


class Result(NamedTuple):
    """The outcome of one compilation."""

    resources: aot.Resources | None  # None: it does not compile
    failures: list[str]


def empty(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Make a tensor without data."""
    return torch.empty(size, dtype=dtype, device="meta")


def empty_rows(shape: Shape) -> ExpertRows:
    """Make the expert rows of a shape, without data."""
    num_rows = shape.tokens * shape.active
    offset_L = empty(shape.experts, dtype=torch.int32)
    return ExpertRows(empty(num_rows), offset_L, empty(num_rows), empty(shape.tokens))


def empty_operands(shape: Shape, dtype: torch.dtype, gated: bool) -> tuple[Tensor, ExpertWeights]:
    """Make token rows and weights of a shape, without data."""
    tokens, width, hidden, experts, _ = shape
    w_LFD = empty(experts, hidden, width, dtype=dtype)
    b1_LF, b2_LD = (empty(experts, size, dtype=dtype) for size in (hidden, width))
    weights = ExpertWeights(w_LFD, b1_LF, w_LFD, b2_LD, w_LFD if gated else None)
    return empty(tokens, width, dtype=dtype), weights


def record_layer(layer: Layer, arch: str) -> tuple[list[Launch], list[Launch]]:
    """Record the launches of a layer's forward and backward pass on an architecture."""
    dtype, precision = ARITHMETIC[layer.arithmetic]
    rows = empty_rows(layer.shape)
    x_RD, weights = empty_operands(layer.shape, dtype, layer.gated)
    weight_N = None if layer.alone else empty(rows.num_rows, dtype=torch.float32)
    dropout = Dropout(0.1, 1, empty(layer.shape.tokens)) if layer.dropout else None
    options = {"activation": resolve_activation(layer.activation, weights), "precision": precision}
    with recording(run=False, arch=arch) as forward:
        y_ND, saved = ffn_forward_triton(x_RD, weights, rows, dropout, save=True, **options)
        if weight_N is not None:
            combine_triton(y_ND, weight_N, rows)
    with recording(run=False, arch=arch) as backward:
        ffn_backward_triton(
            y_ND if layer.alone else x_RD,
            x_RD,
            weights,
            rows,
            dropout,
            saved,
            weight_N=weight_N,
            dweight=layer.dweight,
            **options,
        )
    return forward.launches, backward.launches


def record_inference(layer: Layer, arch: str) -> list[Launch]:
    """Record the launches of a layer's forward pass that keeps nothing for backward."""
    dtype, precision = ARITHMETIC[layer.arithmetic]
    x_RD, weights = empty_operands(layer.shape, dtype, layer.gated)
    options = {"activation": resolve_activation(layer.activation, weights), "precision": precision}
    with recording(run=False, arch=arch) as forward:
        ffn_forward_triton(x_RD, weights, empty_rows(layer.shape), None, save=False, **options)
    return forward.launches


def record_rows(shape: Shape, dtype: torch.dtype, arch: str) -> list[Launch]:
    """Record the launches of the operations that move rows: combine, permute_rows, unpermute_rows, forward and
    backward."""
    rows, other = empty_rows(shape), torch.float32 if dtype != torch.float32 else torch.bfloat16
    x_RD, y_ND = (empty(shape.tokens, shape.width, dtype=dtype), empty(rows.num_rows, shape.width, dtype=dtype))
    weight_N = empty(rows.num_rows, dtype=torch.float32)
    with recording(run=False, arch=arch) as recorder:
        combine_triton(y_ND, weight_N, rows)
        combine_backward_triton(x_RD, y_ND, weight_N, rows)
        combine_backward_triton(x_RD, None, weight_N, rows)
        copy_rows_triton(x_RD, rows.source_N, y_ND, scatter=False)
        copy_rows_triton(x_RD, rows.source_N, y_ND.to(other), scatter=False)
        copy_rows_triton(y_ND, rows.source_N, x_RD, scatter=True)
        copy_rows_triton(y_ND, rows.source_N, x_RD.to(other), scatter=True)
        add_rows_triton(y_ND, rows.slot_N, rows.slot_offset_R, dtype)
        add_rows_triton(y_ND, rows.slot_N, rows.slot_offset_R, other)
    return recorder.launches


def quick_builds(arch: str) -> list[Build]:
    """Return one configuration of every kernel, plain and gated: bf16, many rows for each expert."""
    launches: list[Launch] = []
    for gated in (False, True):
        layer = Layer(MANY_ROWS, "bf16", gated, dropout=gated, dweight=gated)
        forward, backward = record_layer(layer, arch)
        launches += forward + backward
    return distinct([*launches, *record_rows(MANY_ROWS, torch.bfloat16, arch)[:4]], arch)


def full_builds(arch: str) -> list[Build]:
    """Return every configuration."""
    launches: list[Launch] = []
    for shape, arithmetic in itertools.product((MANY_ROWS, FEW_ROWS), ARITHMETIC):
        for gated, dropout in itertools.product((False, True), repeat=2):
            for dweight, alone in ((False, False), (True, False), (False, True)):
                layer = Layer(shape, arithmetic, gated, dropout, dweight, alone)
                launches += itertools.chain(*record_layer(layer, arch))
        launches += record_inference(Layer(shape, arithmetic, gated=True), arch)
        launches += record_rows(shape, ARITHMETIC[arithmetic][0], arch)
    for activation, arithmetic, gated in itertools.product(ACTIVATIONS, ARITHMETIC, (False, True)):
        layer = Layer(MANY_ROWS, arithmetic, gated, dropout=True, dweight=True, activation=activation)
        launches += itertools.chain(*record_layer(layer, arch))
    return distinct(launches, arch)


def distinct(launches: Iterable[Launch], arch: str) -> list[Build]:
    """Keep the first of the launches that compile to the same code."""
    first: dict[str, Build] = {}
    for launch in launches:
        first.setdefault(aot.compile_key(launch, arch), Build(arch, launch))
    return list(first.values())


def describe(launch: Launch) -> str:
    """Describe a launch's configuration in a few words: dtype, tile, warps and stages, and its options that are on."""
    values, options = launch.arguments, launch.options
    dtype = next(str(v.dtype)[6:] for v in values.values() if isinstance(v, Tensor))
    blocks = "x".join(str(size) for name, size in values.items() if name.startswith("BLOCK_"))
    flags = [name.lower() for name, value in values.items() if value is True]
    flags += [value for value in values.values() if isinstance(value, str)]
    return f"{dtype} {blocks} w{options['num_warps']} s{options['num_stages']} {' '.join(flags)}"


_BUILDS: list[Build] = []  # of a worker process


def _compile(number: int) -> Result:
    arch, launch = _BUILDS[number]
    try:
        resources = aot.compile_launch(launch, arch)
    except Exception as error:  # the compiler has no common base class of errors
        text = f"{type(error).__name__}: {str(error).strip()[-300:]}"
        return Result(None, [f"does not compile: {text}"])
    return Result(resources, aot.failures(launch, arch, resources))


def compile_all(builds: list[Build], processes: int) -> list[Result]:
    """Compile in worker processes; each inherits the launches, which cannot be sent."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _BUILDS.extend, (builds,)) as pool:
        return list(pool.map(_compile, range(len(builds))))


def print_resources(builds: list[Build], results: list[Result]) -> None:
    """Print the table of all compilations."""
    table = []
    for build, (resources, wrong) in zip(builds, results, strict=True):
        row: list[object] = [build.launch.name, build.arch, describe(build.launch)]
        if resources is None:
            table.append([*row, *"-----", "FAILS"])
            continue
        counts = " ".join(f"{name}:{n}" for name, n in resources.instructions.items())
        row += [resources.registers, resources.shared_bytes, resources.stack_bytes, counts]
        table.append([*row, f"{resources.occupancy:.2f}", "FAILS" if wrong else "ok"])
    header = "kernel target config registers shared_bytes spilled_bytes instructions occupancy gate"
    print_table(header.split(), table)


def minimum_bytes(shape: Shape) -> tuple[int, int]:
    """Return the least bytes that fused kernels move forward and backward in a bf16 SwiGLU layer, every tensor once a
    kernel.

    With M = tokens * active rows, hidden width h, width d, E experts (3 matrices each), in numbers: forward 3Edh
    weights, Td inputs, 4Mh (z and u written, a written and read), 2Md (y written and read), Td outputs; backward 6Edh
    (weights read, gradients written), 4Td (dout twice, x, dx), 10Mh (z and u read, dz and du written and read twice,
    weighted a written and read), 2Md (rows of dx written and read).
    """
    tokens, width, hidden, experts, active = shape
    rows, matrices = tokens * active, 3 * experts * width * hidden
    forward = matrices + 2 * tokens * width + 4 * rows * hidden + 2 * rows * width
    backward = 2 * matrices + 4 * tokens * width + 10 * rows * hidden + 2 * rows * width
    return 2 * forward, 2 * backward


def moved_bytes(launches: list[Launch]) -> tuple[int, int]:
    """Return the bytes that launches move: with perfect caches inside each launch, and as its tiles ask for them."""
    found = [access for launch in launches for access in accesses(launch)]
    written = sum(access.written_bytes for access in found)
    perfect = sum(access.read_bytes_distinct for access in found)
    return perfect + written, sum(access.read_bytes_total for access in found) + written


def bytes_over_minimum(arch: str) -> dict[str, dict[str, float]]:
    """Print the bytes of the model shapes; return their ratio to the minimum."""
    ratios: dict[str, dict[str, float]] = {}
    table: list[list[object]] = []
    for name, shape in MODELS.items():
        ratios[name] = {}
        passes = record_layer(Layer(shape, "bf16", gated=True), arch)
        least = minimum_bytes(shape)
        for direction, launches, minimum in zip(("forward", "backward"), passes, least, strict=True):
            moved, asked = moved_bytes(launches)
            ratios[name][direction] = moved / minimum
            numbers = minimum / 1e6, moved / 1e6, moved / minimum, asked / 1e6
            table.append([name, direction, len(launches), *numbers])
    header = "shape pass launches minimum_mb moved_mb moved/minimum asked_by_tiles_mb"
    print_table(header.split(), table)
    return ratios


def main() -> None:
    """Run the gate."""
    parser = argparse.ArgumentParser(description="Static gate of the Triton kernels; no GPU.")
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel")
    parser.add_argument("--processes", type=positive, default=2, help="compile in this many (default 2)")
    args = parser.parse_args()
    list_builds = quick_builds if args.quick else full_builds
    builds = [build for arch in aot.CHIPS for build in list_builds(arch)]
    start = time.perf_counter()
    results = compile_all(builds, args.processes)
    print_resources(builds, results)
    print(f"{len(builds)} compilations in {time.perf_counter() - start:.0f} s\n")
    wrong = [
        f"{build.launch.name} {build.arch} {describe(build.launch)}: {failure}"
        for build, (_, found) in zip(builds, results, strict=True)
        for failure in found
    ]
    for failure in wrong:
        print(f"FAILS {failure}")
    moved = bytes_over_minimum("sm_90")
    print_result({"compiled": len(builds), "failures": wrong, "bytes_over_minimum": moved})
    sys.exit(1 if wrong else 0)
