"""A sentence's logits are its own: no neighbour, no padding and no earlier batch changes them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from foreroute.engine.config import Gate, KernelsConfig, RouteWeights
from foreroute.engine.finetune.classifier import Classifier, predict
from foreroute.engine.finetune.sentences import Sentence, pad
from foreroute.engine.model.build import RunModel, build_model, restore_routers
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.tiny_run import EXPERTS, LAYERS, SYMBOLS, K, tiny_config

ROUTERS = ["hashed", "frozen", "learned", "dense", "gate", "experts without rows"]
HASHED: dict[str, dict[str, Any]] = {
    "hashed": {},
    "gate": {"weights": RouteWeights.live, "gate": Gate.sigmoid},
    "experts without rows": {"constant_experts": 1, "copy_experts": 1, "null_experts": 1},
}


def build(router: str, *, dropout: float = 0.0, pre_norm: bool = True) -> Classifier:
    config = tiny_config()
    config = replace(
        config,
        model=replace(config.model, dropout=dropout, pre_norm=pre_norm),
        moe=replace(config.moe, rows=SYMBOLS**2, **HASHED.get(router, {"router": router})),  # a row for each bigram
        kernels=KernelsConfig(masked_from_k=EXPERTS),
    )
    routers = None
    if router in HASHED:
        text = np.random.default_rng(0).integers(0, SYMBOLS, 500).astype(np.uint8)
        tables = build_tables(config.moe, SYMBOLS, text, num_tables=LAYERS, seed=1, cache_dir=None)
        routers = HashedRouter.of_tables(config.moe, tables)
    return Classifier(RunModel(config, None, build_model(config, SYMBOLS), routers)).double()


def sentences(*lengths: int, seed: int = 0) -> list[Sentence]:
    rng = np.random.default_rng(seed)
    return [Sentence(rng.integers(0, SYMBOLS, n).astype(np.uint8), 0) for n in lengths]


def alone(classifier: Classifier, sentence: Sentence, k: int = K) -> torch.Tensor:
    """Logits of a sentence in a batch of its own."""
    with torch.no_grad():
        return classifier.eval()(pad([sentence]), k)[0]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("k", [1, K, EXPERTS])
def test_neighbours_and_padding_change_nothing(router, k):
    classifier = build(router).eval()
    many = sentences(5, 1, 23, 12, 40)
    with torch.no_grad():
        together = classifier(pad(many), k)
        backwards = classifier(pad(many[::-1]), k).flip(0)
    for row, sentence in enumerate(many):
        want = alone(classifier, sentence, k)
        for got in (together[row], backwards[row]):
            assert (got - want).abs().max() < 1e-12 * want.abs().max() + 1e-14
    assert len({tuple(row.tolist()) for row in together}) == len(many)


@pytest.mark.parametrize("router", ROUTERS)
def test_negative_control_a_real_id_more_changes_the_logits(router):
    classifier = build(router)
    (sentence,) = sentences(9)
    longer = replace(sentence, ids=np.append(sentence.ids, 0).astype(np.uint8))
    want = alone(classifier, sentence)
    assert (alone(classifier, longer) - want).abs().max() > 1e-4 * want.abs().max()


def test_a_router_that_draws_does_so_anew_for_each_batch_and_alike_in_every_call():
    """All sentences of a batch meet the same experts; of 200 equal ones, in two batches, two kinds of logits come
    out."""
    config = replace(tiny_config(), moe=replace(tiny_config().moe, router="stochastic"))
    routers = restore_routers(config, [], SYMBOLS)
    classifier = Classifier(RunModel(config, None, build_model(config, SYMBOLS), routers))
    same = sentences(7) * 200
    first, again = predict(classifier, same, 1), predict(classifier, same, 1)
    assert torch.equal(first, again)
    assert len({tuple(row.tolist()) for row in first.round(decimals=4)}) > 1


@pytest.mark.parametrize("router", ROUTERS)
def test_the_order_of_sentences_does_not_matter(router):
    """No memory goes from one batch to the next, whatever was read before."""
    classifier = build(router)
    many = sentences(*np.random.default_rng(1).integers(1, 30, 150).tolist())
    before = predict(classifier, many, K)
    order = np.random.default_rng(2).permutation(len(many)).tolist()
    after = predict(classifier, [many[i] for i in order], K)
    assert (after - before[order]).abs().max() < 1e-6 * before.abs().max()
    assert (after - before).abs().max() > 1e-3 * before.abs().max()  # negative control


def test_negative_control_memory_would_matter():
    """The same model with the published code's memory depends on the batch before."""
    classifier = build("frozen").eval()
    first, second, other = (pad(sentences(7, 7, seed=seed)).ids_BQ for seed in range(3))
    found = []
    with torch.no_grad():
        for earlier in (first, other):
            memory = classifier.model.hidden(earlier, None, Routing(K), memory_len=16).memory
            found.append(classifier.model.hidden(second, memory, Routing(K)).hidden_BQD[:, -1])
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("pre_norm", [True, False])
def test_the_head_reads_the_last_hidden_state(pre_norm):
    """Equal to the head's layers by hand on the hidden state that the language model's own logits come from."""
    classifier = build("frozen", pre_norm=pre_norm).eval()
    (sentence,) = sentences(9)
    weights = dict(classifier.named_parameters())
    with torch.no_grad():
        found = classifier.model.hidden(torch.tensor(sentence.ids[None].astype(int)), None, Routing(K))
        x_D = found.hidden_BQD[0, -1]
        inner_D = torch.tanh(weights["head.0.weight"] @ x_D + weights["head.0.bias"])
        want = weights["head.3.weight"] @ inner_D + weights["head.3.bias"]
    assert (alone(classifier, sentence) - want).abs().max() < 1e-12


def test_a_hashed_sentence_is_routed_by_its_own_ids():
    """The plan of a batch holds what the bare table says of each sentence, with id 0 left of it."""
    classifier = build("hashed").eval()
    (sentence,) = sentences(9)
    seen = []
    classifier.model.blocks[1].moe.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].plan_of(1)))
    alone(classifier, sentence)
    order_rE = classifier.routers[1].table.order_rE
    ids = [0, *sentence.ids.tolist()]
    want = [set(order_rE[ids[i] * SYMBOLS + ids[i + 1], :K].tolist()) for i in range(9)]
    rows = seen[0].chunks[0].rows
    got: list[set[int]] = [set() for _ in range(9)]
    for expert, source_n in enumerate(rows.source_N.tensor_split(rows.offset_L[:-1].long())):
        for token in source_n.tolist():
            got[token].add(expert)
    assert got == want


def test_dropout_is_on_in_training_only():
    classifier = build("hashed", dropout=0.3)
    batch = pad(sentences(9, 9))
    classifier.train()
    assert not torch.equal(classifier(batch, K, 1), classifier(batch, K, 2))
    many = sentences(9, 4)
    assert torch.equal(predict(classifier, many, K), predict(classifier, many, K))
    assert classifier.training


def test_distances_beyond_pretraining_count_as_its_longest():
    classifier = build("dense").eval()
    assert classifier.clamp_len == 16 + 16 - 1  # of the segment and the memory
    short, long = sentences(31), sentences(60)
    before = [alone(classifier, s) for (s,) in (short, long)]
    classifier.clamp_len = 100
    after = [alone(classifier, s) for (s,) in (short, long)]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
