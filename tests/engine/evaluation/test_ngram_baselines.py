import bz2
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from foreroute.engine.evaluation.ngram_baselines import bzip2_bpc, count_grams, gram_probability, order_n_bpc

V = 5


def markov_ids(length, seed):
    rng = np.random.default_rng(seed)
    choice = np.random.default_rng(7).dirichlet(np.full(V, 0.4), size=(V, V))
    ids = [0, 1]
    while len(ids) < length:
        ids.append(rng.choice(V, p=choice[ids[-2], ids[-1]]))
    return np.array(ids, dtype=np.uint8)


class PlainKneserNey:
    """Modified Kneser-Ney with dicts, context by context, straight from Chen and Goodman 1998."""

    def __init__(self, ids, order):
        padded = [0] * order + [int(i) for i in ids]
        top = Counter(tuple(padded[i : i + order + 1]) for i in range(len(ids)))
        self.tables = [top]
        for _ in range(order):
            shorter = Counter(gram[1:] for gram in self.tables[0])
            self.tables.insert(0, shorter)
        self.discounts = [self.discount(table) for table in self.tables]

    @staticmethod
    def discount(table):
        n = [sum(1 for c in table.values() if c == i) for i in range(5)]
        if min(n[1:]) == 0:
            return [0, 0.5, 1, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        d = [0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
        return d if min(d[1:]) > 0 else [0, 0.5, 1, 1.5]

    def probability(self, gram):
        if not gram:
            return 1 / V
        table, discount = self.tables[len(gram) - 1], self.discounts[len(gram) - 1]
        after = {c: table[(*gram[:-1], c)] for c in range(V) if (*gram[:-1], c) in table}
        lower = self.probability(gram[1:])
        if not after:
            return lower
        free = sum(discount[min(count, 3)] for count in after.values())
        count = after.get(gram[-1], 0)
        return (count - discount[min(count, 3)] + free * lower) / sum(after.values())


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("length", [6, 400, 3000])
def test_order_n_equals_plain_loop(order, length):
    train, test = markov_ids(length, 1), markov_ids(300, 2)
    model = PlainKneserNey(train, order)
    padded = [0] * order + test.tolist()
    bits = [-math.log2(model.probability(tuple(padded[i : i + order + 1]))) for i in range(len(test))]
    assert order_n_bpc(train, test, order, V) == pytest.approx(sum(bits) / len(test), rel=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_probabilities_sum_to_one_in_every_context(order):
    train = count_grams(markov_ids(200, 1), order, V)
    probability = gram_probability(np.arange(V ** (order + 1)), train, order, V)
    assert (probability > 0).all()
    np.testing.assert_allclose(probability.reshape(-1, V).sum(1), 1, rtol=1e-12)


def test_count_grams_worked_example_and_chunks(monkeypatch):
    grams = count_grams(np.array([1, 2, 1, 2], dtype=np.uint8), 1, 10)
    assert grams.keys.tolist() == [1, 12, 21]
    assert grams.counts.tolist() == [1, 2, 1]
    ids = markov_ids(100, 3)
    whole = count_grams(ids, 2, V)
    monkeypatch.setattr("foreroute.engine.evaluation.ngram_baselines._CHUNK", 7)
    chunked = count_grams(ids, 2, V)
    assert chunked.keys.tolist() == whole.keys.tolist()
    assert chunked.counts.tolist() == whole.counts.tolist()


def test_progress_goes_from_nothing_to_all(monkeypatch):
    monkeypatch.setattr("foreroute.engine.evaluation.ngram_baselines._CHUNK", 70)
    seen = []
    ids = markov_ids(100, 3)
    bpc = order_n_bpc(ids, ids, 1, V, lambda *parts: seen.append(parts))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert bpc == order_n_bpc(ids, ids, 1, V)


def test_a_markov_source_is_learnt_and_a_random_one_is_not():
    train, test = markov_ids(20000, 1), markov_ids(5000, 2)
    choice = defaultdict(Counter)
    for a, b, c in zip(train, train[1:], train[2:], strict=False):
        choice[a, b][c] += 1
    true_bits = -sum(n * math.log2(n / sum(after.values())) for after in choice.values() for n in after.values()) / (
        len(train) - 2
    )
    assert order_n_bpc(train, test, 2, V) == pytest.approx(true_bits, abs=0.03)
    assert order_n_bpc(train, test, 1, V) > true_bits + 0.1
    noise = np.random.default_rng(0).integers(0, V, (2, 20000), dtype=np.uint8)
    assert order_n_bpc(noise[0], noise[1], 2, V) >= math.log2(V)


def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="order=7"):
        count_grams(np.zeros(3, dtype=np.uint8), 7, 256)


def test_bzip2_counts_bits_of_the_whole_file():
    text = bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8))
    assert bzip2_bpc([text[:999], b"", text[999:]]) == 8 * len(bz2.compress(text, compresslevel=9)) / 5000
    assert bzip2_bpc([text]) > 8
    assert bzip2_bpc([b"a" * 5000]) < 0.1
