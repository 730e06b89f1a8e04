"""A tiny Transformer-XL through DeepSpeed on 2 and 4 gloo ranks against one rank: training, and checkpoints of any topology.

Parity uses an optimizer that is linear in the gradient, which shows every gradient with its scale (Adam as usual would
hide it). Checkpoints use Adam. Everything compared is numbered by global expert.
"""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed as dist

from engine import checkpoint
from engine import deepspeed_adapter as adapter
from engine.build import build_model
from engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    Precision,
    ScheduleConfig,
    TrainConfig,
)
from engine.data import Streams
from engine.model import Routing
from engine.moe.routers import HashedRouter
from engine.moe.tables import build_tables, table_from_state, table_state
from engine.optim import build_optimizer
from engine.parallel.host import GlooHost
from engine.parallel.mesh import Mesh
from engine.testing import run_ranks

SYMBOLS, STREAMS, SEGMENT, EXPERTS, K = 11, 4, 16, 4, 2


def make_config(stage=1, clip=0.0, dropout=0.0, **options):
    return Config(
        data=DataConfig(streams=STREAMS, segment=SEGMENT),
        model=ModelConfig(
            layers=2, width=16, heads=2, head_width=8, memory=16, dropout=dropout, init_std=0.2
        ),
        moe=MoEConfig(experts=EXPERTS, expert_width=12, ngram=2, rows=64),
        schedule=ScheduleConfig(k_min=K, k_max=K),
        optim=OptimConfig(
            lr=0.002, clip=clip, eps=1e-6
        ),  # a smaller eps turns rounding into whole steps
        train=TrainConfig(steps=10, zero_stage=stage, **options),
        eval=EvalConfig(k=[1]),
    )


def linear_optimizer(params, _):
    """Adam with a huge epsilon: the update is 0.5 times the gradient."""
    return torch.optim.Adam(params, 500.0, (0.0, 0.999), 1e3)


class Run:
    """One rank of a run."""

    def __init__(
        self, rank, ranks, expert_ranks, stage, *, optimizer=build_optimizer, whole=0, idle=False, **options
    ):  # fmt: skip
        """Start; `whole` is adapter.KEPT_WHOLE, `idle` leaves the second half of the experts without a token."""
        self.config, self.mesh = make_config(stage, **options), Mesh(rank, ranks, expert_ranks)
        adapter.build_optimizer, adapter.KEPT_WHOLE = optimizer, whole
        self.host = GlooHost(dist.group.WORLD)
        text = np.random.default_rng(0).integers(0, SYMBOLS, 2000).astype(np.uint8)
        self.streams = Streams(text, STREAMS, SEGMENT, self.config.context)
        tables = build_tables(self.config.moe, SYMBOLS, text, num_tables=2, seed=1, cache_dir=None)
        if idle:
            tables = [replace(t, order_rE=t.order_rE.sort().values.contiguous()) for t in tables]
        self.use(tables)
        self.engine = adapter.start(build_model(self.config, SYMBOLS), self.config, self.mesh)
        torch.manual_seed(50 + rank)
        self.accumulation = self.config.train.accumulation
        self.memory, self.index = [None] * self.accumulation, 0

    def use(self, tables):
        rank, ranks = self.mesh.expert_rank, self.mesh.expert_ranks
        self.tables, self.routers = (
            tables,
            [HashedRouter(t, rank=rank, ranks=ranks) for t in tables],
        )

    def own_streams(self, micro, rank=None):
        rank = self.mesh.rank if rank is None else rank
        return self.streams.streams_of(
            rank, micro, world=self.mesh.world, accumulation=self.accumulation
        )

    def inputs(self, micro):
        """What the model takes: ids, targets, memory, routing."""
        batches = [
            self.streams.batch(self.index, self.own_streams(micro, r))
            for r in self.mesh.group_ranks
        ]
        own = batches[self.mesh.expert_rank]
        ids, left = ([getattr(b, name) for b in batches] for name in ("ids_BQ", "left_BC"))
        plans = tuple(router.plan(ids, left, K) for router in self.routers)
        place_BQ = torch.cat([b.stream_B for b in batches])[:, None] * SEGMENT + torch.arange(
            SEGMENT
        )
        routing = Routing(K, plans, place_BQ.flatten(), dropout_seed=self.index)
        return own.ids_BQ, own.targets_BQ, self.memory[micro], routing

    def evaluate(self, guard):
        """Loss of the next segment by the bare model; changes nothing."""
        self.engine.module.eval()
        with guard():
            loss = self.engine.module(*self.inputs(0)).loss.clone()
        self.engine.module.train()
        return loss.item()

    def step(self):
        """Mean loss of one optimizer step over all ranks."""
        total = 0.0
        for micro in range(self.accumulation):
            out = self.engine.forward(*self.inputs(micro))
            self.engine.backward(out.loss)
            self.memory[micro] = out.memory
            total = total + out.loss.detach().float() / self.accumulation
        assert self.engine.step()
        self.index += 1
        dist.all_reduce(total)
        return float(total) / self.mesh.world

    def state(self):
        """Master weights and moments; of experts each by itself under its global number."""
        found = {}
        for name, values in self.engine.read_state():
            for key, value in values.items():
                if ".experts." in name:
                    experts = self.mesh.local_experts(EXPERTS)
                    found |= {
                        f"{key}/{name}@{e}": part.numpy().copy()
                        for e, part in zip(experts, value, strict=True)
                    }
                else:
                    found[f"{key}/{name}"] = value.numpy().copy()
        return found

    def save(self, folder):
        state = checkpoint.TrainingState(
            step=self.index, cursor=self.index, rng=torch.get_rng_state(),
            memory=tuple(torch.cat(layer) for layer in zip(*self.memory, strict=True)),
            stream_B=torch.tensor([s for micro in range(self.accumulation) for s in self.own_streams(micro)]),
            tables=[table_state(table) for table in self.tables],
        )  # fmt: skip
        return checkpoint.save(folder, self.engine, state, facts={}, keep=2, host=self.host)

    def load(self, folder):
        path, warnings = checkpoint.find_newest(folder, self.host)
        assert not warnings
        streams = [s for micro in range(self.accumulation) for s in self.own_streams(micro)]
        state = checkpoint.load(path, self.engine, host=self.host, streams=streams)
        assert state.stream_B.tolist() == streams
        self.use([table_from_state(table) for table in state.tables])
        parts = [layer.tensor_split(self.accumulation) for layer in state.memory]
        self.memory, self.index = list(zip(*parts, strict=True)), state.cursor
        if state.rng is not None:
            torch.set_rng_state(state.rng)
        return state


