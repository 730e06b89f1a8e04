"""Time and memory of certifying a whole epoch of enwik8, and the errors of the models: `python -m
benchmarks.bench_certify`.

90,000,000 training ids, 4 layers with a table each (trigrams, 65,536 rows, 16 experts), k growing from 8 to 16, 64
ranks in expert groups of 8, 64 streams of 512: 2,746 steps, all counted. The text is a prefix of enwik8, repeated
(`--text`, or enwik8_prefix/enwik8.first4154394 in the folder FOREROUTE_DATA), or random bytes where there is none.
`--sample N` counts one step in N.

`seconds` is for building the tables and counting; `peak_bytes` is the most memory that the process held until then.
`count_mismatches`: some steps are planned for every rank, as a run does, and every number that differs
from the certificate's counts is one mismatch. `memory_model_error`: of the memory part, see
benchmarks/models/memory_model.py; `--memory-cases` measures only the first so many of its cases, and no growth.
`time_model_median_error`: of the time part, see benchmarks/models/certify_time.py, after calibrating this machine;
`--time-ways` measures only the first so many ways to train, on two ranks and one speed of the link.
"""

import argparse
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness import environment, positive, print_result, print_table
from benchmarks.harness.against import parse
from benchmarks.models.certify_time import time_model_error
from benchmarks.models.memory_model import memory_model_error
from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import FORWARD, Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import StepCounts, replay
from foreroute.engine.certificate.counts.traffic import hops, leaving
from foreroute.engine.config import Config, DataConfig, Growth, MoEConfig, ScheduleConfig, TrainConfig
from foreroute.engine.data.planned_batches import group_batch
from foreroute.engine.data.streams import Streams
from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import GroupTokens, PlannedRouter, RouterInputs

SYMBOLS, STREAMS, SEGMENT, IDS = 256, 64, 512, 90_000_000
PLACEMENT = Placement(world_size=64, expert_ranks=8, ranks_per_node=4)
PREFIX = "enwik8_prefix/enwik8.first4154394"


def epoch(ids: Ids) -> Config:
    """Return the configuration of the run: one pass over the ids."""
    data = DataConfig(streams=STREAMS, segment=SEGMENT)
    steps = Streams(ids, STREAMS, SEGMENT, 0).segments_per_epoch
    return Config(
        data=data, moe=MoEConfig(), schedule=ScheduleConfig(Growth.linear, 8, 16), train=TrainConfig(steps=steps)
    )


def read_text(path: str | None) -> Ids:
    """Read a text, or make one of random bytes."""
    found = Path(path or Path(os.environ.get("FOREROUTE_DATA", "")) / PREFIX)
    if path is None and not found.exists():
        print("no text found: random bytes")
        return np.random.default_rng(0).integers(0, SYMBOLS, IDS).astype(np.uint8)
    return np.fromfile(found, np.uint8)


def mismatches(layout: Layout, ids: Ids, routers: Sequence[PlannedRouter], steps: Sequence[int]) -> int:
    """Plan the steps for every rank and count what differs from the certificate's counts."""
    return sum(differing(layout, ids, routers, counts) for counts in replay(layout, ids, routers, steps))


def differing(layout: Layout, ids: Ids, routers: Sequence[PlannedRouter], counts: StepCounts) -> int:
    """Plan one step for every rank and count the numbers that differ."""
    streams, ranks, width = layout.read(ids), PLACEMENT.expert_ranks, layout.config.model.width
    left_ygP = leaving(hops(counts, "tokens", PLACEMENT, layout.tokens), FORWARD)[:, 0] * width * 4
    wrong = 0
    for layer, router in enumerate(routers):
        for group in range(PLACEMENT.groups):
            mesh = Mesh(group * ranks, PLACEMENT.world_size, ranks)
            batches = [
                streams.batch(counts.step, streams.streams_of(rank, 0, world=PLACEMENT.world_size, accumulation=1))
                for rank in mesh.ep_ranks
            ]
            both = group_batch(batches)
            tokens = GroupTokens(both.ids_PBQ, both.left_PBC)
            sent_PP = counts.sent_ymgPP[layer, 0, group]
            for rank in range(ranks):
                plan = router.place(Mesh(rank, ranks, ranks)).plan(tokens, counts.k)
                wrong += int((np.array(plan.send_splits) != sent_PP[rank]).sum())
                wrong += int((np.array(plan.recv_splits) != sent_PP[:, rank]).sum())
                wrong += int((plan.count_E.numpy() != counts.count_ymgE[layer, 0, group]).sum())
                wrong += int(plan.wire_bytes(width, 4) != left_ygP[layer, group, rank])
    return wrong


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="file to repeat")
    parser.add_argument("--ids", type=positive, default=IDS, help="training ids")
    parser.add_argument("--sample", type=positive, default=1, help="count one step in so many")
    parser.add_argument("--checked", type=positive, default=9, help="steps to plan for every rank")
    parser.add_argument("--memory-cases", type=positive, help="memory cases to measure")
    parser.add_argument("--time-ways", type=positive, help="ways to train to time on each cluster")
    args = parse(parser)
    ids = np.resize(read_text(args.text), args.ids)
    config = epoch(ids)
    layout = Layout(config, PLACEMENT)
    begin = time.perf_counter()
    routers = HashedRouter.build(config.moe, RouterInputs(SYMBOLS, 1, config.num_tables, ids))
    built, cpu = time.perf_counter(), time.process_time()
    found = certify(layout, ids, routers, sample=args.sample)
    done, cpu = time.perf_counter(), time.process_time() - cpu
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    last = config.train.steps - 1
    checked = sorted({round(last * i / args.checked) for i in range(1, args.checked + 1)})
    wrong = mismatches(layout, ids, routers, checked)
    print(f"{environment()}, {found.whole.steps:,} steps, {len(checked)} of them planned as a run does")
    rows: list[list[object]] = [
        ["tables", built - begin],
        ["count", done - built],
        ["of it: processor time, both cores", cpu],
    ]
    print_table(["", "seconds"], rows)
    memory_error = memory_model_error(args.memory_cases)
    time_error = time_model_error(args.time_ways)
    print_result(
        {
            "seconds": done - begin,
            "peak_bytes": peak_bytes,
            "count_mismatches": wrong,
            "time_model_median_error": time_error,
            "memory_model_error": memory_error,
        }
    )


if __name__ == "__main__":
    main()
