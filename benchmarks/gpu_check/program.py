"""Check what has only run without a GPU, on one: `python -m benchmarks.gpu_check [--out FOLDER] [--dry-run]`.

Stage 1 needs torch, triton and numpy alone, and takes minutes:

    kernels    every kernel against the plain-loop reference in fp64, outputs and gradients: fp32, tf32, fp16, bf16
    reads      forward and backward of a planned layer wait for nothing that is on the device
    graph      the layer, captured once as a CUDA graph, replays 100 plans with the bits of the eager layer
    training   200 steps of a small model against the same on the CPU
    speed      benchmarks/bench_kernels.py: the layer against dense products and its peers

Each part is written to FOLDER/gpu_check.json when it ends, so a second start goes on behind it; a part that failed runs
again. `--dry-run` does all of it on the CPU with interpreted kernels (TRITON_INTERPRET=1 is set for it): small, and
nothing is captured. The last line is one JSON object: {"stages": {"1": {part: result}}, "failures": [..]}.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Part = Callable[[bool], dict[str, Any]]  # of dry_run; raises Wrong


def main() -> None:
    """Run the parts that are asked for; exit code 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m benchmarks.gpu_check")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".cache/gpu_check")), metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small, with interpreted kernels")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some parts: kernels, reads, graph, training, speed")
    args = parser.parse_args()
    if args.dry_run and os.environ.get("TRITON_INTERPRET") != "1":  # read when Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_check", *sys.argv[1:]])
    import torch

    from benchmarks.gpu_check.stage_1 import PARTS
    from benchmarks.harness import environment, print_result, print_table

    if not args.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here; --dry-run does it on the CPU")
    unknown = set(args.only or ()) - PARTS.keys()
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: must be of {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / ("gpu_check.dry.json" if args.dry_run else "gpu_check.json")
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for name in args.only or PARTS:
        if found.get(name, {}).get("failed") == []:
            continue
        found[name] = _run(PARTS[name], args.dry_run)
        kept.write_text(json.dumps(found, indent=1) + "\n")
    rows = [[name, part["seconds"], "; ".join(part["failed"]) or "ok", _short(part)] for name, part in found.items()]
    print_table(["part", "s", "", "figures"], rows)
    failures = [f"{name}: {line}" for name, part in found.items() for line in part["failed"]]
    where = {**environment(), "device": "cpu" if args.dry_run else torch.cuda.get_device_name()}
    print_result({"stages": {"1": found}, "failures": failures, **where})
    sys.exit(1 if failures else 0)


def _run(part: Part, dry_run: bool) -> dict[str, Any]:
    """Run one part; an error is a failure of it, and the others go on."""
    begun = time.perf_counter()
    try:
        result = part(dry_run)
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        result = {"failed": [f"{type(error).__name__}: {first}"]}
    return {"failed": [], **result, "seconds": time.perf_counter() - begun}


def _short(part: dict[str, Any]) -> str:
    numbers = {name: value for name, value in part.items() if isinstance(value, int | float) and name != "seconds"}
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
