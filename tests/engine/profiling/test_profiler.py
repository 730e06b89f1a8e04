"""Traces of real runs on one and two ranks, read back from their files."""

import gzip
import json
import re
import threading
import time
from collections import Counter

import pytest
from torch import distributed as dist

from foreroute.engine.config import (
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    ProfileConfig,
    ScheduleConfig,
    TrainConfig,
)
from foreroute.engine.data.corpus import prepare
from foreroute.engine.errors import RunFailed, UserError
from foreroute.engine.model.build import build_routers
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.profiling import profiler
from foreroute.engine.profiling.profiler import agree_on_clock
from foreroute.engine.testing.ranks import run_ranks, run_threads
from foreroute.engine.train import trainer

LAYERS, MICRO, STEPS = 2, 2, [2, 4]
TRACED = STEPS[1] - STEPS[0] + 1


class Reporter:
    def __init__(self):
        self.notes, self.losses = [], []

    def note(self, line):
        self.notes.append(line)

    def step(self, step):
        pass

    def metrics(self, step, values, seconds_left):
        self.losses.append(values["loss"])


def train(folder, world=None, *, steps=STEPS, operators=True, stop=None, **parallel):
    """Run 5 steps with two expert layers and two micro-batches on a text of words; gives what the run said."""
    world = world or World()
    text = folder / f"words{world.mesh.rank}"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 400)
    config = Config(
        corpus=CorpusConfig(Corpus.file, str(text), cache_dir=f"{text}.cache"),
        data=DataConfig(streams=8, segment=16),
        model=ModelConfig(LAYERS, width=32, heads=2, head_width=16, memory=16),
        moe=MoEConfig(experts=4, expert_width=32, ngram=2, rows=512),
        schedule=ScheduleConfig(k_min=2, k_max=2),
        train=TrainConfig(steps=5, log_every=1, accumulation=MICRO),
        eval=EvalConfig(k=[1]),
        kernels=KernelsConfig(masked_from_k=4),
        parallel=ParallelConfig(**parallel),
        profile=ProfileConfig(steps, operators),
    )
    corpus, reporter = prepare(config.corpus), Reporter()
    routers = build_routers(config, corpus, world.mesh)
    run = trainer.Trainer(config, corpus, routers, folder, reporter, world)
    run.run(None, lambda: stop is not None and run.step >= stop)
    return reporter


def train_two(rank, folder):
    """Three runs: traced in parts and whole, and not traced; losses and notes of each."""
    hosts = (GlooGroup(dist.new_group([0, 1])) for _ in range(3))
    world = World(Mesh(rank, 2, ep_size=2), cpu_group=next(hosts), planning=next(hosts), planning_group=next(hosts))
    found = {}
    for name, steps, chunks in (("parts", STEPS, 2), ("whole", STEPS, 1), ("off", None, 2)):
        (folder / name).mkdir(exist_ok=True)
        said = train(folder / name, world, steps=steps, expert_ranks=2, chunks=chunks)
        found[name] = said.losses, said.notes
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(train_two, 2, folder)


def read(folder, name):
    return json.loads(gzip.decompress((folder / "trace" / name).read_bytes()))["traceEvents"]


def ranges_of(events, rank):
    """Of the main thread."""
    tracks = {e["args"]["name"]: e["tid"] for e in events if e["pid"] == rank and e["name"] == "thread_name"}
    return [e for e in events if e["pid"] == rank and e["tid"] == tracks["ranges"] and e["ph"] == "X"]


def flights_of(events, rank):
    return [e for e in events if e["pid"] == rank and e.get("cat") == "flight"]


def end(event):
    return event["ts"] + event["dur"]


def holds(outer, inner):
    return outer["ts"] <= inner["ts"] and end(inner) <= end(outer)


def overlap(a, b):
    return a["ts"] < end(b) and b["ts"] < end(a)


def count_in(ranges, outer_name):
    """How many ranges of each name lie in those of one name, found by comparing all with all."""
    outer = [part for part in ranges if part["name"] == outer_name]
    inside = [part for part in ranges if any(holds(o, part) for o in outer) and part not in outer]
    return Counter(part["name"] for part in inside)


