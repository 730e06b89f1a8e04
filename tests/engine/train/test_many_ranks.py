"""Training on 1, 2 and 4 gloo ranks, at every ZeRO stage, against one rank with all experts.

The optimizer is linear in the gradient, which shows every gradient with its scale (Adam as usual would hide it).
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foreroute.engine.model.build import build_model
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.tiny_run import EXPERTS, LAYERS, SYMBOLS, Run, tiny_config


def linear_optimizer(params, _):
    """Adam with a huge epsilon: the update is 0.5 times the gradient."""
    return torch.optim.Adam(params, 500.0, (0.0, 0.999), 1e3, fused=True)


def train(rank, ranks, cases):
    """Three steps of several runs in one group of processes; `guards` ask for validations before the steps."""
    results = []
    for expert_ranks, stage, options in cases:
        guards = options.pop("guards", ())
        run = Run(Mesh(rank, ranks, expert_ranks), stage, optimizer=linear_optimizer, **options)
        result = SimpleNamespace(losses=[], norms=[], evaluated=[])
        for guard in itertools.islice(itertools.chain(guards, itertools.repeat(None)), 3):
            if guard is not None:
                result.evaluated.append(run.evaluate(guard))
            result.losses.append(run.step())
            result.norms.append(run.engine.grad_norm.item())
        result.size = run.engine.num_parameters()
        result.state = {k: v for k, v in run.state().items() if k.startswith("weight/")}
        results.append(result)
    return results


def compare(got, want):
    assert got.size == want.size == sum(value.size for value in want.state.values())
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
    1: [(1, 3, {"recompute": True, "guards": GUARDS}), (1, 2, {"offload": True, "accumulation": 2})],
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
        assert len(experts) == LAYERS * EXPERTS * 4  # layers, experts, parameters: none is missing
        if "guards" in options and "accumulation" not in options:  # a validation of what is trained on next
            evaluated = np.mean([answer[index].evaluated for answer in answers], 0)
            assert evaluated == pytest.approx(answers[0][index].losses[:2], rel=1e-6)


@pytest.mark.dist
def test_stages_on_one_rank(one_rank_runs, one_rank):
    check([one_rank_runs[len(REFERENCES) :]], CASES[1], one_rank)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_like_one(ranks, one_rank):
    check(run_ranks(train, ranks, ranks, CASES[ranks]), CASES[ranks], one_rank)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", REST)
def test_the_other_groups_and_stages(ranks, one_rank):
    check(run_ranks(train, ranks, ranks, REST[ranks]), REST[ranks], one_rank)


def test_the_reference_moves(one_rank):
    """Negative control: three steps change every kind of parameter by far more than the bound, and the clip acts."""
    start = dict(build_model(tiny_config(), SYMBOLS).named_parameters())
    for result in one_rank[:2]:
        moved = {name for name, by in movements(result, start).items() if max(by) > 1e-4}
        assert moved == set(start)
    assert min(one_rank[1].norms) > CLIP
    experts = {name: by for name, by in movements(one_rank[2], start).items() if ".experts." in name}
    assert all(min(by[:2]) > 1e-3 and by[2:] == [0, 0] for by in experts.values())  # the second half is idle


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
    start = build_model(tiny_config(), SYMBOLS).get_parameter("blocks.0.moe.experts.w1")
    name = "weight/blocks.0.moe.experts.w1@0"
    wrong = want.state[name] + 0.01 * (want.state[name] - start[0].detach().numpy())
    got = SimpleNamespace(**{**vars(want), "state": {**want.state, name: wrong}})
    with pytest.raises(AssertionError, match="w1@"):
        compare(got, want)
