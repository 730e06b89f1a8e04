"""What all benchmarks share: interleaved timing, the environment's description, the table and the closing JSON line.

Timings of a shared machine are noisy, so cases are run in turn, round after round, and compared by the ratio of their
fastest rounds.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Case = Callable[[], object]


def interleave(cases: Mapping[str, Case], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run every case once per round, in turn; return each case's seconds per round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(warmup + rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def minima_ms(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Fastest round of each case in milliseconds."""
    return {name: 1e3 * min(values) for name, values in seconds.items()}


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
    text = [
        [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    ]
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
