"""How far routes are a function of n-grams, against loops, and on routes that are one."""

from collections import Counter

import numpy as np
import pytest

from foreroute.engine.config import Split
from foreroute.engine.evaluation.ngram_routes import agreement, input_keys, table_of
from foreroute.engine.routing.ngram_rows import KeyRows
from foreroute.engine.routing.planned.given import NONE

V, E, K, N = 6, 8, 3, 600
RNG = np.random.default_rng(0)


TEXTS = {Split.train: RNG.integers(0, V, N).astype(np.uint8), Split.test: RNG.integers(0, V, 400).astype(np.uint8)}


class Corpus:
    """Two splits with documents, as PreparedCorpus has them."""

    def split(self, split):
        return TEXTS[split]

    def previous_id(self, split):
        return 0 if split is Split.train else 4

    def document_starts(self, split):
        return np.array([5, 6, 90, 399])


def grams(split, count, ngram):
    """The last ids of each input, oldest first; 0 before its document."""
    corpus = Corpus()
    inputs = [corpus.previous_id(split), *corpus.split(split).tolist()]
    starts = {int(start) + 1 for start in corpus.document_starts(split)}
    found = []
    for place in range(count):
        gram, inside = [], True
        for back in range(ngram):
            gram.insert(0, inputs[place - back] if inside and place >= back else 0)
            inside = inside and place - back not in starts
        found.append(tuple(gram))
    return found


def keys(split, count, ngram):
    return input_keys(Corpus(), split, count, KeyRows(ngram, V, 1, 0, 0))


def function_of(ngram, seed=1):
    """Experts [tokens, k] of both splits, drawn for each n-gram."""
    table = np.random.default_rng(seed).random((V**ngram, E)).argsort(axis=1)[:, :K].astype(np.uint16)
    return [table[keys(split, count, ngram)] for split, count in ((Split.train, N), (Split.test, 400))]


def compared(routes, ngram):
    return agreement(keys(Split.train, N, ngram), routes[0], keys(Split.test, 400, ngram), routes[1], E)


@pytest.mark.parametrize("ngram", [1, 2, 3])
@pytest.mark.parametrize("split", [Split.train, Split.test])
def test_keys_are_those_of_the_inputs(ngram, split):
    want = [sum(id * V ** (ngram - 1 - i) for i, id in enumerate(gram)) for gram in grams(split, 400, ngram)]
    assert keys(split, 400, ngram).tolist() == want


@pytest.mark.method
def test_a_router_that_is_a_function_of_bigrams():
    """All its tokens take their bigram's modal set, fewer that of their last id, and of trigrams those that were
    seen."""
    routes = function_of(2)
    one, two, three = (compared(routes, ngram) for ngram in (1, 2, 3))
    assert (two.sets, two.experts, two.seen) == (1, 1, 1)
    assert one.sets < 0.5 and one.seen == 1 and one.sets < one.experts < 1
    assert three.sets == three.experts == three.seen < 1
    noise = [RNG.random((len(part), E)).argsort(axis=1)[:, :K].astype(np.uint16) for part in routes]
    assert compared(noise, 2).sets < 0.2


@pytest.mark.parametrize("ngram", [1, 2])
def test_shares_against_loops(ngram):
    """Routes of any number of experts, none too, that depend on the key in part."""
    routes = function_of(ngram, seed=3)
    for part in routes:
        noisy = RNG.random(len(part)) < 0.3
        part[noisy] = RNG.random((int(noisy.sum()), E)).argsort(axis=1)[:, :K]
        part[np.arange(K) >= RNG.integers(0, K + 1, len(part))[:, None]] = NONE
    chosen = {}
    for gram, row in zip(grams(Split.train, N, ngram), routes[0].tolist(), strict=True):
        chosen.setdefault(gram, Counter()).update(expert for expert in row if expert != NONE)
    whole, hits, experts, tokens = 0, 0, 0, 0
    for gram, row in zip(grams(Split.test, 400, ngram), routes[1].tolist(), strict=True):
        used = {expert for expert in row if expert != NONE}
        order = sorted(range(E), key=lambda expert: (-chosen[gram][expert], expert))
        inside = used & set(order[: len(used)])
        whole, hits = whole + (bool(used) and inside == used), hits + len(inside)
        experts, tokens = experts + len(used), tokens + bool(used)
    found = compared(routes, ngram)
    assert found.sets == pytest.approx(whole / tokens) and found.experts == pytest.approx(hits / experts)
    assert 0.2 < found.sets < found.experts < 1


@pytest.mark.parametrize("rows", [V**2, 7])
def test_the_table_lists_the_most_chosen_first(rows):
    key_rows = KeyRows(2, V, rows, 5, 1)
    routes, key_N = function_of(2)[0], keys(Split.train, N, 2)
    table = table_of(key_N, routes, key_rows, E)
    assert table.shape == (rows, E) and (np.sort(table, axis=1) == np.arange(E)).all()
    for row in range(rows):
        count = Counter(routes[key_rows.of_keys(key_N) == row].ravel().tolist())
        ordered = [count[expert] for expert in table[row].tolist()]
        assert ordered == sorted(ordered, reverse=True)
    if rows == V**2:
        got = np.sort(table[keys(Split.test, 400, 2)][:, :K], axis=1)
        assert (got == np.sort(function_of(2)[1], axis=1)).all()


def test_rows_that_were_not_seen_spread_over_the_experts():
    none = np.empty((0, K), np.uint16)
    table = table_of(np.empty(0, np.int64), none, KeyRows(2, V, 4000, 5, 1), E)
    load = np.bincount(table[:, 0], minlength=E)
    assert load.min() > 400 and load.max() < 600
