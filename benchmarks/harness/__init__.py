"""The parts that all benchmarks share: interleaved timing, the environment's description, the table and the closing
JSON line.

Timings of a shared machine are noisy, so cases are run in turn, round after round, and compared by the ratio of their
fastest rounds.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from foreroute.kernels.testing.cases import relative_error

Case = Callable[[], object]


@dataclass(frozen=True, slots=True)
class GradCase:
    """A case that is differentiated: a call runs forward and backward."""

    forward: Callable[[], Tensor]
    x: Tensor
    parameters: Mapping[str, Sequence[Tensor]]  # several under one name: one array kept in pieces
    cotangent: Tensor
    tables: Sequence[Tensor] = ()  # constants made beforehand; count as indices in what backward keeps

    def __call__(self) -> tuple[Tensor, ...]:
        """Return the output and every gradient."""
        out = self.forward()
        leaves = [self.x, *chain(*self.parameters.values())]
        return out.detach(), *torch.autograd.grad(out, leaves, self.cotangent)

    def results(self) -> dict[str, Tensor]:
        """Return the output and every gradient by name, pieces stacked."""
        out, dx, *grads = self()
        named, rest = {"out": out, "dx": dx}, iter(grads)
        for name, pieces in self.parameters.items():
            own = list(islice(rest, len(pieces)))
            named[f"d{name}"] = own[0] if len(own) == 1 else torch.stack(own)
        return named


class SavedBytes(NamedTuple):
    """The bytes that a forward pass keeps for backward, parameters left out."""

    numbers: int
    indices: int


def interleave(cases: Mapping[str, Case], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run every case once per round, in an order drawn anew (the case before matters); return seconds per round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(warmup + rounds):
        for name in random.Random(i).sample(list(cases), len(cases)):
            start = time.perf_counter()
            cases[name]()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def fastest(case: Case, rounds: int = 7) -> float:
    """Return the seconds of the fastest round of one case."""
    (seconds,) = interleave({"": case}, rounds, warmup=0).values()
    return min(seconds)


def slowest_seconds(case: Case) -> float:
    """Run a case on all ranks of the process group, started together; return the seconds of the slowest."""
    dist.barrier()
    start = time.perf_counter()
    case()
    found = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def minima_ms(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the fastest round of each case in milliseconds."""
    return {name: 1e3 * min(values) for name, values in seconds.items()}


def median_ms(cases: Mapping[str, Case], rounds: int, *, device: str = "cuda", warmup: int = 3) -> dict[str, float]:
    """Run every case once per round, in turn; return each case's median milliseconds, on a GPU by CUDA events."""
    if device != "cuda":
        return {name: 1e3 * statistics.median(values) for name, values in interleave(cases, rounds, warmup).items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in cases}
    for i in range(warmup + rounds):
        for name, case in cases.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            case()
            end.record()
            if i >= warmup:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(start.elapsed_time(end) for start, end in pairs) for name, pairs in events.items()}


def measured_peaks(dtype: torch.dtype, *, device: str = "cuda") -> tuple[float, float]:
    """Measure a device's TFLOP/s in a large product and GB/s, read and written, in a large copy (small ones on a
    CPU)."""
    size, copied = (8192, 2**30) if device == "cuda" else (256, 2**22)
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = median_ms({"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, 10, device=device)
    return 2 * size**3 / ms["product"] / 1e9, 2 * source.nbytes / ms["copy"] / 1e6


def saved_bytes(case: GradCase) -> SavedBytes:
    """Run a forward pass and count the bytes that autograd keeps, each storage once and whole.

    Parameters are not counted; integers and the case's tables count as indices.
    """
    left_out = {p.untyped_storage().data_ptr() for p in chain(*case.parameters.values())}
    known = {table.untyped_storage().data_ptr() for table in case.tables}
    numbers: dict[int, int] = {}
    others: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in left_out:
            is_index = address in known or not tensor.is_floating_point()
            (others if is_index else numbers)[address] = storage.nbytes()
        return tensor.detach()  # itself would be a cycle that is never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = case.forward()  # keeps everything alive until it is counted
    del out
    return SavedBytes(sum(numbers.values()), sum(others.values()))


def passing(
    label: str, cases: Mapping[str, GradCase], truths: Mapping[str, Mapping[str, Tensor]], tolerance: float
) -> tuple[dict[str, GradCase], list[str]]:
    """Leave out and name the cases that raise or differ from their truth; a case without one passes."""
    passed, failed = {}, []
    for name, case in cases.items():
        wrong = []
        try:
            got = case.results()
            errors = {key: relative_error(got[key], t) for key, t in truths.get(name, {}).items()}
            wrong = [f"{key} is off by {e:.1e}" for key, e in errors.items() if not e <= tolerance]
        except RuntimeError as error:
            wrong = [str(error).splitlines()[0]]
        if wrong:
            print(f"NOT TIMED: {label} {name}: {', '.join(wrong)} (allowed: {tolerance})")
            failed.append(f"{label} {name}: {', '.join(wrong)}")
        else:
            passed[name] = case
    return passed, failed


def positive(text: str) -> int:
    """Read a whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


def environment() -> dict[str, str | int]:
    """Describe where a figure was measured."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows in aligned columns; floats with three decimals."""
    text = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *text]) for i in range(len(header))]
    for line in [list(header), *text]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def print_result(result: Mapping[str, Any]) -> None:
    """Print the benchmark's last line: one JSON object, numbers rounded to four digits."""

    def tidy(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: tidy(item) for key, item in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    print(json.dumps(tidy(result)))
