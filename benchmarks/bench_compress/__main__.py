"""Held-out bits of one trained run, made smaller in each way of launch.compress.

    python -m launch.train experiment=quickstart
    python -m benchmarks.bench_compress runs/quickstart --experts 12 8 --symbols 16384

Experts are merged by their outputs, by their use and at random, pruned by their use and at random, and kept as int8;
nothing is trained afterwards. Every arm is evaluated on the first symbols of the test split at the same k. An arm at
random is a mean over `--seeds`.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.harness import positive, print_result, print_table
from benchmarks.harness.against import parse
from foreroute.engine.checkpoint.trained_run import open_saved
from foreroute.engine.compress.choose import By, Method
from foreroute.engine.config import Split
from foreroute.engine.evaluation.held_out import evaluate
from foreroute.launch.compress import CompressArgs, compress
from foreroute.launch.runs.folder import TextArgs, read_run

WAYS = [
    (Method.merge, By.outputs),
    (Method.merge, By.use),
    (Method.merge, By.random),
    (Method.prune, By.use),
    (Method.prune, By.random),
]


def bits(folder: Path, text: TextArgs, every_k: list[int], symbols: int) -> dict[str, float]:
    """Return the bits per symbol of a run at each k that it has."""
    run = open_saved(folder, read_run(folder, text), print)
    known = [k for k in every_k if k <= run.config.moe.experts]
    return {str(k): evaluate(run, split=Split.test, k=k, max_symbols=symbols).bpc for k in known}


def smaller(run: Path, text: TextArgs, args: argparse.Namespace, **options: Any) -> tuple[dict[str, float], int, int]:
    """Make the run smaller in a temporary folder; return its bits, and the bytes of its experts, now and before."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            compress(CompressArgs(str(run), str(out), threads=args.threads, corpus=text, **options))
        told = json.loads(printed.getvalue().splitlines()[-1])
        return bits(out, text, args.k, args.symbols), told["expert_bytes"], told["expert_bytes_before"]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every arm; return bits by arm and k, and bytes by arm."""
    run, text = Path(args.run), TextArgs(cache_dir=args.cache)
    found, sizes = {"whole": bits(run, text, args.k, args.symbols)}, dict[str, int]()
    print(f"whole: {json.dumps(found['whole'])}", flush=True)
    found["int8"], sizes["int8"], sizes["whole"] = smaller(run, text, args, method=Method.int8)
    print(f"int8: {json.dumps(found['int8'])}", flush=True)
    for experts in args.experts:
        for method, by in WAYS:
            seeds = args.seeds if by is By.random else [1]
            options = {"method": method, "by": by, "experts": experts}
            arms = [smaller(run, text, args, seed=seed, **options) for seed in seeds]
            name = f"{experts} {method.name} {by.name}"
            found[name] = {k: fmean(arm[k] for arm, *_ in arms) for k in arms[0][0]}
            sizes[name] = arms[0][1]
            print(f"{name}: {json.dumps(found[name])}", flush=True)
    config = read_run(run, text)
    return {
        "experts": config.moe.experts,
        "k_max": config.schedule.k_max,
        "symbols": args.symbols,
        "bpc": found,
        "int8_relative_change": {k: value / found["whole"][k] - 1 for k, value in found["int8"].items()},
        "expert_bytes": sizes,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the trained run")
    parser.add_argument("--experts", type=positive, nargs="+", default=[12, 8], help="default 12 8")
    parser.add_argument("--k", type=positive, nargs="+", default=[1, 2, 4, 8], help="default 1 2 4 8")
    parser.add_argument("--symbols", type=positive, default=16384, help="of the test split; default 16384")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the arms at random; default 1")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch; default 1")
    parser.add_argument("--cache", help="folder of prepared corpora and tables; default: the run's")
    args = parse(parser)
    torch.set_num_threads(args.threads)
    result = measure(args)
    rows = [
        [name, *(f"{of[str(k)]:.4f}" if str(k) in of else "-" for k in args.k)] for name, of in result["bpc"].items()
    ]
    print_table(["bits per symbol", *(f"k = {k}" for k in args.k)], rows)
    print_result(result)


if __name__ == "__main__":
    main()
