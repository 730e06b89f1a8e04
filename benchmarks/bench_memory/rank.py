"""One rank of benchmarks/bench_memory: checks all systems against each other on a small table, then times their steps.

Rank 0 prints one JSON object: of each table and text, milliseconds of each system's step, on the slowest rank, fastest
of the rounds. Systems run in turn, in an order drawn anew for each round.
"""

import argparse
import gc
import json
import random
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

from benchmarks.bench_memory.problem import BATCHES, SEGMENT, STREAMS, Table, Text, read_text
from benchmarks.bench_memory.systems import SYSTEMS, Case, System
from benchmarks.harness import slowest_seconds
from foreroute.kernels.testing.cases import relative_error
from foreroute.launch.start.process import keep_freed_memory, leaving_at_once

SAME = 1e-6  # fp32, gradients added in another order
SMALL = Table(4096, 16, 2)
SLOW = "replicated"  # up to hundreds of MB a step: timed once for each size, on the first text


def make(name: str, table: Table, text: Text, *, plain: bool = False) -> System:
    """Make a system on this rank's batches."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    cotangent_TW = torch.randn(STREAMS * SEGMENT, table.width, generator=generator)
    return SYSTEMS[name](Case(table, text, cotangent_TW, plain))


def check(names: list[str], text: Text) -> None:
    """Compare the vectors that each system reads in two rounds of the batches with those of the first system.

    Raises:
        RuntimeError: they differ.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        system = make(name, SMALL, text, plain=True)
        found[name] = torch.cat([system.step(batch).clone() for batch in (*range(BATCHES), *range(BATCHES))])
        error = relative_error(found[name], found[names[0]])
        if not error <= SAME:
            raise RuntimeError(f"NOT TIMED: {name} differs from {names[0]} by {error:.1e}")


def measure(names: list[str], table: Table, text: Text, rounds: int) -> dict[str, float]:
    """Time the systems' steps on one table; milliseconds."""
    if SLOW in names:
        alone = make(SLOW, table, text)  # not beside the others: its gradient and moments are as large as the table
        alone.step(0)
        slow_ms = {SLOW: 1e3 * slowest_seconds(partial(alone.step, 1))}
        del alone
        gc.collect()
        return measure([name for name in names if name != SLOW], table, text, rounds) | slow_ms
    systems = {name: make(name, table, text) for name in names}
    for system in systems.values():
        system.step(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in random.Random(number).sample(names, len(names)):
            times[name].append(1e3 * slowest_seconds(partial(systems[name].step, (number + 1) % BATCHES)))
    return {name: min(found) for name, found in times.items()}


def main() -> None:
    """Run as one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--tables", nargs="+", required=True, help="rows,width,n of each")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--systems", nargs="+", required=True)
    parser.add_argument("--text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    texts = {kind: read_text(kind, args.text) for kind in args.texts}
    check(args.systems, next(iter(texts.values())))
    found: dict[str, dict[str, dict[str, float]]] = {}
    sizes = set()
    for kind, text in texts.items():
        found[kind] = {}
        for words in args.tables:
            table = Table(*map(int, words.split(",")))
            names = [name for name in args.systems if name != SLOW or table[:2] not in sizes]
            found[kind][words] = measure(names, table, text, args.rounds)
            sizes.add(table[:2])
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    with leaving_at_once():
        main()
