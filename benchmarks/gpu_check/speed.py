"""The layer on a GPU at the sizes of five models, forward and backward, beside PyTorch's own operations for it.

Every case is a ratio to one dense feed-forward of equal FLOPs. grouped_mm sorts at every step. grouped_mm_planned is a
permute, torch's grouped products and an index_add, unfused; "grouped products" are the products alone. padded_bmm pads
every expert's rows to those of the busiest. A case whose output or gradients differ from those in fp64 is not timed.
The bound is the least time that the device needs: FLOPs (12 NDF) over the peak of a data sheet, or of a large product
where engine/metrics/peak_flops.py has none, or least_bytes over the rate of a large copy, whichever is longer.

Letters: see benchmarks/systems/peers.py; s bytes of a number.
"""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_check.setting import Setting, in_processes
from benchmarks.harness import GradCase, environment, measured_peaks, median_ms, passing, print_table
from benchmarks.systems import peers
from benchmarks.systems.layer_cases import DTYPES, LOADS, TOLERANCE, dense, ours
from benchmarks.systems.peers import Problem, Shape, make_problem, truth
from foreroute.engine.metrics.peak_flops import SHEETS

SHAPES = {
    "quickstart": Shape(1024, 128, 128, 16, 4),
    "enwik8_smoe_dropout": Shape(11264, 256, 512, 16, 8),
    "enwik8_12l": Shape(11264, 512, 512, 16, 4),
    "coarse": Shape(8192, 1024, 4096, 8, 2),
    "fine": Shape(8192, 2048, 768, 128, 8),
}
TINY = {"tiny": Shape(24, 16, 32, 4, 2)}
LABELS = ("bf16", "tf32", "fp32")
PEERS = ("grouped_mm", "grouped_mm_planned", "padded_bmm")
_AHEAD_SHARE = 0.4  # of the time, for compiling before anything is timed


class Peaks(NamedTuple):
    """The rates that a device reaches in one number format."""

    tflops: float
    gbytes: float  # per second, read and written
    source: str  # of tflops


def speed(setting: Setting) -> dict[str, Any]:
    """Compile in several processes, then measure."""
    begun = time.perf_counter()
    shapes, labels = (TINY, ("fp32",)) if setting.dry_run else (SHAPES, LABELS)
    jobs = list(product(shapes.values(), labels))
    in_processes(partial(_compile, device=setting.device), jobs, _AHEAD_SHARE * setting.seconds)
    left = setting.seconds - (time.perf_counter() - begun)
    rounds = 1 if setting.dry_run else 10
    return measure(shapes, labels, LOADS, rounds=rounds, device=setting.device, seconds=left)


def measure(
    shapes: Mapping[str, Shape],
    labels: Sequence[str],
    loads: Sequence[str],
    *,
    rounds: int,
    device: str = "cuda",
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Check, time and print. "failed" lists our cases that are wrong, "refused" those of others, "left_out" cases for
    which no time was left."""
    until = time.perf_counter() + seconds
    peaks = {label: _peaks(label, device) for label in labels}
    print(f"{environment()}; {peaks}")
    found: dict[str, Any] = {"ratio_to_dense": {}, "share_of_bound": {}, "bound": {}}
    wrong: list[str] = []
    left_out: list[str] = []
    for load, (name, shape) in product(loads, shapes.items()):
        if time.perf_counter() > until:
            left_out.append(f"{name} {load}")
            continue
        exact = make_problem(shape, skewed=load == "skewed", device=device)
        permuted = peers.permuted(exact)
        truths = dict.fromkeys(("ours", *PEERS), truth(exact)) | {"grouped products": truth(permuted)}
        for label in labels:
            set_tf32(label)
            title = f"{name} {label} {load}"
            print(f"\n{title}: {' '.join(f'{k}={v}' for k, v in shape._asdict().items())}")
            cases = layer_cases(shape, label, exact, permuted, device)
            passed, failed = passing(title, cases, truths, TOLERANCE[label])
            wrong += failed
            ms = median_ms(passed, rounds, device=device)
            bound, limit = bound_ms(shape, label, peaks[label])
            found["bound"][title] = limit
            found["ratio_to_dense"][title] = {key: value / ms["dense"] for key, value in ms.items()}
            found["share_of_bound"][title] = {key: bound / value for key, value in ms.items() if key != "dense"}
            rows = [[key, value, value / ms["dense"], bound / value] for key, value in ms.items()]
            print_table(("case", "ms", "ratio", f"of the bound ({limit})"), rows)
            del cases, passed
    failed = [line for line in wrong if " ours: " in line]
    refused = [line for line in wrong if line not in failed]
    return {"failed": failed, "refused": refused, "left_out": left_out, "peaks": _told(peaks), **found}


def set_tf32(label: str) -> None:
    """Allow PyTorch's fp32 products to use tf32, or not."""
    torch.set_float32_matmul_precision("high" if label == "tf32" else "highest")


def layer_cases(shape: Shape, label: str, exact: Problem, permuted: Problem, device: str) -> dict[str, GradCase]:
    """Make the cases of one number format."""
    return {
        "dense": dense(shape.rows, shape.width, shape.hidden, DTYPES[label], device=device),
        "ours": _ours(exact, label),
        **peers.peers(exact.cast(DTYPES[label]), PEERS),
        "grouped products": peers.products_only(permuted.cast(DTYPES[label])),
    }


def least_bytes(shape: Shape, size: int) -> int:
    """Return the bytes that forward and backward move at least, if each kernel reads and writes every row once.

    Forward s(2EDF + 2TD + 2NF + 2ND), backward s(4EDF + 4TD + 5NF + 2ND).
    """
    tokens, width, hidden, experts, _ = shape
    weights, rows = experts * width * hidden, shape.rows
    return size * (6 * weights + 6 * tokens * width + 7 * rows * hidden + 4 * rows * width)


def bound_ms(shape: Shape, label: str, peaks: Peaks) -> tuple[float, str]:
    """Return the least milliseconds of the layer, and whether arithmetic or memory needs them.

    Example: 2 rows of width 500 and hidden width 1,000 are 12 MFLOP: 12 ms of arithmetic at 0.001 TFLOP/s.
    """
    flops_ms = 12 * shape.rows * shape.width * shape.hidden / peaks.tflops / 1e9
    bytes_ms = least_bytes(shape, DTYPES[label].itemsize) / peaks.gbytes / 1e6
    return max((flops_ms, "arithmetic"), (bytes_ms, "memory"))


def _peaks(label: str, device: str) -> Peaks:
    set_tf32(label)
    tflops, gbytes = measured_peaks(DTYPES[label], device=device)
    sheet = SHEETS.get(torch.cuda.get_device_name()) if device == "cuda" else None
    if sheet is None:
        return Peaks(tflops, gbytes, "measured in a product")
    return Peaks(getattr(sheet, label), gbytes, f"{sheet.sheet}; a product reached {tflops:.4g}")


def _told(peaks: Mapping[str, Peaks]) -> dict[str, dict[str, float | str]]:
    return {label: {**one._asdict()} for label, one in peaks.items()}


def _ours(exact: Problem, label: str) -> GradCase:
    precision = "tf32" if label == "tf32" else "ieee"
    return ours(exact.cast(DTYPES[label]), "lean", backend="triton", precision=precision)


def _compile(job: tuple[Shape, str], *, device: str) -> None:
    """Run the layer once, which leaves its kernels in Triton's cache; errors show when it is measured."""
    shape, label = job
    _ours(make_problem(shape, device=device), label)()
