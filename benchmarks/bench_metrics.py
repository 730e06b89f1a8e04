"""What metrics cost: `python -m benchmarks.bench_metrics` trains the quickstart for some steps in each way to log it.

    ranks      1, and 2 in one expert group
    log_every  20, as the quickstart has it, and 1
    wandb      disabled and offline

Each run is a process of its own (two ranks: torchrun), with one thread a rank. Reported for each: the share of the steps' time
that the metrics' own code takes on rank 0, which the run measures itself (metric_ms over step_ms; the first line is left out, for
it holds the start of kernels and threads). Writing a line counts to the line behind it. Not in it are the hooks around modules
that take the times of a step's parts: they are timed here, on empty modules. W&B's service is a process of its own; nor is it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.cluster import ROOT
from benchmarks.harness import environment, fastest, positive, print_result, print_table
from engine.attention import RelativeAttention
from engine.timing import ForwardTimes

CALLS = 10_000  # of an empty module, to time its hooks


class _Empty(RelativeAttention):
    """A module that ForwardTimes watches and that does nothing."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self) -> None:  # type: ignore[override]
        """Do nothing."""


def hook_us() -> float:
    """Microseconds that the hooks around one module cost."""

    def call(module: nn.Module) -> None:
        for _ in range(CALLS):
            module()

    bare, watched = _Empty(), _Empty()
    ForwardTimes(watched)
    return (fastest(lambda: call(watched)) - fastest(lambda: call(bare))) / CALLS * 1e6


def train(folder: Path, ranks: int, log_every: int, wandb: str, steps: int) -> list[dict[str, Any]]:
    """Train; gives the lines of training.

    Raises:
        SystemExit: the run failed.
    """
    name = f"{ranks}-{log_every}-{wandb}"
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []  # fmt: skip
    options = [
        "experiment=quickstart", f"train.name={name}", f"train.runs_dir={folder}", f"train.steps={steps}",
        f"train.log_every={log_every}", "train.threads=1", f"parallel.expert_ranks={ranks}", f"wandb.mode={wandb}",
        "kernels.masked_from_k=16", "eval.k=[4]", "eval.max_symbols=1024",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *start, "-m", "launch.train", *options],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def share(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """Metric and step milliseconds of a step, mean over the lines but the first."""
    counted = lines[1:]
    return tuple(sum(line[name] for line in counted) / len(counted) for name in ("metric_ms", "step_ms"))  # type: ignore[return-value]  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--steps", type=positive, default=100, help="of each run; a multiple of 20, at least 40")  # fmt: skip
    args = parser.parse_args()
    if args.steps % 20 or args.steps < 40:
        parser.error(f"--steps {args.steps}: must be a multiple of 20 and at least 40")
    rows, shares = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks, log_every, wandb in product((1, 2), (20, 1), ("disabled", "offline")):
            lines = train(Path(folder), ranks, log_every, wandb, args.steps)
            metric_ms, step_ms = share(lines)
            shares[f"{ranks} ranks, log_every {log_every}, {wandb}"] = metric_ms / step_ms
            rows.append([ranks, log_every, wandb, metric_ms, step_ms, f"{metric_ms / step_ms:.3%}"])
    print(environment())
    print_table(["ranks", "log_every", "wandb", "metric ms", "step ms", "share"], rows)
    print_result({"metric_share": shares, "most": max(shares.values()), "hook_us": hook_us()})


if __name__ == "__main__":
    main()