def error(got, want, floor=0.0):
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), floor)


# Training: every ZeRO stage and number of ranks like one rank.


def train(rank, ranks, cases):
    """Three steps of several runs in one group of processes; `guards` ask for validations before the steps."""
    results = []
    for expert_ranks, stage, options in cases:
        guards = options.pop("guards", ())
        run = Run(rank, ranks, expert_ranks, stage, optimizer=linear_optimizer, **options)
        result = SimpleNamespace(losses=[], norms=[], evaluated=[])
        for guard in itertools.islice(itertools.chain(guards, itertools.repeat(None)), 3):
            if guard is not None:
                result.evaluated.append(run.evaluate(guard))
            result.losses.append(run.step())
            result.norms.append(run.engine.grad_norm())
        result.state = {k: v for k, v in run.state().items() if k.startswith("weight/")}
        results.append(result)
    return results


def compare(got, want):
    assert got.losses == pytest.approx(want.losses, rel=1e-6)
    assert got.norms == pytest.approx(want.norms, rel=1e-6)
    largest = max(np.linalg.norm(value) for value in want.state.values())
    for name, value in got.state.items():
        difference = np.linalg.norm(value - want.state[name])
        assert difference < 1e-6 * np.linalg.norm(want.state[name]) + 1e-7 * largest, name


