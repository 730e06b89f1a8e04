"""The cost of metrics: `python -m benchmarks.bench_metrics` trains the quickstart for some steps in each way to log it.

    ranks      1, and 2 in one expert group
    log_every  20, as the quickstart has it, and 1
    wandb      disabled and offline

Each rank is a process of its own with one thread (benchmarks/harness/programs.py). Reported for each: the share of the
steps' time that the metrics' own code takes on rank 0, which the run measures itself (metric_ms over step_ms). The
first line is left out, since it holds the start of kernels and threads. The time of writing a line counts to the line
after it. The hooks around modules that take the times of a step's parts are not in that share: they are timed here, on
empty modules. W&B's service is a process of its own and is not counted.
"""

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from benchmarks.harness import environment, fastest, positive, print_result, print_table
from benchmarks.harness.against import parse
from benchmarks.harness.programs import start_training
from foreroute.engine.metrics.timers import StepTimer
from foreroute.engine.model.attention import RelativeAttention
from foreroute.engine.testing.ranks import rank_environments

CALLS = 10_000  # of an empty module, to time its hooks


class _Empty(RelativeAttention):
    """A module that StepTimer watches and that does nothing."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self) -> None:  # type: ignore[override]
        """Do nothing."""


def hook_us() -> float:
    """Return the microseconds that the hooks around one module cost."""

    def call(module: nn.Module) -> None:
        for _ in range(CALLS):
            module()

    bare, watched = _Empty(), _Empty()
    timer = StepTimer(watched, torch.device("cpu"))

    def call_in_step() -> None:
        timer.begin()
        with timer.phase("forward"):
            call(watched)

    return (fastest(call_in_step) - fastest(lambda: call(bare))) / CALLS * 1e6


def train(folder: Path, experiment: str, ranks: int, log_every: int, wandb: str, steps: int) -> list[dict[str, Any]]:
    """Train; return the lines of training.

    Raises:
        SystemExit: the run failed.
    """
    name = f"{ranks}-{log_every}-{wandb}"
    options = [
        f"experiment={experiment}",
        f"train.name={name}",
        f"train.runs_dir={folder}",
        f"train.steps={steps}",
        f"train.log_every={log_every}",
        "train.threads=1",
        f"parallel.expert_ranks={ranks}",
        f"wandb.mode={wandb}",
        f"optim.warmup_steps={min(50, steps - 1)}",
        "kernels.masked_from_k=16",
        "eval.k=[4]",
        "eval.max_symbols=1024",
    ]
    environments = rank_environments(ranks) if ranks > 1 else [{**os.environ, "OMP_NUM_THREADS": "1"}]
    with ExitStack() as until_end:
        programs = [until_end.enter_context(start_training(options, each)) for each in environments]
        for code, _, err in [program.wait() for program in programs]:
            if code != 0:
                raise SystemExit(f"{name} ended with {code}:\n{err[-2000:]}")
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of metrics in a run, from its lines but the first."""

    metric_ms: float  # of a step, mean
    step_ms: float  # mean
    median_share: (
        float  # of metric_ms in step_ms, median over the lines: without those in which other work took the core
    )

    @property
    def share(self) -> float:
        """Of all time."""
        return self.metric_ms / self.step_ms


def cost(lines: list[dict[str, Any]]) -> Cost:
    """Sum up lines of equally many steps."""
    metric_ms, step_ms = ([line[name] for line in lines[1:]] for name in ("metric_ms", "step_ms"))
    shares = [metric / step for metric, step in zip(metric_ms, step_ms, strict=True)]
    return Cost(mean(metric_ms), mean(step_ms), median(shares))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=100, help="of each run; a multiple of 20, at least 40")
    parser.add_argument("--experiment", default="quickstart", help="of conf/experiment")
    args = parse(parser)
    if args.steps % 20 or args.steps < 40:
        parser.error(f"--steps {args.steps}: must be a multiple of 20 and at least 40 (the first line is left out)")
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks, log_every, wandb in product((1, 2), (20, 1), ("disabled", "offline")):
            lines = train(Path(folder), args.experiment, ranks, log_every, wandb, args.steps)
            one = found[f"{ranks} ranks, log_every {log_every}, {wandb}"] = cost(lines)
            rows.append(
                [ranks, log_every, wandb, one.metric_ms, one.step_ms, f"{one.share:.3%}", f"{one.median_share:.3%}"]
            )
    print(environment())
    print_table(["ranks", "log_every", "wandb", "metric ms", "step ms", "share", "median"], rows)
    print_result(
        {
            "metric_share": {name: one.share for name, one in found.items()},
            "median_share": {name: one.median_share for name, one in found.items()},
            "most": max(one.share for one in found.values()),
            "hook_us": hook_us(),
        }
    )


if __name__ == "__main__":
    main()
