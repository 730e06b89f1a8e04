"""One rank that measures links and shared cores for benchmarks/calibrate.py; rank 0 prints one JSON object.

    message_us    of an all-to-all of one number per rank, over its messages to other ranks
    gb_per_s      bytes that leave a rank (inside) in an all-to-all of 1 MiB per rank, over the time beyond that of the
    messages slowdown      a small model's forward and backward on all ranks at once, against rank 0 alone while the
    others wait overlap       of such an all-to-all and about as long a computation at once: the time saved over one
    after the other, as a
                  share of the shorter one

Each is the fastest of several rounds, of the slowest rank. Started by benchmarks/machines/cluster.py.
"""

import json
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed as dist

from benchmarks.harness import slowest_seconds
from foreroute.engine.config import Config, DataConfig, EvalConfig, ModelConfig, MoEConfig
from foreroute.engine.model.build import build_model
from foreroute.engine.routing.plan import Routing
from foreroute.launch.start.process import keep_freed_memory, leaving_at_once

_ROUNDS = 12
_SYMBOLS = 64
SHARED = Config(
    data=DataConfig(streams=4, segment=48),
    model=ModelConfig(2, 112, heads=4, head_width=28, memory=48, dropout=0.0),
    moe=MoEConfig(router="frozen", experts=8, expert_width=144),
    eval=EvalConfig(k=[1]),
)
"""The computation of all ranks at once; no configuration that is ever predicted."""


def fastest(case: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """Return the seconds of a case that all ranks start together."""
    return min([slowest_seconds(case) for _ in range(rounds + 2)][2:])


def all_to_all_seconds(numbers: int) -> float:
    """Return the seconds of an all-to-all of so many fp32 numbers to each rank."""
    rows = torch.zeros(dist.get_world_size() * numbers)
    got = torch.empty_like(rows)
    return fastest(lambda: dist.all_to_all_single(got, rows))


def overlap(run: Callable[[], object], run_s: float, numbers: int, exchange_s: float) -> float:
    """Return the share of the shorter of exchange and computation that is hidden when both run at once."""
    rows = torch.zeros(dist.get_world_size() * numbers)
    got = torch.empty_like(rows)
    repeats = max(1, round(exchange_s / run_s))

    def both() -> None:
        work = dist.all_to_all_single(got, rows, async_op=True)
        for _ in range(repeats):
            run()
        work.wait()

    saved = exchange_s + repeats * run_s - fastest(both)
    return min(1.0, max(0.0, saved / min(exchange_s, repeats * run_s)))


def computation() -> Callable[[], object]:
    """Return a forward and backward pass of a small model."""
    model = build_model(SHARED, _SYMBOLS)
    ids_BQ = torch.zeros(SHARED.data.streams, SHARED.data.segment, dtype=torch.long)

    def run() -> None:
        for _ in range(3):
            model(ids_BQ, ids_BQ, None, Routing(2)).loss.backward()

    return run


def main() -> None:
    """Run as one rank."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    ranks, rank = dist.get_world_size(), dist.get_rank()
    run = computation()
    all_s = fastest(run)
    alone = fastest(lambda: run() if rank == 0 else None)
    small, large = 1, 1 << 18
    small_s, large_s = all_to_all_seconds(small), all_to_all_seconds(large)
    found = {
        "message_us": 1e6 * small_s / (ranks - 1),
        "bytes": 4 * large,
        "bytes_s": large_s - small_s,
        "slowdown": all_s / alone,
        "overlap": overlap(run, all_s, large, large_s),
    }
    if rank == 0:
        print(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    with leaving_at_once():
        main()