@pytest.mark.dist
@pytest.mark.parametrize("name,parts", [pytest.param("parts", 2, marks=pytest.mark.slow), ("whole", 1)])
def test_every_rank_has_all_ranges_where_they_belong(two_ranks, name, parts):
    folder, _ = two_ranks
    per_pass = LAYERS * MICRO * TRACED
    moved = per_pass * parts
    in_a_pass = {
        "attention": per_pass,
        "experts": moved,
        "dispatch": moved,
        "exchange": 2 * moved,
        "combine": 2 * moved,  # before the rows go back, and when they are there
    }
    for rank in (0, 1):
        events = read(folder / name, f"step2-4.rank{rank}.json.gz")
        ranges = ranges_of(events, rank)
        for outer in ("forward", "backward"):
            assert count_in(ranges, outer) == in_a_pass
        for step in ("step 2", "step 3", "step 4"):
            found = count_in(ranges, step)
            once = {key: found[key] for key in ("optimizer", "totals", "forward", "backward", "plan_wait")}
            assert once == {"optimizer": 1, "totals": 1, "forward": MICRO, "backward": MICRO, "plan_wait": MICRO}
        assert {"step 1", "step 5"}.isdisjoint(part["name"] for part in ranges)
        others = [e for e in events if e.get("cat") == "range" and e not in ranges]
        assert {"plan"} <= {e["name"] for e in others} <= {"plan", "agree"}
        assert any(e["name"] == "aten::addmm" or e["name"] == "aten::mm" for e in events)


@pytest.mark.dist
def test_ranges_and_operators_nest_on_each_track(two_ranks):
    folder, _ = two_ranks
    tracks = {}
    for event in read(folder / "parts", "step2-4.json.gz"):
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    assert {pid for pid, _ in tracks} == {0, 1}  # both ranks are in the one file
    for events in tracks.values():
        events.sort(key=lambda e: (e["ts"], -e["dur"]))
        ends = []
        for event in events:
            while ends and ends[-1] <= event["ts"] + 0.001:
                ends.pop()
            assert not ends or end(event) <= ends[-1] + 0.001
            ends.append(end(event))


@pytest.mark.dist
def test_in_parts_rows_fly_while_experts_compute(two_ranks):
    """Whole, they never do: the negative control."""
    folder, _ = two_ranks
    for name, together in (("parts", True), ("whole", False)):
        events = read(folder / name, "step2-4.json.gz")
        for rank in (0, 1):
            experts = [part for part in ranges_of(events, rank) if part["name"] == "experts"]
            flights = flights_of(events, rank)
            assert len(flights) == 4 * LAYERS * MICRO * TRACED * (2 if together else 1)
            behind = [f for f in flights if any(overlap(f, part) for part in experts)]
            assert bool(behind) is together


@pytest.mark.dist
def test_both_ranks_have_one_clock(two_ranks):
    """A rank's rows cannot be there before the other has sent its own: each flight begins before its twin ends."""
    folder, _ = two_ranks
    events = read(folder / "whole", "step2-4.json.gz")
    own, other = (sorted(flights_of(events, rank), key=lambda f: f["ts"]) for rank in (0, 1))
    assert len(own) > 0
    for a, b in zip(own, other, strict=True):
        assert a["args"] == b["args"] and a["ts"] < end(b) and b["ts"] < end(a)


@pytest.mark.dist
def test_the_summary_adds_up_the_trace(two_ranks):
    folder, found = two_ranks
    text = (folder / "parts/trace/step2-4.txt").read_text()
    rows = text.splitlines()[2:-1]
    assert len(rows) == 10
    events = read(folder / "parts", "step2-4.json.gz")
    sums = []
    for rank in (0, 1):
        ranges = ranges_of(events, rank)
        sums.append(
            {
                f"{outer}/{name}": sum(
                    p["dur"]
                    for p in ranges
                    if p["name"] == name and any(holds(o, p) for o in ranges if o["name"] == outer)
                )
                for outer in ("forward", "backward")
                for name in ("exchange", "experts", "attention", "dispatch")
            }
        )
    compared = 0
    for row in rows:
        name, *numbers = re.sub(r"[()%]", "", row).split()
        if name in sums[0]:
            of_ranks = [one[name] / 1e3 / TRACED for one in sums]
            _, ms, own_ms, _, mean, largest, worst = map(float, numbers)
            assert (ms, own_ms) == pytest.approx((of_ranks[0],) * 2, abs=0.006)
            assert mean == pytest.approx(sum(of_ranks) / 2, abs=0.006)
            assert largest == pytest.approx(max(of_ranks), abs=0.006)
            assert of_ranks[int(worst)] == max(of_ranks)
            compared += 1
    assert compared >= 3
    waited_ms = sum(one[f"{o}/exchange"] for one in sums for o in ("forward", "backward")) / 2 / 1e3 / TRACED
    total_ms, hidden_ms = map(float, re.search(r"exchange: ([\d.]+) ms .* ([\d.]+) ms \(", text).groups())
    assert total_ms - hidden_ms == pytest.approx(waited_ms, abs=0.011)
    said = found[0]["parts"][1]
    assert said[: len(text.splitlines())] == text.splitlines()