CLIP = 0.3
GUARDS = (torch.inference_mode, torch.no_grad)  # of validations
REFERENCES = ({}, {"clip": CLIP}, {"idle": True})
CASES = {  # expert ranks, ZeRO stage, options
    1: [
        (1, 3, {"recompute": True, "guards": GUARDS}),
        (1, 2, {"offload": True, "accumulation": 2}),
    ],
    2: [
        (2, 0, {"recompute": True}),
        (2, 1, {"clip": CLIP}),
        (2, 2, {"accumulation": 2, "guards": GUARDS}),
        (2, 2, {"idle": True}),
        (1, 2, {"offload": True, "accumulation": 2, "clip": CLIP}),
        (1, 3, {"whole": 500, "guards": GUARDS[::-1]}),
        (2, 3, {"guards": GUARDS}),
        (2, 3, {"recompute": True, "accumulation": 2, "clip": CLIP}),
        (2, 3, {"idle": True, "offload": True}),
    ],
    4: [
        (2, 0, {}),
        (4, 1, {"clip": CLIP, "offload": True}),
        (2, 2, {"clip": CLIP, "recompute": True}),
        (1, 3, {}),
        (2, 3, {"clip": CLIP}),
    ],
}
REST = {  # the other groups and stages
    2: [
        (1, 0, {}),
        (1, 1, {"clip": CLIP}),
        (2, 1, {"offload": True, "accumulation": 2}),
        (2, 2, {"offload": True, "recompute": True, "clip": CLIP}),
        (1, 3, {"offload": True, "accumulation": 2, "clip": CLIP}),
    ],
    4: [
        (1, 0, {}),
        (4, 0, {"recompute": True}),
        (1, 1, {}),
        (2, 1, {}),
        (1, 2, {}),
        (4, 2, {"idle": True}),
        (4, 3, {"guards": GUARDS}),
        (4, 3, {"clip": CLIP, "recompute": True, "offload": True}),
    ],
}


@pytest.fixture(scope="module")
def one_rank_runs():
    cases = [(1, 1, dict(options)) for options in REFERENCES]
    return run_ranks(train, 1, 1, [*cases, *CASES[1]])[0]


@pytest.fixture(scope="module")
def one_rank(one_rank_runs):
    """One rank with all experts at ZeRO-1: what all others must equal."""
    return one_rank_runs[: len(REFERENCES)]


def check(answers, cases, one_rank):
    for index, (*_, options) in enumerate(cases):
        shared = {key: value for key, value in options.items() if key in ("clip", "idle")}
        for answer in answers:
            compare(answer[index], one_rank[REFERENCES.index(shared)])
        experts = {name for answer in answers for name in answer[index].state if "@" in name}
        assert len(experts) == 2 * EXPERTS * 4  # layers, experts, parameters: none is missing
        if (
            "guards" in options and "accumulation" not in options
        ):  # a validation of what is trained on next
            evaluated = np.mean([answer[index].evaluated for answer in answers], 0)
            assert evaluated == pytest.approx(answers[0][index].losses[:2], rel=1e-6)


@pytest.mark.dist
def test_stages_on_one_rank(one_rank_runs, one_rank):
    check([one_rank_runs[len(REFERENCES) :]], CASES[1], one_rank)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_like_one(ranks, one_rank):
    check(run_ranks(train, ranks, ranks, CASES[ranks]), CASES[ranks], one_rank)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", REST)
def test_the_other_groups_and_stages(ranks, one_rank):
    check(run_ranks(train, ranks, ranks, REST[ranks]), REST[ranks], one_rank)


def test_the_reference_moves(one_rank):
    """Negative control: three steps change every kind of parameter by far more than the bound, and the clip acts."""
    start = dict(build_model(make_config(), SYMBOLS).named_parameters())
    for result in one_rank[:2]:
        moved = {name for name, by in movements(result, start).items() if max(by) > 1e-4}
        assert moved == set(start)
    assert min(one_rank[1].norms) > CLIP
    experts = {
        name: by for name, by in movements(one_rank[2], start).items() if ".experts." in name
    }
    assert all(
        min(by[:2]) > 1e-3 and by[2:] == [0, 0] for by in experts.values()
    )  # the second half is idle


def movements(result, start):
    """How far each parameter, or each of its experts, has gone from the start."""
    found = {}
    for key, value in result.state.items():
        name, _, expert = key.removeprefix("weight/").partition("@")
        before = start[name][int(expert)] if expert else start[name]
        found.setdefault(name, []).append(np.linalg.norm(value - before.detach().numpy()))
    return found


def test_a_wrong_scale_is_seen(one_rank):
    """Negative control: an expert's gradient that is off by a factor, as from a wrong group of ranks."""
    want = one_rank[0]
    start = build_model(make_config(), SYMBOLS).get_parameter("blocks.0.moe.experts.w1")
    name = "weight/blocks.0.moe.experts.w1@0"
    wrong = want.state[name] + 0.01 * (want.state[name] - start[0].detach().numpy())
    got = SimpleNamespace(losses=want.losses, norms=want.norms, state={**want.state, name: wrong})
    with pytest.raises(AssertionError, match="w1@"):
        compare(got, want)


# Checkpoints: saved on one topology, continued on another.

