"""Runs on 1, 2 and 4 ranks: rows and bytes of every step, micro-batch, layer and rank are the certificate's.

The text is read in 45 steps: runs of 60 go on into a second epoch, those of 100 into a third. Each run is held to its
certificate; those that differ from it in one step end there.
"""

import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed as dist

from foreroute.engine.certificate.check import Check
from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import FORWARD, Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.certificate.counts.traffic import hops, leaving
from foreroute.engine.certificate.record import Record, read
from foreroute.engine.config import (
    Builder,
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    Growth,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    NgramTablesConfig,
    OptimConfig,
    ParallelConfig,
    RouteWeights,
    ScheduleConfig,
    Split,
    TrainConfig,
    WireFormat,
    to_plain,
)
from foreroute.engine.config.enums import ExchangeKind, PeerIds
from foreroute.engine.data import planned_batches as batches_module
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.documents import NO_STARTS
from foreroute.engine.errors import RunFailed
from foreroute.engine.model.build import build_routers
from foreroute.engine.ngram_tables.tables import table_keys
from foreroute.engine.parallel.cpu_group import GlooGroup, expert_cpu_group
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.routing.k_schedule import active_experts
from foreroute.engine.testing.ranks import change_certificate, run_ranks
from foreroute.engine.train.trainer import Trainer

STEPS, WIDTH, EXPERTS, LAYERS, SEGMENT, STREAMS = 60, 8, 4, 2, 4, 4
FEW = 12  # steps of a negative control


def plain(folder, expert_ranks, **parallel):
    return Config(
        corpus=CorpusConfig(Corpus.file, str(folder / "text.txt"), cache_dir=str(folder / "cache")),
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        model=ModelConfig(layers=LAYERS, width=WIDTH, heads=1, head_width=8, memory=4),
        moe=MoEConfig(experts=EXPERTS, expert_width=8, ngram=2, rows=512),
        schedule=ScheduleConfig(Growth.linear, 1, EXPERTS),
        optim=OptimConfig(),
        train=TrainConfig(steps=STEPS),
        eval=EvalConfig(k=[1]),
        kernels=KernelsConfig(masked_from_k=EXPERTS + 1),
        parallel=ParallelConfig(expert_ranks=expert_ranks, **parallel),
    )


def one_rank(folder):
    return plain(folder, 1)


def two_ranks(folder):
    """Micro-batches; recomputation that repeats the whole exchange, but for n-gram tables."""
    config = plain(folder, 2)
    tables = NgramTablesConfig(rows=40, heads=2, width=4, layers=[0, 1], wire=WireFormat.bf16)
    return replace(config, train=replace(config.train, accumulation=2, recompute=True), ngram_tables=tables)


def four_ranks(folder):
    """One exchange at small k, another at large."""
    slow = {"exchange": ExchangeKind.auto, "link_gb_per_s": 1e-3}
    config = plain(folder, 4, **slow)
    return replace(
        config, moe=replace(config.moe, rows=676, ngram=1, share_table=True), train=replace(config.train, steps=100)
    )


def two_groups(folder):
    """Packed tables; recomputation that leaves the way back out; fewer steps."""
    config = plain(folder, 2)
    return replace(
        config,
        model=replace(config.model, pre_norm=True, dropout=0.0),
        moe=replace(config.moe, builder=Builder.packed, pack=2),
        train=replace(config.train, recompute=True, steps=20),
    )


def in_parts(folder):
    """The same in parts, which repeats the whole exchange."""
    config = two_groups(folder)
    return replace(config, parallel=replace(config.parallel, chunks=3))


def with_shared_expert(folder):
    """What is behind the way back keeps something, so recomputation needs it."""
    config = two_groups(folder)
    return replace(config, moe=replace(config.moe, shared_width=4))


def with_dropout(folder):
    """Likewise; and rows travel in half their bytes."""
    config = two_groups(folder)
    return replace(
        config, model=replace(config.model, dropout=0.1), parallel=replace(config.parallel, wire=WireFormat.bf16)
    )


