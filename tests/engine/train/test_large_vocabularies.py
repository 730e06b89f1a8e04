"""The loss of many symbols in training: chunks and clusters on ranks, at every ZeRO stage, against one rank."""

import numpy as np
import pytest
import torch

from foreroute.engine.model import transformer_xl
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.tiny_run import Run

SYMBOLS = 1500  # the text has the first 11 of them
CHUNKS = {}
CLUSTERS = {"cutoffs": [2, 9, 40], "div_val": 2}  # no target is in the last one
FLAT = {"cutoffs": [10]}
MODELS = {"chunks": CHUNKS, "clusters": CLUSTERS, "flat": FLAT}
GUARDS = (torch.inference_mode, torch.no_grad)
CASES = {  # ranks: expert ranks, ZeRO stage, options
    1: [(1, 3, {"accumulation": 2, "recompute": True})],
    2: [(1, 0, {}), (2, 1, {}), (1, 2, {"accumulation": 2}), (2, 3, {"guards": GUARDS}), (1, 3, {"recompute": True})],
}


def linear_optimizer(params, _):
    """Adam with a huge epsilon: the update is 0.5 times the gradient."""
    return torch.optim.Adam(params, 500.0, (0.0, 0.999), 1e3, fused=True)


def train(rank, ranks, cases):
    """Three steps of several runs: losses, weights, and losses of validations before them."""
    found = []
    for expert_ranks, stage, options in cases:
        guards = options.pop("guards", ())
        transformer_xl.SMALL_VOCABULARY = SYMBOLS if options.pop("all_logits", False) else 1024
        run = Run(Mesh(rank, ranks, expert_ranks), stage, optimizer=linear_optimizer, symbols=SYMBOLS, **options)
        evaluated, losses = [], []
        for step in range(3):
            evaluated += [run.evaluate(guard) for guard in guards[step : step + 1]]
            losses.append(run.step())
        state = {name: value for name, value in run.state().items() if name.startswith("weight/")}
        found.append((losses, state, evaluated))
    return found


def with_model(name, cases):
    return [(ranks, stage, {**options, "model": MODELS[name]}) for ranks, stage, options in cases]


@pytest.fixture(scope="module")
def one_rank():
    """At ZeRO-1, the loss from all logits at once where there are no clusters; then the cases."""
    answers = {}
    for name in MODELS:
        cases = [(1, 1, {"all_logits": True}), *CASES[1]]
        (answers[name],) = run_ranks(train, 1, 1, with_model(name, cases))
    return answers


def compare(got, want):
    (losses, state, evaluated), (want_losses, want_state, _) = got, want
    assert losses == pytest.approx(want_losses, rel=1e-6)
    largest = max(np.linalg.norm(value) for value in want_state.values())
    for name, value in state.items():
        difference = np.linalg.norm(value - want_state[name])
        assert difference < 1e-6 * np.linalg.norm(want_state[name]) + 1e-7 * largest, name
    return evaluated


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [*list(MODELS)[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])]
)
def test_chunks_and_clusters_train_on_ranks_like_on_one(name, one_rank):
    want, *others = one_rank[name]
    for got in others:
        compare(got, want)
    answers = run_ranks(train, 2, 2, with_model(name, CASES[2]))
    for number in range(len(CASES[2])):
        evaluated = [compare(answer[number], want) for answer in answers]
        if evaluated[0]:
            assert np.mean(evaluated, 0) == pytest.approx(want[0][:2], rel=1e-6)
    names = set().union(*(answer[0][1] for answer in answers))
    assert ("weight/output.biases.1" in names) == (name != "chunks")


@pytest.mark.dist
@pytest.mark.parametrize("name", ["chunks", "clusters"])
def test_bf16_is_close(name, one_rank):
    (answer,) = run_ranks(train, 1, 1, with_model(name, [(1, 2, {"precision": "bf16"})]))
    losses = answer[0][0]
    assert losses == pytest.approx(one_rank[name][0][0], rel=0.01)  # 4e-3 a rounding
    assert losses[2] < losses[0]