HALF = {"precision": Precision.bf16, "dropout": 0.1}
SAVED = {  # folder: world, expert ranks, ZeRO stage, options
    "ranks4-experts2-zero1": (4, 2, 1, {}),
    "ranks4-experts2-zero3": (4, 2, 3, {}),
    "half-precision": (4, 2, 3, HALF),
}
CONTINUED = [  # folder, world, expert ranks, ZeRO stage, options
    ("ranks4-experts2-zero1", 4, 2, 1, {}),  # the same topology: bit for bit
    ("half-precision", 4, 2, 3, HALF),
    ("ranks4-experts2-zero1", 4, 4, 1, {}),
    ("ranks4-experts2-zero1", 4, 2, 3, {}),
    ("ranks4-experts2-zero1", 2, 2, 2, {}),
    ("ranks4-experts2-zero1", 2, 1, 1, {"accumulation": 2}),
    ("ranks4-experts2-zero3", 2, 2, 0, {}),
    ("ranks4-experts2-zero3", 2, 1, 3, {"whole": 500}),
    ("ranks4-experts2-zero1", 1, 1, 1, {}),
    ("ranks4-experts2-zero3", 1, 1, 2, {}),
    *(
        ("ranks4-experts2-zero1", 1, 1, 1, {"forget": what})
        for what in ("weight", "exp_avg", "exp_avg_sq", "adam_step", "memory")
    ),
]


def save_and_go_on(rank, ranks, folder):
    """Four steps, a checkpoint, five more steps, of each run of SAVED."""
    results = {}
    for name, (_, expert_ranks, stage, options) in SAVED.items():
        run = Run(rank, ranks, expert_ranks, stage, **options)
        for _ in range(4):
            run.step()
        run.save(folder / name)
        saved = run.state()
        results[name] = SimpleNamespace(
            saved=saved, losses=[run.step() for _ in range(5)], state=run.state()
        )
    return results


def go_on(rank, ranks, folder, cases):
    """Load and make five more steps; `forget` leaves out something that was loaded."""
    results = []
    for name, _, expert_ranks, stage, options in cases:
        forget = options.pop("forget", None)
        run = Run(rank, ranks, expert_ranks, stage, **options)
        fresh = dict(run.engine.read_state()) if forget else {}
        rng = run.load(folder / name).rng
        result = SimpleNamespace(saved=run.state(), has_rng=rng is not None)
        if forget == "adam_step":
            run.engine.set_adam_step(0)
        elif forget == "memory":
            run.memory = [None] * run.accumulation
        elif forget is not None:
            for key, values in list(run.engine.read_state()):
                run.engine.write_state(key, {**values, forget: fresh[key][forget]})
        result.losses, result.state = [run.step() for _ in range(5)], run.state()
        results.append(result)
    return results


def compare_continued(got, want):
    assert got.losses == pytest.approx(want.losses, rel=1e-5)
    for name, value in got.state.items():
        assert error(value, want.state[name]) < 1e-4, name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of checkpoints, and for each the state when it was saved and what came after it without a break."""
    folder = tmp_path_factory.mktemp("topologies")
    answers = run_ranks(save_and_go_on, 4, 4, folder)
    wanted = {}
    for name in SAVED:
        parts = [answer[name] for answer in answers]
        whole = [
            {k: v for part in parts for k, v in getattr(part, what).items()}
            for what in ("saved", "state")
        ]
        wanted[name] = SimpleNamespace(saved=whole[0], losses=parts[0].losses, state=whole[1])
    return folder, wanted


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_checkpoint_goes_on_anywhere(ranks, saved):
    folder, wanted = saved
    cases = [case for case in CONTINUED if case[1] == ranks]
    answers = run_ranks(go_on, ranks, ranks, folder, cases)
    for index, (name, *topology, options) in enumerate(cases):
        want = wanted[name]
        for got in [answer[index] for answer in answers]:
            assert all(np.array_equal(value, want.saved[key]) for key, value in got.saved.items())
            assert got.has_rng == (topology[:2] == [4, 2])
            if "forget" in options:  # negative control
                with pytest.raises(AssertionError):
                    compare_continued(got, want)
                    pytest.fail(f"{options} changes nothing")
            elif topology == list(SAVED[name][:3]):
                assert got.losses == want.losses, name
                assert all(
                    np.array_equal(value, want.state[key]) for key, value in got.state.items()
                )
            else:
                compare_continued(got, want)
        assert {key for answer in answers for key in answer[index].state} == set(want.state)