def with_a_gate(folder):
    """Live weights and experts that return nothing: no byte more, and the way back is left out."""
    config = two_groups(folder)
    moe = replace(config.moe, builder=Builder.balanced, pack=None, weights=RouteWeights.live, null_experts=2)
    return replace(config, moe=moe, schedule=ScheduleConfig(Growth.linear, 1, EXPERTS + 2))


def with_copies(folder):
    """What they multiply is kept after the way back."""
    config = with_a_gate(folder)
    return replace(config, moe=replace(config.moe, null_experts=0, constant_experts=1, copy_experts=1))


def with_documents(folder):
    """Keys and memory stop at each 'e'; peers tell their ids and where these lie in documents."""
    config = two_groups(folder)
    return replace(
        config,
        corpus=replace(config.corpus, document_end=ord("e")),
        data=replace(config.data, reset_memory=True),
        parallel=replace(config.parallel, peer_ids=PeerIds.exchange),
    )


CASES = {
    1: [one_rank],
    2: [two_ranks, with_shared_expert, with_dropout, with_a_gate, with_copies, with_documents],
    4: [four_ranks, two_groups, in_parts],
}


class Recorder:
    """A reporter that notes what was sent by the end of each step, and hooks that note what layers get."""

    def __init__(self, trainer):
        self.engine, self.sent, self.layers = trainer.engine, [], []
        self.on = False
        trainer.reporter = self
        forward = trainer.engine.forward

        def watched(*inputs):
            self.on = True
            output = forward(*inputs)
            self.on = False  # recomputation comes after
            return output

        trainer.engine.forward = watched
        for block in trainer.model.blocks:
            block.moe.register_forward_pre_hook(self.before_layer)
            block.moe.experts.register_forward_pre_hook(self.before_experts)
            block.moe.register_forward_hook(self.after_layer)

    def sent_bytes(self):
        return self.engine.comm.sent_bytes if self.engine.comm else 0

    def before_layer(self, _module, _inputs):
        if self.on:
            self.layers.append({"bytes": -self.sent_bytes()})

    def before_experts(self, _module, inputs):
        rows_RD, plan, *_ = inputs
        if self.on:
            offsets = [np.diff(chunk.rows.offset_L.numpy(), prepend=0) for chunk in plan.chunks]
            received = len(rows_RD) if len(plan.chunks) == 1 else sum(plan.recv_splits)
            self.layers[-1] |= {"received": received, "experts": np.sum(offsets, axis=0)}

    def after_layer(self, _module, _inputs, _output):
        if self.on:
            self.layers[-1]["bytes"] += self.sent_bytes()

    def note(self, line):
        pass

    def step(self, step):
        self.sent.append(self.sent_bytes())

    def metrics(self, step, values, seconds_left):
        pass

    def found(self, config):
        """Arrays of [step, layer, micro-batch] and, of what was sent, [step]."""
        shape = config.train.steps, config.train.accumulation, LAYERS
        arrays = {name: np.array([one[name] for one in self.layers]) for name in self.layers[0]}
        arrays = {name: a.reshape(*shape, *a.shape[1:]).swapaxes(1, 2) for name, a in arrays.items()}
        return SimpleNamespace(**arrays, sent=np.diff(self.sent, prepend=0))


def trainer_of(make, rank, ranks, folder):
    config = make(folder)
    world = World(Mesh(rank, ranks, config.parallel.expert_ranks))
    if ranks > 1:
        cpu_group, planning = GlooGroup(dist.group.WORLD), GlooGroup(dist.new_group())
        planning_group = expert_cpu_group(world.mesh)
        world = replace(world, cpu_group=cpu_group, planning=planning, planning_group=planning_group)
    corpus = prepare(config.corpus)
    routers = build_routers(config, corpus, world.mesh)
    trainer = Trainer(config, corpus, routers, folder / make.__name__, None, world)
    return trainer, Recorder(trainer)


def write_certificate(make, ranks, folder, **options):
    config = make(folder)
    corpus = prepare(config.corpus)
    ids, place = corpus.split(Split.train), Placement(ranks, config.parallel.expert_ranks, ranks)
    routers = build_routers(config, corpus)
    layout = Layout(config, place)
    record = Record(layout, ids, range(0, config.train.steps, options.get("sample", 1)))
    starts = corpus.document_starts(Split.train)
    keys = table_keys(config.ngram_tables, corpus.vocab.size, config.train.seed)
    found = certify(layout, ids, routers, document_starts=starts, table_keys=keys, also=record.add, **options)
    record.write(folder / f"{make.__name__} certificate", {"options": to_plain(config), **asdict(found)})


