"""Seconds of the quickstart as a person starts it, alone and beside one busy process: `python -m
benchmarks.bench_quickstart`.

    python -m benchmarks.bench_quickstart --steps 60 --symbols 60000 --against HEAD~1

`training` is the steps' own time, `evaluation` from the line that announces it to the end of the process: the curve
over k, the counting baselines, plots and the summary. `losses` is a hash of every logged loss and of bpc at each k: it
says whether two trees compute the same bits. The case beside a process has an endless loop next to it, on as many cores
as there are.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import environment, positive, print_result, print_table
from benchmarks.harness.against import parse
from benchmarks.machines.cluster import ROOT

_LOOP = """import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy_process() -> Iterator[None]:
    """Keep one core busy until the block ends, or this process is gone."""
    with subprocess.Popen([sys.executable, "-c", _LOOP]) as loop:
        try:
            yield
        finally:
            loop.kill()


def timed(command: list[str]) -> tuple[float, float]:
    """Run a training to its end; return the seconds of all of it, and of the part after the training.

    Raises:
        SystemExit: it failed.
    """
    start = evaluating = time.perf_counter()
    line = "no message"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("evaluating"):
                evaluating = time.perf_counter()
    end = time.perf_counter()
    if run.returncode != 0:
        raise SystemExit(f"the quickstart ended with {run.returncode}: {line.strip()}")
    return end - start, end - evaluating


def quickstart(steps: int, symbols: int) -> dict[str, float | str]:
    """Train and evaluate; return the seconds and the hash.

    Args:
        symbols: of the test split that are evaluated; 0 for all.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"train.runs_dir={folder}",
            f"train.steps={steps}",
            f"eval.max_symbols={symbols}",
            f"optim.warmup_steps={min(50, steps)}",
            "kernels.masked_from_k=16",  # otherwise measured, and rounded differently from run to run
        ]
        command = [sys.executable, "-u", "-m", "launch.train", "experiment=quickstart", *options]
        whole, evaluation = timed(command)
        summary = json.loads((Path(folder) / "quickstart/summary.json").read_text())
        rows = (Path(folder) / "quickstart/metrics.jsonl").read_text().splitlines()
    seen = json.dumps([[json.loads(row).get("loss") for row in rows], summary["bpc"]]).encode()
    return {
        "training": summary["training_seconds"],
        "evaluation": evaluation,
        "all": whole,
        "losses": hashlib.sha256(seen).hexdigest()[:16],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=60, help="default 60; the quickstart has 1600")
    parser.add_argument("--symbols", type=int, default=60_000, help="of the test split; 0 for all of it")
    args = parse(parser)
    found = {"alone": quickstart(args.steps, args.symbols)}
    with busy_process():
        found["beside"] = quickstart(args.steps, args.symbols)
    print(environment())
    names = "training", "evaluation", "all"
    print_table(["seconds", *names, "losses"], [[case, *one.values()] for case, one in found.items()])
    print_result(found)


if __name__ == "__main__":
    main()
