"""One rank of benchmarks/bench_exchange.py: builds all systems, checks them against each other, times them in turn.

Started by benchmarks/cluster.py with the launcher variables. Rank 0 prints one JSON object; each time in it is that of the
slowest rank, and the fastest of the rounds.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed as dist

from benchmarks.exchange_problem import (
    BUILDERS,
    PUBLISHED,
    QUICK,
    Bytes,
    Problem,
    autoep_bytes,
    make_problem,
    moe_bytes,
    planned_bytes,
)
from benchmarks.exchange_systems import start_deepspeed, systems
from benchmarks.harness import GradCase
from benchmarks.traffic import KINDS, Meter
from kernels.testing import relative_error
from launch.process import keep_freed_memory

SAME_OUTPUT = 1e-5  # fp32, sums in another order
# A hidden unit within rounding of 0 is active for one system and not for another, a few of the 17 million of a layer;
# one misplaced row of a rank's 8,192 would be 1e-2.
SAME_GRADIENT = 2e-3
EXPECTED = {"ours": planned_bytes, "moe": moe_bytes, "autoep": autoep_bytes}


def differences(cases: dict[str, GradCase]) -> dict[str, dict[str, float]]:
    """Relative errors of each system's results to those of ours."""
    truth = cases["ours"].results()
    found = {}
    for name, case in cases.items():
        results = case.results()
        found[name] = {
            key: relative_error(results[key].reshape(want.shape), want)
            for key, want in truth.items()
        }
    return found


def slowest(seconds: float) -> float:
    """The slowest rank's time."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def total(*values: int) -> Bytes:
    """Sum over the ranks."""
    found = torch.tensor(values)
    dist.all_reduce(found)
    return Bytes(*found.tolist())


def timed(case: Callable[[], object]) -> float:
    """Milliseconds of the slowest rank, all starting together."""
    dist.barrier()
    start = time.perf_counter()
    case()
    return 1e3 * slowest(time.perf_counter() - start)


def measure(problem: Problem, per_node: int, rounds: int) -> dict[str, dict[str, float]]:
    """Check all systems on one problem, then time their steps, their computation alone and their exchange alone, in turn.

    Raises:
        RuntimeError: the systems do not compute the same, or send something else than what was counted beforehand.
    """
    rank = dist.get_rank()
    cases = systems(problem, problem.plans(rank), rank)
    for name, errors in differences(cases).items():
        for key, error in errors.items():
            if not error <= (SAME_OUTPUT if key == "out" else SAME_GRADIENT):
                raise RuntimeError(f"NOT TIMED: {name} differs from ours in {key} by {error:.1e}")
    meter = Meter(per_node)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, case in cases.items():
        runs |= {(name, kind): run for kind, run in meter.kinds(case).items()}
    sent = {name: EXPECTED[name](problem, per_node) for name in cases}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for number in range(rounds):
        for name, kind in random.Random(number).sample(list(runs), len(runs)):
            times[name, kind].append(timed(runs[name, kind]))
            found = total(meter.traffic.left_bytes, meter.traffic.crossed_bytes)
            if kind == "step" and found != sent[name]:
                raise RuntimeError(f"{name} sent {found}, counted beforehand: {sent[name]}")
    result = {}
    for name in cases:
        step, compute, exchange = (min(times[name, kind]) for kind in KINDS)
        result[name] = {
            "step_ms": step, "exchange_ms": exchange, "exposed_ms": step - compute, "compute_ms": compute,
            **sent[name]._asdict(),
        }  # fmt: skip
    return result


def main() -> None:
    """Run as one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--per-node", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    start_deepspeed()
    shape, ranks = QUICK if args.quick else PUBLISHED, dist.get_world_size()
    found = {}
    for tables in BUILDERS:
        found[tables] = measure(make_problem(shape, tables, ranks), args.per_node, args.rounds)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