@pytest.mark.dist
def test_a_traced_run_computes_the_same(two_ranks):
    _, found = two_ranks
    for rank in (0, 1):
        traced, off = (found[rank][name][0] for name in ("parts", "off"))
        assert len(set(off)) == 5 and traced == off


def test_one_rank_stops_before_the_last_traced_step(tmp_path):
    said = train(tmp_path, operators=False, stop=3)
    files = sorted(path.name for path in (tmp_path / "trace").iterdir())
    assert files == ["step2-3.rank0.json.gz", "step2-3.txt"]  # nothing to put together
    events = read(tmp_path, "step2-3.rank0.json.gz")
    ranges = ranges_of(events, 0)
    assert (
        count_in(ranges, "forward")
        == count_in(ranges, "backward")
        == {"attention": LAYERS * MICRO * 2, "experts": LAYERS * MICRO * 2}
    )
    assert not any(e.get("cat") == "cpu_op" for e in events)
    assert said.notes[0].startswith("steps 2 to 3: ") and "the trace of steps 2 to 3" in said.notes[-1]


def test_a_run_that_fails_leaves_its_trace(tmp_path, monkeypatch):
    def fail(*args, step, **options):
        if step == 2:  # counted from 0
            raise RunFailed("the loss is nan")
        return train_step(*args, step=step, **options)

    train_step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(RunFailed, match="the loss is nan"):
        train(tmp_path, operators=False)
    ranges = ranges_of(read(tmp_path, "step2-3.rank0.json.gz"), 0)
    assert {"step 2", "step 3"} <= {part["name"] for part in ranges}


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiler, "_write", full)
    said = train(tmp_path, operators=False)
    assert len(said.losses) == 5
    (line,) = [note for note in said.notes if "cannot" in note]
    assert line == (
        "cannot write the trace of steps 2 to 4: rank 0: [Errno 28] No space left on device; the run goes on"
    )


@pytest.mark.parametrize("steps", [[5], [5, 8, 9], [8, 5], [0, 3], []])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(UserError, match=re.escape(f"profile.steps={steps}: must be the first and")):
        ProfileConfig(steps)


def test_steps_behind_the_run_are_refused():
    with pytest.raises(UserError, match=re.escape("profile.steps=[5, 8]: must end by train.steps=7")):
        Config(train=TrainConfig(steps=7), profile=ProfileConfig([5, 8]))


@pytest.mark.parametrize("ahead_s", [0, 3600, -0.5])
def test_clocks_of_machines_that_differ_are_put_right(monkeypatch, ahead_s):
    place, true_time_ns = threading.local(), time.time_ns

    class Time:
        perf_counter_ns = staticmethod(time.perf_counter_ns)

        @staticmethod
        def time_ns():
            return true_time_ns() + (int(1e9 * ahead_s) if place.rank == 1 else 0)

    def agree(host):
        place.rank = host.rank
        return agree_on_clock(host)

    monkeypatch.setattr(profiler, "time", Time)
    first, second = run_threads(agree, 2)
    assert (first.shift_ns, first.unsure_ns) == (0, 0) and first.origin_ns == second.origin_ns
    assert abs(second.shift_ns + 1e9 * ahead_s) <= second.unsure_ns
    assert second.unsure_ns < 0.2e9
    now = time.perf_counter_ns()
    assert abs(first.us(now) - second.us(now)) <= second.unsure_ns / 1e3 + 1000
