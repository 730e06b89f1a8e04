"""Compile recorded launches for GPUs that this machine lacks, and judge the compiler's result.

`compile_launch` specialises a kernels.launching.Launch as Triton's own launcher would (types, alignment, constants) and
compiles it for a chip. `failures` names the faults that would make it slow or impossible there: spilled registers, too
much shared memory, no tensor-core instruction, narrow or synchronous accesses to rows. Nothing runs, nothing is timed;
the tools come with the triton wheel. benchmarks/kernels_static/program.py chooses the launches.
"""

import linecache
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from foreroute.kernels.launching import Launch, is_interpreted

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "triton"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Chip:
    """Limits of an architecture; a multiprocessor is a compute unit on AMD."""

    target: GPUTarget
    shared_bytes: int  # largest of one program
    shared_total_bytes: int  # of a multiprocessor
    shared_reserved_bytes: int  # taken beside each program's own
    warps: int  # resident on a multiprocessor
    registers: int  # of a multiprocessor, 32 bits each
    is_async: bool  # loads reach shared memory by cp.async; sm_100 is not judged by it


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 166_912, 164 * 1024, 1024, 64, 65_536, True),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 232_448, 228 * 1024, 1024, 64, 65_536, True),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 232_448, 228 * 1024, 1024, 64, 65_536, False),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65_536, 65_536, 0, 32, 4 * 512 * 64, False),
}
_TENSOR_MEMORY_COLUMNS = 512  # of a Blackwell multiprocessor
_BLOCK = re.compile(r"// begin inline asm$.*?// end inline asm$", re.DOTALL | re.MULTILINE)
_PLACE = re.compile(r"^\s*\.loc\b.*\n", re.MULTILINE)
_TENSOR_CORE = ("HMMA", "HGMMA", "UTCMMA", "MFMA")


@dataclass(frozen=True, slots=True)
class RowAccess:
    """A load or store of the kernel's source that runs along rows, and the instructions that it became."""

    line: int
    text: str  # of that line
    is_load: bool
    in_loop: bool
    instructions: dict[str, int]  # opcode: how many; empty for AMD, whose accesses are not judged


@dataclass(frozen=True, slots=True)
class Resources:
    """The needs of a compiled kernel and its instructions."""

    registers: int  # of a thread; AMD: vector registers
    stack_bytes: int  # NVIDIA: stack and local memory, AMD: scratch
    spills: int  # NVIDIA: STL and LDL instructions, AMD: spilled vector registers
    scalar_spills: int  # AMD: scalar registers kept in vector registers
    shared_bytes: int
    tensor_memory_columns: int  # Blackwell
    instructions: dict[str, int]  # HMMA, LDGSTS.128, ...; those that do not occur are left out
    rows: tuple[RowAccess, ...]
    occupancy: float  # see occupancy()