def train(rank, ranks, folder):
    results = []
    for make in CASES[ranks]:
        trainer, recorder = trainer_of(make, rank, ranks, folder)
        check = Check(read(folder / f"{make.__name__} certificate"), trainer.model, rank)
        assert trainer.run(None, lambda: False, [check])
        assert check.steps == trainer.config.train.steps
        results.append(recorder.found(trainer.config))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    draw = torch.randint(0, 26, (800,), generator=torch.Generator().manual_seed(2)) + 97
    (folder / "text.txt").write_bytes(bytes(draw.tolist()))
    return folder


def certified(config, ranks, seed=None, keys_stop=True, steps=None):
    """The certificate of each step, or of the first ones, by itself, in the Recorder's form, with ranks as the first
    axis."""
    corpus = prepare(config.corpus)
    other = replace(config, train=replace(config.train, seed=seed or config.train.seed))
    routers = build_routers(other, corpus)
    place = Placement(ranks, config.parallel.expert_ranks, ranks)
    tokens, layout = config.streams_per_micro_batch(ranks) * SEGMENT, Layout(config, place)
    found = {name: [] for name in ("received", "experts", "bytes", "sent")}
    number_bytes = 2 if config.parallel.wire is WireFormat.bf16 else 4
    for step in range(steps or config.train.steps):
        starts = corpus.document_starts(Split.train) if keys_stop else NO_STARTS
        (counts,) = replay(layout, corpus.split(Split.train), routers, [step], starts)
        gather = layout.gathers(counts.k)
        received = counts.received_ymgP
        if gather:
            received = np.full_like(received, place.expert_ranks * tokens)
        moved = hops(counts, "gather" if gather else "tokens", place, tokens) * WIDTH * number_bytes
        found["received"].append(received.reshape(LAYERS, -1, ranks))
        experts = np.stack(np.split(counts.count_ymgE, place.expert_ranks, axis=-1), axis=3)
        found["experts"].append(experts.reshape(LAYERS, -1, ranks, experts.shape[-1]))
        found["bytes"].append(leaving(moved, FORWARD).reshape(LAYERS, -1, ranks))
        found["sent"].append(leaving(moved, layout.trips).sum(axis=(0, 1)).reshape(ranks))
    arrays = {name: np.array(values) for name, values in found.items()}
    rank_axis = {"received": 3, "experts": 3, "bytes": 3, "sent": 1}
    return {name: np.moveaxis(a, rank_axis[name], 0) for name, a in arrays.items()}


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [pytest.param(r, marks=pytest.mark.slow) if r > 1 else r for r in CASES])
def test_runs_do_what_their_certificates_say(ranks, folder):
    for make in CASES[ranks]:
        write_certificate(make, ranks, folder)
    answers = run_ranks(train, ranks, ranks, folder)
    for index, make in enumerate(CASES[ranks]):
        config = make(folder)
        want = certified(config, ranks)
        for rank, answer in enumerate(answers):
            for name, array in want.items():
                got = getattr(answer[index], name)
                assert got.shape == array[rank].shape and got.size >= config.train.steps
                assert np.array_equal(got, array[rank]), (make, name, rank)
        if make is with_documents:  # negative control: keys that do not stop
            plain = certified(config, ranks, keys_stop=False, steps=FEW)["experts"]
            assert not np.array_equal([answer[index].experts[:FEW] for answer in answers], plain)
        if index == 0:  # negative control: other tables
            another = certified(config, ranks, seed=5, steps=FEW)["experts"]
            assert not np.array_equal([answer[0].experts[:FEW] for answer in answers], another)
        assert (want["sent"].min() > 0) == (ranks > 1)


