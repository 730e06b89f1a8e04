"""Check what has only run without a GPU, on one: `python -m benchmarks.gpu_check [--out FOLDER] [--dry-run]`.

Stage 1 needs torch, triton, numpy and numba alone:

    kernels     every kernel against the plain-loop reference in fp64, outputs and gradients: fp32, tf32, fp16, bf16
    reads       forward and backward of a planned layer wait for nothing that is on the device
    graph       the layer, captured once as a CUDA graph, replays 100 plans with the bits of the eager layer
    training    200 steps of a small model against the same on the CPU
    speed       the layer at five models' sizes beside dense products, torch's grouped_mm and a padded bmm (speed.py)
    tile_sweep  tiles that are faster than the table's, if there are (tile_sweep.py)

Stage 2 runs the programs. Packages that this Python lacks come from the wheels of `make gpu-wheels`:

    packages    they are there
    quickstart  200 steps of the quickstart against the same on the CPU
    resume      the same, stopped half-way and resumed
    ranks       the same as two ranks on the one GPU, over gloo
    memory      a model of published size, held to its certificate, and its peak of memory against the certificate's

Both take eight minutes at most: each part has a share, and leaves out what it has no time for, which its figures say.
Each result is written to FOLDER/gpu_check.json when its part ends, so a second start continues after it; a part that
failed runs again. `--dry-run` does all of it on the CPU with interpreted kernels (TRITON_INTERPRET=1 is set for it):
small, and nothing is captured. The last line is one JSON object: {"stages": {"1": {part: result}, "2": {..}},
"failures": [..]}.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 480.0  # of both stages
DRY_SECONDS = 600.0  # of each part of a dry run


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the check."""

    stage: str
    run: Callable[..., dict[str, Any]]  # of a Setting; gives figures, and faults under "failed"
    seconds: float  # of SECONDS


def main() -> None:
    """Run the parts that are asked for; exit code 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m benchmarks.gpu_check")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".cache/gpu_check")), metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small, with interpreted kernels")
    parser.add_argument("--stage", choices=("1", "2"), help="one stage instead of both")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some parts; a wrong name lists them")
    parser.add_argument("--wheels", type=Path, default=Path(".cache/gpu-wheels"), metavar="FOLDER", help="for stage 2")
    args = parser.parse_args()
    if args.dry_run and os.environ.get("TRITON_INTERPRET") != "1":  # read when Triton is imported
        os.environ |= {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu"}
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_check", *sys.argv[1:]])
    import torch

    from benchmarks.gpu_check.setting import Setting
    from benchmarks.harness import environment, print_result, print_table

    if not args.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here; --dry-run does it on the CPU")
    parts = _parts()
    unknown = set(args.only or ()) - parts.keys()
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: must be of {', '.join(parts)}")
    asked = [name for name in args.only or parts if args.stage in (None, parts[name].stage)]
    if any(parts[name].stage == "2" for name in asked):
        asked = ["packages", *(name for name in asked if name != "packages")]  # they are in a temporary folder
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / ("gpu_check.dry.json" if args.dry_run else "gpu_check.json")
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    until = time.monotonic() + SECONDS
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that programs and folders go
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as work:
        for name in sorted(asked, key=list(parts).index):
            if name != "packages" and found.get(name, {}).get("failed") == []:
                continue
            left = min(parts[name].seconds, until - time.monotonic())
            seconds = DRY_SECONDS if args.dry_run else left
            found[name] = _run(parts[name], Setting(args.dry_run, seconds, args.wheels, Path(work), found))
            kept.write_text(json.dumps(found, indent=1) + "\n")
    told = {name: found[name] for name in parts if name in found}
    rows = [[name, one["seconds"], "; ".join(one["failed"]) or "ok", _short(one)] for name, one in told.items()]
    print()
    print_table(["part", "s", "", "figures"], rows)
    stages = {stage: {name: one for name, one in told.items() if parts[name].stage == stage} for stage in ("1", "2")}
    failures = [f"{name}: {line}" for name, one in told.items() for line in one["failed"]]
    where = {**environment(), "device": "cpu" if args.dry_run else torch.cuda.get_device_name()}
    print_result({"stages": stages, "failures": failures, **where})
    sys.exit(1 if failures else 0)


def _parts() -> dict[str, Part]:
    """All parts by name, in their order."""
    from benchmarks.gpu_check import programs, speed, stage_1, tile_sweep

    return {
        "kernels": Part("1", stage_1.kernels, 90),
        "reads": Part("1", stage_1.reads, 10),
        "graph": Part("1", stage_1.graph, 10),
        "training": Part("1", stage_1.training, 25),
        "speed": Part("1", speed.speed, 70),
        "tile_sweep": Part("1", tile_sweep.tile_sweep, 60),
        "packages": Part("2", programs.packages, 15),
        "quickstart": Part("2", programs.quickstart, 60),
        "resume": Part("2", programs.resume, 50),
        "ranks": Part("2", programs.ranks, 45),
        "memory": Part("2", programs.memory, 45),
    }


def _run(part: Part, setting: Any) -> dict[str, Any]:
    """Run one part; an error is a failure of it, and the others go on."""
    begun = time.perf_counter()
    try:
        if setting.seconds <= 0:
            raise TimeoutError(f"no time is left of {SECONDS:.0f} s; start again to go on")
        result = part.run(setting)
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        result = {"failed": [f"{type(error).__name__}: {first}"]}
    return {"failed": [], **result, "seconds": time.perf_counter() - begun}


def _short(part: dict[str, Any]) -> str:
    numbers = {name: value for name, value in part.items() if isinstance(value, int | float) and name != "seconds"}
    texts = [f"{name}: {value}" for name, value in part.items() if name in ("not_possible", "left_out") and value]
    return ", ".join([*(f"{name} {value:.3g}" for name, value in numbers.items()), *texts])