def specialise(launch: Launch, arch: str) -> tuple[ASTSource, dict[str, Any]]:
    """Return the source and options with which Triton's launcher would compile this launch on such a chip.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels are not compiled.
    """
    if is_interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 is set: unset it to compile kernels")
    backend = make_backend(CHIPS[arch].target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(**launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, rest
    )
    return ASTSource(kernel, signature, constants, attributes), dict(options.__dict__)


def compile_key(launch: Launch, arch: str) -> str:
    """Return a key of all that the compiler reads: launches with equal keys compile to the same code."""
    source, options = specialise(launch, arch)
    constants = {path: str(value) for path, value in source.constants.items()}
    return f"{arch} {launch.name} {source.signature} {constants} {source.attrs} {options}"


def compile_launch(launch: Launch, arch: str) -> Resources:
    """Compile a launch for a chip (a key of CHIPS) and read its needs; compiled code is kept in .cache/triton.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1.
        Triton's own errors if it cannot compile.
    """
    source, options = specialise(launch, arch)
    with triton.knobs.cache.scope(), triton.knobs.runtime.scope():
        triton.knobs.cache.dir = str(CACHE)
        triton.knobs.runtime.add_stages_inspection_hook = _mend_lines
        compiled = triton.compile(source, target=CHIPS[arch].target, options=options)
        warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    rows = list(_row_accesses(compiled.asm["ttir"], Path(launch.kernel.fn.__code__.co_filename)))
    if CHIPS[arch].target.backend == "hip":
        return _amd_resources(compiled.asm["amdgcn"], CHIPS[arch], warps, rows, shared=shared)
    return _nvidia_resources(
        compiled.asm["cubin"],
        CHIPS[arch],
        warps,
        rows,
        shared=shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
    )


def _mend_lines(*arguments: Any) -> tuple[str, str]:
    """Run `true_lines` after the stage that makes PTX; called without arguments, return keys for Triton's cache."""
    stages = arguments[1] if arguments else {}
    if "ptx" in stages:
        make_ptx = stages["ptx"]
        stages["ptx"] = lambda source, metadata: true_lines(make_ptx(source, metadata))
    return "true_lines", "true_lines"


def true_lines(ptx: str) -> str:
    """Return PTX whose inline blocks stand whole on the source line of the .loc above them.

    The LLVM of Triton 3.8 gives each line of a block the number after that of the line above it (llvm/llvm-project
    177718; 222764 mends it). Triton writes its global loads and stores as such blocks, so they would count for source
    lines further down. Only line information changes: ptxas makes the same instructions of it.

    Example: of `.loc 1 38 13`, a block of `.loc 1 38 13`, `mov`, `.loc 1 39 13`, `ld.global`, the two in the block go.
    """
    return _BLOCK.sub(lambda block: _PLACE.sub("", block[0]), ptx)


def failures(launch: Launch, arch: str, resources: Resources) -> list[str]:
    """List the faults of a compiled launch; the gate requires an empty list.

    A product is a kernel with PRECISION among its constants; kernels of rows have D. fp32 at full precision needs no
    tensor core. On AMD only the limits, spills and matrix instructions are judged. Scalar registers that spill into
    vector registers stay on the chip and are not counted as spills.
    """
    chip, found = CHIPS[arch], resources.instructions
    wrong = []
    if resources.stack_bytes or resources.spills:
        wrong.append(f"spill: {resources.stack_bytes} bytes, {resources.spills} accesses")
    if resources.shared_bytes > chip.shared_bytes:
        wrong.append(f"shared memory: {resources.shared_bytes} bytes of {chip.shared_bytes}")
    if resources.tensor_memory_columns > _TENSOR_MEMORY_COLUMNS:
        wrong.append(f"tensor memory: {resources.tensor_memory_columns} columns")
    product = "PRECISION" in launch.arguments
    operand = next(iter(launch.arguments.values()))
    full = launch.arguments.get("PRECISION") == "ieee" and operand.dtype == torch.float32
    if product and not full and not any(name in found for name in _TENSOR_CORE):
        wrong.append("no tensor-core instruction")
    if chip.target.backend == "cuda" and "D" in launch.arguments:
        wrong += [failure for row in resources.rows for failure in _row_failures(row, product and chip.is_async)]
    return wrong


def _row_failures(row: RowAccess, wants_async: bool) -> Iterator[str]:
    """Judge one row access: every instruction moves 16 bytes a thread, and loads in a product's loop are cp.async.

    Which accesses run along rows is known from the source (see _row_accesses), so the loads of indices, biases and the
    tile map, which are narrow by nature, are not looked at.
    """
    where = f"line {row.line} ({row.text})"
    narrow = {name: count for name, count in row.instructions.items() if not _is_wide(name)}
    if narrow or not row.instructions:
        yield f"not 128-bit: {where}: {narrow}"
    if wants_async and row.in_loop and row.is_load:
        late = {n: count for n, count in row.instructions.items() if not n.startswith("LDGSTS")}
        if late:
            yield f"not cp.async: {where}: {late}"


def occupancy(chip: Chip, registers: int, warps: int, shared_bytes: int) -> float:
    """Estimate the share of a multiprocessor's warps that can be resident.

    min(registers of the chip / registers of a program, its shared memory / that of a program, its warps / warps of a
    program), rounded down to whole programs, times warps of a program / warps of the chip. A thread's registers are
    allocated in eights, a wave's on AMD likewise; tensor memory and launch limits are left out.
    """
    rounded = -(-max(registers, 1) // 8) * 8
    by_registers = chip.registers // (rounded * chip.target.warp_size * warps)
    by_shared = chip.shared_total_bytes // max(shared_bytes + chip.shared_reserved_bytes, 1)
    resident: float = min(by_registers, by_shared, chip.warps // warps) * warps
    return resident / chip.warps


def _is_wide(opcode: str) -> bool:
    return bool({"128", "256"} & set(opcode.split(".")))


def _row_accesses(ir: str, file: Path) -> Iterator[RowAccess]:
    """Find the accesses along rows in Triton's IR, without their instructions.

    Of a kernel's loads and stores these are the ones of the highest rank: blocks [M, D] in a product, where indices and
    biases are vectors; vectors [D] in kernels that move a row, where indices are scalars. Partial sums, a few numbers a
    row, are left out.
    """
    places = dict(re.findall(r"^#(loc\d*) = loc\((.*)\)$", ir, re.MULTILINE))
    found, loops = [], [False]
    for text in map(str.strip, ir.splitlines()):
        if text.startswith("}"):
            loops.pop()
        access = re.search(r"\btt\.(load|store) .*: (?:tensor<([\dx]+)x)?!tt\.ptr<\w+>.*loc\(#(\w+)\)", text)
        if access:
            rank = len(access[2].split("x")) if access[2] else 0
            found.append((rank, _line(places, access[3]), access[1] == "load", any(loops)))
        if text.endswith("{"):
            loops.append("scf.for" in text)
    highest = max(rank for rank, *_ in found)
    for rank, line, is_load, in_loop in sorted(set(found)):
        text = linecache.getline(str(file), line).strip()
        if rank == highest and "partial_ptr" not in text:
            yield RowAccess(line, text, is_load, in_loop, {})


def _line(places: dict[str, str], name: str) -> int:
    """Follow an IR location to the innermost source line: loc("a"(#loc48)), loc(callsite(#loc121 at #loc120))."""
    text = places[name]
    place = re.search(r'":(\d+):\d+$', text)
    if place:
        return int(place[1])
    inner = re.search(r"#(loc\d*)", text)
    assert inner is not None, f"location {text}"
    return _line(places, inner[1])


def _nvidia_resources(
    cubin: bytes, chip: Chip, warps: int, rows: list[RowAccess], *, shared: int, tensor_columns: int
) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", "-g", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"cuobjdump says: {usage[-200:]}")
    registers, stack, local = map(int, numbers.groups())
    opcodes = _opcodes(code)
    total: Counter[str] = Counter()
    for (_, opcode), count in opcodes.items():
        for label in _labels(opcode):
            total[label] += count
    rows = [replace(row, instructions=_of_row(row, opcodes)) for row in rows]
    return Resources(
        registers,
        stack + local,
        total["STL"] + total["LDL"],
        0,
        shared,
        tensor_columns,
        dict(sorted(total.items())),
        tuple(rows),
        occupancy(chip, registers, warps, shared),
    )


def _amd_resources(code: str, chip: Chip, warps: int, rows: list[RowAccess], *, shared: int) -> Resources:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # type: ignore[index]

    counts = {
        "MFMA": len(re.findall(r"\bv_mfma_", code)),
        "load_dwordx4": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        "store_dwordx4": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", code)),
    }
    registers = number("vgpr_count")
    found = {name: count for name, count in counts.items() if count}
    return Resources(
        registers,
        number("private_segment_fixed_size"),
        number("vgpr_spill_count"),
        number("sgpr_spill_count"),
        shared,
        0,
        found,
        tuple(rows),
        occupancy(chip, registers, warps, shared),
    )


def _opcodes(code: str) -> Counter[tuple[int, str]]:
    """Count the instructions of a disassembly by source line and opcode."""
    line, found = 0, Counter[tuple[int, str]]()
    for text in code.splitlines():
        place = re.match(r'\s*//## File ".*", line (\d+)', text)
        if place:
            line = int(place[1])
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", text)
        if instruction:
            found[line, instruction[1]] += 1
    return found


def _labels(opcode: str) -> Iterator[str]:
    """Return the names under which an instruction is counted, if it is of interest: LDG.E.128 counts as LDG and as
    LDG.128."""
    name = re.sub(r"^UTC\w*MMA$", "UTCMMA", opcode.split(".")[0])
    if name in ("HMMA", "HGMMA", "UTCMMA", "LDGSTS", "LDG", "STG", "STL", "LDL"):
        yield name
        if _is_wide(opcode):
            yield f"{name}.128"


def _of_row(row: RowAccess, opcodes: Counter[tuple[int, str]]) -> dict[str, int]:
    """Return the instructions of a row access: memory instructions in its direction, on its source line."""
    names = ("LDG", "LDGSTS") if row.is_load else ("STG",)
    found = {opcode: count for (line, opcode), count in opcodes.items() if line == row.line}
    return {opcode: count for opcode, count in found.items() if opcode.split(".")[0] in names}


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
