"""Run one rank of a run alone: `python -m launch.replay experiment=NAME world_size=512 rank=317 step=40`.

The certificate's counts pick the places, a rank in a step: those with most rows, most bytes and most memory, and the
median. Each is run in a process of its own, with nothing but this machine: batches, plans, model, DeepSpeed's shards
and kernels are those of the run, and the other ranks are answered for (engine/replay/answers.py). Prints the key
figures and writes replay.html and replay.json, measured numbers beside those that the certificate predicts.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.certificate.memory.peak import largest_number
from foreroute.engine.certificate.memory.sizes import runs_on_gpu
from foreroute.engine.certificate.time.step_time import StepModel
from foreroute.engine.config import Split
from foreroute.engine.config.option import option
from foreroute.engine.data.corpus import PreparedCorpus, prepare
from foreroute.engine.errors import UserError, require
from foreroute.engine.model.adaptive import clusters, target_shares
from foreroute.engine.model.build import build_routers
from foreroute.engine.ngram_tables.tables import table_keys
from foreroute.engine.parallel.world import World
from foreroute.engine.replay.places import Chosen, Place, Places, expected_at, with_streams
from foreroute.engine.replay.rank import StepPlan
from foreroute.engine.replay.traffic_file import MOST_RANKS, write_traffic
from foreroute.engine.routing.planned_router import PlannedRouter
from foreroute.engine.train.resolve import resolve
from foreroute.launch.page.html_file import html
from foreroute.launch.page.terminal import print_top
from foreroute.launch.replay.apart import DoesNotFit, replay_apart
from foreroute.launch.replay.replay_page import Outcome, replay_page
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.on_ranks import OnRanks, check_folder
from foreroute.launch.start.process import set_up

HTML, JSON = "replay.html", "replay.json"
WORST, MEDIAN = "worst", "median"
_ROUNDS = 3  # times that a single step is timed


@dataclass
class ReplayArgs(OnRanks):
    """Options: a run's configuration, the ranks it is to run on, and which of them to run in which step."""

    rank: str = option(WORST, "The rank to run: its number, worst (and the median beside it), or median.")
    step: str = option(WORST, "The step, counted from 1: its number, FIRST:LAST, worst, or median.")
    find: str | None = option(
        None, "batch: run the place with most memory with more and more streams and find the most that fit."
    )
    trace: str | None = option(
        None, "Also write the bytes from rank to rank of each counted step into this CSV file, .csv or .csv.gz."
    )
    out: str | None = option(None, "Folder of what is written; None means replays/ and train.name.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.moe.dense, "moe.router=dense: launch.replay picks its places by expert rows")
        if self.rank.isdecimal():
            require(int(self.rank) < self.world_size, f"rank={self.rank}: must be below world_size={self.world_size}")
        else:
            require(self.rank in (WORST, MEDIAN), f"rank={self.rank}: must be a number, {WORST} or {MEDIAN}")
        _ = self.given_steps  # refuses a wrong step
        require(self.find in (None, "batch"), f"find={self.find}: must be batch")
        require(
            self.find is None or self.device_memory_bytes is not None or torch.cuda.is_available(),
            "find=batch: needs device_memory_gb=GB on a CPU, the memory that a rank may use",
        )
        require(
            self.trace is None or self.trace.endswith((".csv", ".csv.gz")),
            f"trace={self.trace}: must be a file that ends in .csv or .csv.gz",
        )
        require(
            self.trace is None or self.world_size <= MOST_RANKS,
            f"trace with world_size={self.world_size}: at most {MOST_RANKS} ranks",
        )

    @property
    def given_steps(self) -> range:
        """The steps that were named, counted from 0; all that are to be counted where none was."""
        if self.step in (WORST, MEDIAN):
            return self.layout.counted_steps(self.steps, self.sample)
        first, _, last = self.step.partition(":")
        last = last or first
        fine = first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= self.train.steps
        require(
            fine,
            f"step={self.step}: must be {WORST}, {MEDIAN}, a number or FIRST:LAST, from 1 to"
            f" train.steps={self.train.steps}",
        )
        return range(int(first) - 1, int(last))

    @property
    def many(self) -> bool:
        """Whether all steps of a range are run."""
        return ":" in self.step


@dataclass(frozen=True, slots=True)
class _Run:
    """The run, for all places."""

    args: ReplayArgs
    layout: Layout  # resolved for this machine
    corpus: PreparedCorpus
    routers: Sequence[PlannedRouter]
    gpu: bool  # memory is predicted for a GPU

    def counted(self, layout: Layout) -> list[Chosen]:
        """Count the named steps and choose places among the named ranks, for all reasons."""
        args, corpus = self.args, self.corpus
        found = Places(layout, corpus.vocab.size, self.gpu, self._ranks)
        starts = corpus.document_starts(Split.train)
        for counts in replay(layout, corpus.split(Split.train), self.routers, args.given_steps, starts):
            found.add(counts)
        return found.choose()

    def places(self) -> list[Chosen]:
        """Return the places that were asked for."""
        args, chosen = self.args, self.counted(self.layout)
        if MEDIAN in (args.rank, args.step):
            chosen = [place for place in chosen if MEDIAN in place.why]
        if self._ranks is not None and len(args.given_steps) == 1:
            chosen = [Chosen("as asked", chosen[0].place)]
        return chosen

    @property
    def _ranks(self) -> list[int] | None:
        return [int(self.args.rank)] if self.args.rank.isdecimal() else None

    def outcome(self, chosen: Chosen) -> Outcome:
        """Run a place."""
        args, place = self.args, chosen.place
        steps = args.given_steps if args.many else range(place.step, place.step + 1)
        print(f"rank {place.rank} of {args.world_size:,}, step {_named(steps)}: {chosen.why} ...", flush=True)
        rounds = 1 if args.many else _ROUNDS
        apart = replay_apart(self.layout, place.rank, StepPlan(list(steps), rounds))
        keys = table_keys(args.ngram_tables, self.corpus.vocab.size, args.train.seed)
        expected = [
            expected_at(
                self.layout,
                self.corpus.split(Split.train),
                self.routers,
                Place(step, place.rank),
                vocab=self.corpus.vocab.size,
                gpu=self.gpu,
                document_starts=self.corpus.document_starts(Split.train),
                table_keys=keys,
            )
            for step in steps
        ]
        model = None
        if args.cluster is not None:
            shares = target_shares(
                self.corpus.split(Split.train), clusters(self.layout.config.model, self.corpus.vocab.size)
            )
            model = StepModel(args.layout, args.cluster, self.corpus.vocab.size, shares)
        modelled = [model.time(one.counts) for one in expected] if model else []
        return Outcome(chosen, list(steps), apart, expected, modelled)


def run(args: ReplayArgs) -> int:
    """Choose, run, print and write; return the exit code."""
    folder = Path(args.out or Path("replays") / args.train.name)
    check_folder(folder)
    set_up(args.train.threads)
    corpus = prepare(args.corpus, print)
    run = _prepared(args, corpus)
    if args.trace is not None:
        _trace(run, Path(args.trace))
    if args.find is not None:
        return _find_batch(run)
    begin, steps = time.perf_counter(), run.args.given_steps
    chosen = run.places()
    took = f"counted in {time.perf_counter() - begin:.1f} s"
    print(f"{len(steps):,} step{'s' * (len(steps) > 1)} of {args.world_size:,} ranks {took}")
    outcomes = [run.outcome(place) for place in chosen]
    described = replay_page(outcomes, run.layout, args.cluster)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HTML).write_text(html(described), encoding="ascii")
    (folder / JSON).write_text(json.dumps([one.plain() for one in outcomes], indent=1) + "\n", encoding="ascii")
    print_top(described)
    print(f"all of it: {folder / HTML}, {folder / JSON} with every number")
    return 0 if all(one.as_certified for one in outcomes) else 1


