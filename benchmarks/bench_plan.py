"""Time of planning a micro-batch for one rank of eight: `python -m benchmarks.bench_plan`.

The published batch of SMoE-Dropout on each rank, 22 streams of 512: 11,264 tokens, 16 experts, 8 active, trigrams in
65,536 rows. `plan_ms` is for one table and one core, from the ids of all eight ranks to the plan; the lookups that are
made once for each k are listed beside it. `plan_wait_fraction` is the share of step time for which a training step of
the published model (4 streams, one rank) waits for its plan while the loader's thread plans for eight ranks, 4 tables.
"""

import argparse

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_step import Arm, shapes
from benchmarks.harness import environment, fastest, print_result, print_table
from benchmarks.harness.against import parse
from foreroute.engine.config import Split
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.streams import Streams
from foreroute.engine.metrics.step_meter import StepMeter
from foreroute.engine.model.build import RunModel, build_model, run_tables
from foreroute.engine.optim.deepspeed_engine import start
from foreroute.engine.routing.plan import Plan
from foreroute.engine.routing.planner import TablePlanner
from foreroute.engine.routing.routers import Draw, HashedRouter
from foreroute.launch.start.process import keep_freed_memory, run_and_leave

RANKS, STREAMS, SEGMENT, K = 8, 22, 512, 8


class GroupRouter(HashedRouter):
    """Plans for one rank of eight, as on eight GPUs, and then gives the plan of the one rank that really runs."""

    def plan(
        self,
        ids_PBQ: Tensor,
        left_PBC: Tensor,
        k: int,
        *,
        draw: Draw | None = None,
        gather: bool = False,
        chunks: int = 1,
    ) -> Plan:
        """Plan twice: for rank 3 of eight and for the one rank that runs."""
        everyone = torch.cat([ids_PBQ] * RANKS), torch.cat([left_PBC] * RANKS)
        self.group.plan(*everyone, k)
        return super().plan(ids_PBQ, left_PBC, k, gather=gather, chunks=chunks)

    @property
    def group(self) -> HashedRouter:
        """The router of rank 3 of eight."""
        if not hasattr(self, "_group"):
            self._group = HashedRouter(self.table, rank=3, ranks=RANKS)
        return self._group


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=6, help="training steps for plan_wait_fraction")
    args = parse(parser)
    keep_freed_memory()
    step = argparse.Namespace(dropout=0.1, precision="fp32")
    config = shapes(step)
    corpus = prepare(config.corpus)
    tables = run_tables(config, corpus)
    streams = Streams(corpus.split(Split.train), RANKS * STREAMS, SEGMENT, config.context)
    batch = streams.batch(0, range(RANKS * STREAMS))
    ids_PBQ = batch.ids_BQ.view(RANKS, STREAMS, SEGMENT)
    left_PBC = batch.left_BC.view(RANKS, STREAMS, -1)
    router = HashedRouter(tables[0], rank=3, ranks=RANKS)
    table_rows = [router.table.rows_of(*pair) for pair in zip(ids_PBQ, left_PBC, strict=True)]
    row_PT = np.stack([rows.flatten().numpy() for rows in table_rows])
    planner = TablePlanner(router.table, rank=3, ranks=RANKS)
    plan = planner.plan(row_PT, K)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = {
        "ids to plan": 1e3 * fastest(lambda: router.plan(ids_PBQ, left_PBC, K), args.rounds),
        "of it: table rows to plan": 1e3 * fastest(lambda: planner.plan(row_PT, K), args.rounds),
        "lookups, once for each k": 1e3 * fastest(lambda: planner._look_up(K), 5),
    }
    torch.set_num_threads(threads)

    model = build_model(config, corpus.vocab.size)
    engine = start(model, config)
    run = RunModel(config, corpus, model, [GroupRouter(table) for table in tables])
    arm = Arm(run, engine, StepMeter(model, engine.device), K)
    for _ in range(args.steps + 1):
        arm()
    arm.loader.close()
    wait = sum(t.plan_wait_ms for t in arm.times[1:]) / sum(t.step_ms for t in arm.times[1:])
    rows = plan.chunks[0].rows
    print(f"{environment()}, {rows.num_rows} expert rows over {rows.num_inputs} received")
    print_table(["one table, one core", "ms"], [[name, ms] for name, ms in times.items()])
    print_result({"plan_ms": times["ids to plan"], "plan_wait_fraction": wait})


if __name__ == "__main__":
    run_and_leave(main)
