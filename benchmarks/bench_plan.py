"""Time of planning a micro-batch for one rank of a group: `python -m benchmarks.bench_plan`.

Published: the batch of SMoE-Dropout on each of 8 ranks, 22 streams of 512: 11,264 tokens, 16 experts. At scale: 64
ranks with 8,192 tokens each, 128 experts, 48 tables. Both with 8 active experts and trigrams in 65,536 rows. `plan_ms`
is of one table on one core, from the ids of all ranks to the plan, with its share of the keys, which are made once for
all tables. `scale_ms` is of one of the 48 tables at scale, planned together by PyTorch's threads. `lookup_mib` is what
a table keeps for each k at scale.

--build N builds N tables of 2**20 rows and 64 experts, uniform weights, and prints seconds and memory beyond them.

`plan_wait_fraction`: the loader's thread reads and plans 48 tables at scale, while a step of 15,000 tokens a second and
rank leaves the host alone; the share of the time that the step waits for its plans.

`rows_ms` is of one n-gram table of 16 heads (pairs and triples, 2**20 rows each) with the published batch: one rank's
distinct rows, and the order of what it sends, beside hosts that answer at once with lists as long as its own.
`rows_wait_fraction` is as plan_wait_fraction, of that table and the published batch: 8 x 11,264 tokens x 16 heads. It
may be 0.01. `rows_of_all_ms` is of the distinct rows of all 8 ranks in one thread, as if each host planned for all.
"""

import argparse
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from numpy.typing import NDArray

from benchmarks.bench_step import shapes
from benchmarks.harness import environment, fastest, print_result, print_table
from benchmarks.harness.against import parse
from foreroute.engine.config import RouteWeights, Split
from foreroute.engine.data.corpus import PreparedCorpus, prepare
from foreroute.engine.data.loader import PlannedLoader
from foreroute.engine.data.planned_batches import GroupBatch, PlannedBatch, group_batch, plan_batch
from foreroute.engine.data.streams import Streams
from foreroute.engine.ngram_tables.hash_keys import hash_keys
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import GroupTokens, plan_all
from foreroute.engine.routing.plans.planner import Planner
from foreroute.engine.routing.plans.row_plan import Distinct, TableRows, distinct_rows, plan_rows
from foreroute.engine.routing.tables import Table, build_tables
from foreroute.launch.start.process import keep_freed_memory, leaving_at_once

K, RANK, SEGMENT, TOKENS_PER_SECOND = 8, 3, 512, 15_000
ROWS = hash_keys((2, 3), 8, 1 << 20, vocab_size=256, seed=1111, table=0)
CONFIG = shapes(argparse.Namespace(dropout=0.1, precision="fp32"))


@dataclass(frozen=True)
class Group:
    """An expert group and its tables."""

    ranks: int
    streams: int  # of a rank
    experts: int
    layers: int
    tables: int  # that differ; layers take turns with them

    @property
    def tokens(self) -> int:
        """Tokens of a rank."""
        return self.streams * SEGMENT


PUBLISHED = Group(ranks=8, streams=22, experts=16, layers=4, tables=1)
SCALE = Group(ranks=64, streams=16, experts=128, layers=48, tables=6)


class Echo(CpuGroup):
    """Hosts that ask each rank for what it asks of them."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def all_to_all(self, parts: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        return list(parts)


class Simulated:
    """One rank of a group that reads a text."""

    def __init__(self, group: Group, corpus: PreparedCorpus, cache_dir: Path) -> None:
        """Build the tables."""
        ids = corpus.split(Split.train)
        self.group, self.streams = group, Streams(ids, group.ranks * group.streams, SEGMENT, CONFIG.context)
        moe, size = replace(CONFIG.moe, experts=group.experts), corpus.vocab.size
        self.tables = build_tables(moe, size, ids, num_tables=group.tables, seed=1111, cache_dir=cache_dir)
        self.routers = [self._router(self.tables[layer % group.tables]) for layer in range(group.layers)]

    def _router(self, table: Table) -> HashedRouter:
        return HashedRouter(table).place(Mesh(RANK, self.group.ranks, self.group.ranks))

    def read(self, step: int, micro: int = 0) -> GroupBatch:
        """Read what every rank trains on."""
        size = self.group.streams
        rows = [range(rank * size, (rank + 1) * size) for rank in range(self.group.ranks)]
        return group_batch([self.streams.batch(step, streams) for streams in rows], RANK)

    def planned(self, step: int, micro: int) -> PlannedBatch:
        """Plan what every rank trains on, for all layers."""
        return plan_batch(self.read(step, micro), K, self.routers)

    def times_ms(self, rounds: int) -> dict[str, float]:
        """Measure one table, and its share of the keys of all."""
        batch, router = self.read(0), self.routers[0]
        ids, rows = GroupTokens(batch.ids_PBQ, batch.left_PBC), router.table.key_rows
        choice = router.choose(ids, K)
        planner = Planner(router.experts, rank=RANK, ranks=self.group.ranks)
        found = {
            "keys, once for all tables": lambda: GroupTokens(batch.ids_PBQ, batch.left_PBC).keys(rows),
            "keys to table rows": lambda: rows.narrow(ids.keys(rows)),
            "table rows to plan": lambda: planner.plan(choice, K),
            "lookups, once for each k": lambda: self._router(router.table).lookups(K),
        }
        return {name: 1e3 * fastest(case, rounds) for name, case in found.items()}

    def wait_fraction(self, steps: int, *, rows: bool = False) -> float:
        """Measure the share of time that steps wait for their plans.

        Args:
            rows: of the n-gram table instead of the experts' tables.
        """
        step_s = self.group.tokens / TOKENS_PER_SECOND
        batches = Rows(self) if rows else self
        loader = PlannedLoader(batches, steps=range(steps + 1), accumulation=1, prefetch=2)
        waits = []
        for _ in range(steps + 1):
            waits.append(loader.next()[1])
            time.sleep(step_s)
        loader.close()
        return sum(waits[1:]) / (sum(waits[1:]) + steps * step_s)

    def rows_of(self, step: int) -> list[TableRows]:
        """Plan the rows of one rank's n-gram table."""
        own = self.streams.batch(step, range(RANK * self.group.streams, (RANK + 1) * self.group.streams))
        return plan_rows([ROWS], [own], Echo(self.group.ranks))

    def rows_of_all(self) -> list[Distinct]:
        """Find the distinct rows of every rank's n-gram table, as one host would for all."""
        group, batch = self.group, self.read(0)
        rows = [ROWS.rows_of(*own).numpy() for own in zip(batch.ids_PBQ, batch.left_PBC, strict=True)]
        return [distinct_rows(own, ROWS.rows, group.ranks) for own in rows]

    def table_ms(self, rounds: int) -> float:
        """Measure all tables together; return the time for each."""
        batch = self.read(0)
        seconds = fastest(lambda: plan_all(self.routers, GroupTokens(batch.ids_PBQ, batch.left_PBC), K), rounds)
        return 1e3 * seconds / len(self.routers)