def _prepared(args: ReplayArgs, corpus: PreparedCorpus) -> _Run:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = args.layout
    layout.check()
    layout = replace(layout, config=resolve(layout.config, World(device=device)))
    gpu = runs_on_gpu(layout.config.kernels.backend, None)
    return _Run(args, layout, corpus, build_routers(layout.config, corpus) or [], gpu)


def _named(steps: Sequence[int]) -> str:
    first, last = steps[0] + 1, steps[-1] + 1
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _trace(run: _Run, path: Path) -> None:
    args, corpus = run.args, run.corpus
    require(args.sample == 1, f"trace with sample={args.sample}: every step is written")
    check_folder(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = args.given_steps
    total = write_traffic(
        path, run.layout, corpus.split(Split.train), run.routers, steps, corpus.document_starts(Split.train)
    )
    print(f"{path}: {total:,} bytes of {len(steps):,} steps, by step, source and destination")


def _find_batch(run: _Run) -> int:
    """Find the most streams of a rank in a micro-batch that fit, by running them."""
    allowed = run.args.device_memory_bytes
    if allowed is None:
        allowed = torch.cuda.get_device_properties(0).total_memory

    def fits(streams: int) -> bool:
        layout = with_streams(run.layout, streams)
        try:
            chosen = next(place for place in run.counted(layout) if "most memory" in place.why)
        except UserError as error:
            print(f"{streams} streams: {error}")
            return False
        rank, step = chosen.place.rank, chosen.place.step
        try:
            held = replay_apart(layout, rank, StepPlan([step], rounds=0)).rank.held
        except DoesNotFit as error:
            print(f"{streams} streams: rank {rank}, step {step + 1}: {error}")
            return False
        most = max(one.most for one in held)
        print(f"{streams} streams: rank {rank}, step {step + 1}: {most / 1e9:.4g} GB at the peak", flush=True)
        return most <= allowed

    found = largest_number(fits, run.layout.streams)  # a question is a run
    print(f"at most {found} streams of a rank in a micro-batch fit into {allowed / 1e9:.4g} GB")
    return 0


def main() -> None:
    """Entry point."""
    run_program("replay", ReplayArgs, run)