def test_the_cases_cover_what_they_say(folder):
    config = four_ranks(folder)
    assert {Layout(config, Placement(4, 4, 4)).gathers(k, SEGMENT) for k in range(1, EXPERTS + 1)} == {False, True}
    assert [
        Layout(make(folder)).trips
        for make in (
            one_rank,
            two_ranks,
            with_shared_expert,
            with_dropout,
            two_groups,
            in_parts,
            with_a_gate,
            with_copies,
        )
    ] == [(2, 2), (3, 3), (3, 3), (3, 3), (3, 2), (3, 3), (3, 2), (3, 3)]


STEP, LAYER = 4, 1
CHANGES = {  # array -> where one of its numbers is changed, but for the rank
    "received_uyrm": lambda rank: (STEP, LAYER, rank, 1),
    "computed_uyrm": lambda rank: (STEP, LAYER, rank, 0),
    "bytes_uyr": lambda rank: (STEP, LAYER, rank),
    "landed_utr": lambda rank: (STEP, 1, rank),
    "sent_utr": lambda rank: (STEP, 0, rank),
    "table_bytes_ur": lambda rank: (STEP, rank),
}


def two_short(folder):
    config = two_ranks(folder)
    return replace(config, train=replace(config.train, steps=STEP + 2))


def another_k(schedule, step, steps, right=batches_module.active_experts):
    return right(schedule, step, steps) - (step == STEP)


def differ(rank, ranks, folder):
    """Lines with which runs end: by a certificate with another number of this rank, and one with another k in one
    step."""
    lines = []
    for name in [*CHANGES, None]:
        trainer, recorder = trainer_of(two_short, rank, ranks, folder)
        check = Check(read(folder / (name or "two_short certificate")), trainer.model, rank)
        batches_module.active_experts = another_k if name is None else active_experts
        with pytest.raises(RunFailed) as error:
            trainer.run(None, lambda: False, [check])
        lines.append(str(error.value))
        assert len(recorder.sent) == trainer.step == STEP  # finished steps
    return lines


@pytest.mark.dist
def test_a_step_that_differs_ends_the_run(folder):
    """Each of the numbers that are compared, at exactly its step, layer, micro-batch and rank."""
    write_certificate(two_short, 2, folder)
    before = {}
    for name, place in CHANGES.items():
        shutil.copytree(folder / "two_short certificate", folder / name)
        for rank in (0, 1):
            before[name, rank] = change_certificate(folder / name, name, place(rank))
    for rank, lines in enumerate(run_ranks(differ, 2, 2, folder)):
        here = f"rank {rank} differs from its certificate at step {STEP + 1}, "
        where = f"{here}layer "
        numbers = [before[name, rank] for name in CHANGES]
        assert lines[:6] == [
            f"{where}{LAYER}, micro-batch 1: rows received {numbers[0]}, certified {numbers[0] + 1}",
            f"{where}{LAYER}, micro-batch 0: expert rows computed {numbers[1]}, certified {numbers[1] + 1}",
            f"{where}{LAYER}: bytes sent {numbers[2]}, certified {numbers[2] + 1}",
            f"{here}n-gram table 1: rows landed {numbers[3]}, certified {numbers[3] + 1}",
            f"{here}n-gram table 0: rows sent {numbers[4]}, certified {numbers[4] + 1}",
            f"{here}n-gram tables: bytes sent {numbers[5]}, certified {numbers[5] + 1}",
        ]
        assert lines[6].startswith(f"{where}0, micro-batch 0: ")


def test_a_sampled_certificate_checks_its_steps_alone(folder):
    config = one_rank(folder)
    sampled = replace(config, train=replace(config.train, steps=12))

    def one_short(_folder):
        return sampled

    write_certificate(one_short, 1, folder, sample=5)
    path = folder / "one_short certificate"
    trainer, _ = trainer_of(one_short, 0, 1, folder)
    check = Check(read(path), trainer.model, 0)
    assert trainer.run(None, lambda: False, [check]) and check.steps == 3
    assert read(path).scope == "one in 5 of all 12 steps"
    before = change_certificate(path, "computed_uyrm", (2, 0, 0, 0))
    trainer, _ = trainer_of(one_short, 0, 1, folder)
    with pytest.raises(
        RunFailed, match=f"at step 11, layer 0, micro-batch 0: expert rows computed {before}, certified {before + 1}"
    ):
        trainer.run(None, lambda: False, [Check(read(path), trainer.model, 0)])
