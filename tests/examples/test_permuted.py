"""The search of permutations against all of them, and against one that was planted; the router that takes them."""

from dataclasses import replace
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch

from examples.routers.permuted import PermutedRouter, identity, search
from foreroute.engine.config import (
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoEConfig,
    ScheduleConfig,
    Split,
)
from foreroute.engine.data.corpus import prepare
from foreroute.engine.errors import UserError
from foreroute.engine.evaluation.held_out import evaluate
from foreroute.engine.model.build import RunModel, build_model, build_routers
from foreroute.engine.moe.experts import Experts

LAYERS, EXPERTS, K, SYMBOLS = 2, 3, 2, 200
ROUTER = "examples.routers.permuted:PermutedRouter"


def run_of(folder, **options):
    path = folder / "text.txt"
    path.write_bytes((np.random.default_rng(2).random(900) ** 3 * 8 + 97).astype(np.uint8).tobytes())
    config = Config(
        corpus=CorpusConfig(Corpus.file, str(path), cache_dir=str(folder / "cache")),
        data=DataConfig(streams=2, segment=20),
        model=ModelConfig(layers=LAYERS, width=8, heads=1, head_width=8, memory=20, init_std=0.5),
        moe=MoEConfig(router=ROUTER, experts=EXPERTS, expert_width=6, ngram=1, rows=256, options=options),
        schedule=ScheduleConfig(k_min=K, k_max=K),
        eval=EvalConfig(k=[1], streams=2),
    )
    corpus = prepare(config.corpus)
    model = build_model(config, corpus.vocab.size).eval()
    return RunModel(config, corpus, model, build_routers(config, corpus))


def training_loss(run):
    def loss(number_yE):
        routers = [router.renumbered(number_E) for router, number_E in zip(run.routers, number_yE, strict=True)]
        return evaluate(replace(run, routers=routers), split=Split.train, k=K, max_symbols=SYMBOLS).bpc

    return loss


@pytest.mark.method
def test_the_loss_never_rises_and_no_swap_lowers_it_further(tmp_path):
    """All permutations of both layers are tried beside the search."""
    run = run_of(tmp_path)
    loss, start = training_loss(run), identity(LAYERS, EXPERTS)
    every = {p: loss(np.array(p)) for p in product(permutations(range(EXPERTS)), repeat=LAYERS)}
    assert len(set(every.values())) == len(every)  # each numbering is another model

    def of(numbers):
        return every[tuple(map(tuple, numbers.tolist()))]

    reached = []
    for first in every:
        found = search(of, np.array(first))
        assert of(found) <= every[first]
        for layer, (one, other) in product(range(LAYERS), combinations(range(EXPERTS), 2)):
            swapped = found.copy()
            swapped[layer, [one, other]] = found[layer, [other, one]]
            assert of(swapped) > of(found)
        reached.append(of(found))
    assert min(reached) == min(every.values())
    assert of(search(loss, start)) < of(start)  # control: the start was no optimum


@pytest.mark.method
def test_of_all_numberings_one_alone_fits_experts_whose_places_were_changed(tmp_path):
    run = run_of(tmp_path)
    loss = training_loss(run)
    before = loss(identity(LAYERS, EXPERTS))
    planted = np.array([[1, 2, 0], [2, 1, 0]])  # expert e gets this number
    for experts, number_E in zip([m for m in run.model.modules() if isinstance(m, Experts)], planted, strict=True):
        for parameter in experts.parameters():
            parameter.data = parameter.data[torch.from_numpy(number_E.argsort())]
    every = product(permutations(range(EXPERTS)), repeat=LAYERS)
    assert [p for p in every if abs(loss(np.array(p)) - before) < 1e-6] == [tuple(map(tuple, planted.tolist()))]


def test_a_file_renumbers_the_tables_and_is_no_longer_needed_after(tmp_path):
    plain = run_of(tmp_path)
    numbers = np.array([[1, 2, 0], [2, 1, 0]])
    np.save(tmp_path / "numbers.npy", numbers)
    run = run_of(tmp_path, permutations=str(tmp_path / "numbers.npy"))
    for router, old, number_E in zip(run.routers, plain.routers, numbers, strict=True):
        assert (router.table.order_rE.numpy() == number_E[old.table.order_rE.numpy()]).all()
    moe = replace(run.config.moe, options={"permutations": "gone"})
    again = PermutedRouter.restore(moe, None, [router.state() for router in run.routers])
    for one, other in zip(again, run.routers, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.identity(), other.identity(), strict=True))


@pytest.mark.parametrize("numbers", [None, [[0, 1, 2]], [[0, 1, 2], [0, 1, 1]], [[0, 1], [1, 0]]])
def test_what_is_no_permutation_of_each_table_is_refused(numbers, tmp_path):
    if numbers is not None:
        np.save(tmp_path / "numbers.npy", np.array(numbers))
    with pytest.raises(UserError, match=r"moe\.options\.permutations=.*numbers\.npy: (must be a p|cannot be read)"):
        run_of(tmp_path, permutations=str(tmp_path / "numbers.npy"))
