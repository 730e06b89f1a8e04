"""Bits per symbol against arithmetic by hand: of a model that knows nothing, and symbol by symbol over the whole text
at once."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foreroute.engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    ScheduleConfig,
    Split,
)
from foreroute.engine.data.documents import NO_STARTS
from foreroute.engine.evaluation.held_out import evaluate, slimming_curve
from foreroute.engine.model.build import RunModel
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.routing.plan import Routing

V, LENGTH, BEFORE = 11, 43, 5
IDS = np.random.default_rng(0).integers(0, V, LENGTH).astype(np.uint8)
CORPUS = SimpleNamespace(
    split=lambda _: IDS,
    previous_id=lambda _: BEFORE,
    document_starts=lambda _: NO_STARTS,
    bits_per_byte=lambda split, bpc: None,
)


def make(*, memory=100, streams=1, segment=6):
    config = Config(
        data=DataConfig(streams=1, segment=segment),
        model=ModelConfig(2, 16, heads=2, head_width=8, memory=memory, dropout=0.0, init_std=0.4),
        moe=MoEConfig(router="frozen", experts=4, expert_width=8),
        schedule=ScheduleConfig(k_max=2),
        eval=EvalConfig(k=[2], streams=streams),
        kernels=KernelsConfig(masked_from_k=5),
    )
    torch.manual_seed(1)
    return TransformerXL(config.model, config.moe, config.kernels, V).double().eval(), config


def measured(model, config, **options):
    return evaluate(RunModel(config, CORPUS, model, None), split=Split.test, k=2, **options)


def by_hand(model, symbols=LENGTH):
    """Mean of -log2 p of each symbol, the id before the split being the first input, in one segment without memory."""
    text = torch.from_numpy(np.concatenate([[BEFORE], IDS[:symbols]]).astype(np.int64))
    with torch.inference_mode():
        logits_QV = model.logits(text[None, :-1], None, Routing(2)).logits_BQV[0]
    bits = 0.0
    for row, target in zip(logits_QV.tolist(), text[1:].tolist(), strict=True):
        bits -= math.log2(math.exp(row[target]) / math.fsum(math.exp(value) for value in row))
    return bits / symbols


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary():
    model, config = make()
    with torch.no_grad():
        model.embedding.weight.zero_()
    found = measured(model, config)
    assert found.bpc == pytest.approx(math.log2(V), rel=1e-6)
    assert found.nats == pytest.approx(math.log(V), rel=1e-6) and found.symbols == LENGTH


@pytest.mark.parametrize("segment", [1, 6, 43, 50])
def test_each_symbol_counts_once_by_its_own_probability(segment):
    """The memory holds all of the text, so cutting it into segments changes nothing."""
    model, config = make(segment=segment)
    assert measured(model, config).bpc == pytest.approx(by_hand(model), rel=1e-6)
    assert measured(model, config, max_symbols=20).bpc == pytest.approx(by_hand(model, 20), rel=1e-6)
    assert abs(by_hand(model, 20) - by_hand(model)) > 1e-3  # control


@pytest.mark.parametrize("starts", [[0, 9, 20, 21], [9, 20, 21, 41]], ids=["at the split", "before it"])
def test_each_symbol_counts_once_where_documents_do_not_see_each_other(starts):
    """By hand: each document of the inputs by itself. The first input is the id before the split."""
    model, config = make(segment=6)
    config = replace(config, data=replace(config.data, reset_memory=True))
    found = evaluate(RunModel(config, with_documents(starts), model, None), split=Split.test, k=2)
    text = torch.from_numpy(np.concatenate([[BEFORE], IDS]).astype(np.int64))
    nats = 0.0
    for first, last in pairwise([0, *(start + 1 for start in starts), LENGTH]):
        with torch.inference_mode():
            logits_QV = model.logits(text[None, first:last], None, Routing(2)).logits_BQV[0]
        nats += torch.nn.functional.cross_entropy(logits_QV, text[first + 1 : last + 1], reduction="sum").item()
    assert found.symbols == LENGTH
    assert found.nats == pytest.approx(nats / LENGTH, rel=1e-6)
    assert abs(measured(model, config).nats - found.nats) > 1e-4  # control: the same text as one document


def test_documents_do_not_depend_on_the_number_of_streams():
    model, config = make(memory=4, segment=2)
    config = replace(config, data=replace(config.data, reset_memory=True))
    found = []
    for streams in (1, 4):
        config = replace(config, eval=replace(config.eval, streams=streams))
        found.append(evaluate(RunModel(config, with_documents([0, 9, 20, 21]), model, None), split=Split.test, k=2))
    assert found[0].symbols == found[1].symbols == LENGTH
    assert found[1].nats == pytest.approx(found[0].nats, rel=1e-6)


def with_documents(starts):
    return SimpleNamespace(**{**vars(CORPUS), "document_starts": lambda _: np.array(starts)})


def test_progress_is_told_at_each_k_and_changes_nothing():
    model, config = make(segment=20)
    config = replace(config, eval=replace(config.eval, k=[1, 2], memory=1))
    seen = []
    curve = slimming_curve(RunModel(config, CORPUS, model, None), progress=lambda *parts: seen.append(parts))
    assert seen == [(f"k = {k}", done, 3) for k in (1, 2) for done in range(4)]
    plain = slimming_curve(RunModel(config, CORPUS, model, None))
    assert {k: found.bpc for k, found in curve.items()} == {k: f.bpc for k, f in plain.items()}


class Alone(World):
    """A rank whose sums are kept, not added up."""

    def sum(self, values):
        KEPT.append(values)
        return torch.ones(2, dtype=torch.float64)


KEPT: list[torch.Tensor] = []


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_streams_whatever_their_number(ranks):
    """Four streams do not divide over three ranks: the last one runs some that do not count."""
    model, config = make(memory=4, streams=1, segment=2)
    want = measured(model, config)
    config = replace(config, eval=replace(config.eval, streams=4))
    KEPT.clear()
    for rank in range(ranks):
        measured(model, config, world=Alone(Mesh(rank, ranks, 1)))
    nats, symbols = torch.stack(KEPT).sum(0).tolist()
    assert symbols == want.symbols == LENGTH
    assert nats == pytest.approx(want.nats * LENGTH, rel=1e-6)