@dataclass(frozen=True)
class Rows:
    """The batches of one rank with the rows of its n-gram table alone."""

    of: Simulated

    def planned(self, step: int, micro: int) -> PlannedBatch:
        """Read a batch and plan its rows."""
        return plan_batch(self.of.read(step), K, None, table_rows=self.of.rows_of(step)[micro])


def build_cost(corpus: PreparedCorpus, tables: int) -> tuple[float, float]:
    """Build large tables; return seconds, and the most GB that this process took beyond them."""
    moe = replace(CONFIG.moe, experts=64, rows=1 << 20, weights=RouteWeights.uniform)
    ids, size = corpus.split(Split.train), corpus.vocab.size
    build_tables(replace(moe, rows=64), size, ids, num_tables=1, seed=1, cache_dir=None)  # compiles
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    built = build_tables(moe, size, ids, num_tables=tables, seed=1, cache_dir=None)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, (peak - before - sum(table.order_rE.nbytes for table in built)) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=6, help="steps for plan_wait_fraction")
    parser.add_argument("--build", type=int, metavar="N", help="tables to build, 12 take minutes; none by default")
    args = parse(parser)
    corpus, cache_dir = prepare(CONFIG.corpus), Path(CONFIG.corpus.cache_dir) / "tables"
    if args.build:
        seconds, beyond = build_cost(corpus, args.build)
        print(f"{args.build} tables of 2**20 rows and 64 experts: {seconds:.1f} s, {beyond:.2f} GB beyond them")
    keep_freed_memory()
    published, scale = (Simulated(group, corpus, cache_dir) for group in (PUBLISHED, SCALE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    columns = [each.times_ms(args.rounds) for each in (published, scale)]
    totals = [each.table_ms(args.rounds) for each in (published, scale)]
    torch.set_num_threads(threads)
    scale_ms, wait = scale.table_ms(args.rounds), scale.wait_fraction(args.steps)
    rows_ms = 1e3 * fastest(lambda: published.rows_of(0), args.rounds)
    rows_of_all_ms = 1e3 * fastest(published.rows_of_all, min(3, args.rounds))
    rows_wait = published.wait_fraction(args.steps, rows=True)
    lookups = scale.routers[0].lookups(K).nbytes / 2**20
    print(f"{environment()}, lookups of {lookups:.2f} MiB a table and k at scale, waiting {100 * wait:.3f} % of a step")
    rows = [[name, *(times[name] for times in columns)] for name in columns[0]]
    rows += [["ids to plan", *totals], [f"ids to plan, {threads} threads", "", scale_ms]]
    print_table(["one table, one core, ms", "8 ranks", "64 ranks"], rows)
    print(
        f"rows of one n-gram table of {ROWS.heads} heads: {rows_ms:.1f} ms, of all ranks {rows_of_all_ms:.1f} ms, "
        f"waiting {100 * rows_wait:.3f} % of a step"
    )
    result = {"plan_ms": totals[0], "scale_ms": scale_ms, "lookup_mib": lookups, "plan_wait_fraction": wait}
    print_result({**result, "rows_ms": rows_ms, "rows_of_all_ms": rows_of_all_ms, "rows_wait_fraction": rows_wait})


if __name__ == "__main__":
    with leaving_at_once():
        main()
