"""Numbers of experts per row against plain loops, and tables that are balanced at them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from foreroute.engine.config import Builder, MoEConfig, RouteWeights
from foreroute.engine.evaluation.table_balance import balances
from foreroute.engine.routing.hashing import hash64, uniform
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.row_counts import CountRule, first_k, solve
from foreroute.engine.routing.tables import build_tables, row_frequency, table_from_state, table_state
from tests.references.row_counts import balanced_orders, counts_at

VOCAB = 8
MOE = MoEConfig(experts=6, ngram=2, rows=23)


def text(seed=0, size=900):
    draws = np.random.default_rng(seed).zipf(1.5, size)
    return (np.minimum(draws, VOCAB) - 1).astype(np.uint8)


def spread_values(row_s, logit_sE, use_s):
    """Descending weights as values, coarse enough for ties."""
    weight_sE = np.exp(logit_sE - logit_sE.max(axis=1, keepdims=True))
    return np.rint(50 * weight_sE.cumsum(axis=1)).astype(np.int64)


RULE = CountRule(("test",), spread_values)


def build(moe=MOE, rule=RULE, **options):
    options = {"num_tables": 2, "seed": 3, "cache_dir": None, **options}
    return build_tables(moe, VOCAB, text(), counts=rule, **options)


def counts_of(table, k):
    return table.count_r(k).tolist()


@pytest.mark.method
@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize(("rows", "choices", "levels"), [(1, 1, 3), (1, 5, 3), (40, 7, 4), (300, 4, 10**6)])
def test_numbers_are_those_of_a_sorted_list(rows, choices, levels, least):
    draw = np.random.default_rng(rows + choices)
    value_sE = np.sort(draw.integers(0, levels, (rows, choices)), axis=1)
    use_s = draw.zipf(1.7, rows).clip(max=500)
    tie_sE = draw.permutation(rows * choices).reshape(rows, choices).astype(np.uint64)
    first_sE = solve(value_sE, use_s, tie_sE, least=least)
    assert first_sE.dtype == np.int16 and (np.diff(first_sE, axis=1) >= 0).all()
    for k in range(1, choices + 1):
        found = (first_sE <= k).sum(axis=1)
        want = counts_at(value_sE.tolist(), use_s.tolist(), tie_sE.tolist(), k, least)
        assert found.tolist() == want
        assert abs(found @ use_s / use_s.sum() - k) <= use_s.max() / use_s.sum() / 2


def test_the_example():
    values, ties = np.array([[1, 5, 9], [2, 3, 9]]), np.arange(6, dtype=np.uint64).reshape(2, 3)
    assert solve(values, np.array([1, 3]), ties, least=0).tolist() == [[1, 2, 3], [1, 2, 3]]


def test_equal_values_are_taken_by_their_hash():
    """All rows alike: without an order of ties the mean would be 1 or 4."""
    rows = 1000
    ties = hash64(9, np.arange(rows)[:, None], np.arange(4))
    first_sE = solve(np.zeros((rows, 4), np.int64), np.ones(rows, np.int64), ties, least=0)
    assert [(first_sE <= k).sum() for k in (1, 2, 3, 4)] == [1000, 2000, 3000, 4000]
    assert len(set((first_sE <= 2).sum(axis=1).tolist())) > 2
    alike = solve(np.zeros((rows, 4), np.int64), np.ones(rows, np.int64), ties, least=1)
    assert (alike[:, 0] == 1).all() and (alike <= 2).sum() == 2000


def test_choices_of_unequal_size():
    """A prefix of whole choices whose sizes make k; rows of sizes 1, 2, 1 have at most 4."""
    draw = np.random.default_rng(1)
    value_sE = np.sort(draw.permutation(300).reshape(100, 3), axis=1)
    size_sE, use_s = draw.permuted(np.tile([1, 2, 1], (100, 1)), axis=1), draw.integers(1, 9, 100)
    ties = np.zeros((100, 3), np.uint64)
    first_sE = solve(value_sE, use_s, ties, least=0, size_sE=size_sE)
    events = sorted((value_sE[r, c], r, c) for r in range(100) for c in range(3))
    for k in range(1, 5):
        ends = np.cumsum([0] + [use_s[r] * size_sE[r, c] for _, r, c in events])
        end = np.abs(ends - k * use_s.sum()).argmin()
        taken = {(r, c) for _, r, c in events[:end]}
        assert {(r, c) for r in range(100) for c in range(3) if first_sE[r, c] <= k} == taken


@pytest.mark.parametrize("unseen", [False, True])
def test_rows_that_the_text_does_not_have_use_k(unseen):
    draw = np.random.default_rng(3)
    use_r, logits_rE = np.arange(60) % 4, -np.sort(-draw.standard_normal((60, 6)), axis=1)
    first_rE = first_k(RULE._replace(unseen=unseen), logits_rE, use_r, seed=1, index=0)
    plain_r = (first_rE == [1, 2, 3, 4, 5, 6]).all(axis=1)
    assert not plain_r[use_r > 0].all()
    assert plain_r[use_r == 0].all() == (not unseen)


@pytest.mark.method
@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize(("ngram", "rows"), [(1, 8), (2, 23), (2, 64)])
def test_orders_are_balanced_at_the_numbers(ngram, rows, least):
    moe = replace(MOE, ngram=ngram, rows=rows)
    for table in build(moe, RULE._replace(least=least)):
        frequency = row_frequency(table, text())
        uses = {row: int(frequency[row]) for row in np.flatnonzero(frequency)}

        def count(row, k, table=table):
            return counts_of(table, k)[row]

        def draw(row, choice, table=table):
            return float(uniform(hash64(3, 3, table.index, row, choice)))

        expected = balanced_orders(count, uses, 6, draw)
        assert {row: table.order_rE[row].tolist() for row in expected} == expected


def test_numbers_do_not_depend_on_the_builder():
    numbers = [build(replace(MOE, builder=builder))[1].first_rE for builder in (Builder.balanced, Builder.random)]
    numbers.append(build(replace(MOE, builder=Builder.packed, pack=3))[1].first_rE)
    numbers.append(build(replace(MOE, weights=RouteWeights.uniform))[1].first_rE)
    assert all(torch.equal(numbers[0], other) for other in numbers)
    assert not torch.equal(numbers[0], build()[0].first_rE)  # another table
    assert not torch.equal(numbers[0], build(seed=4)[1].first_rE)


def test_packed_orders_fill_blocks():
    (table,) = build(replace(MOE, experts=8, builder=Builder.packed, pack=4), num_tables=1)
    for k in range(1, 9):
        for row, count in enumerate(counts_of(table, k)):
            blocks = {e // 4 for e in table.order_rE[row, :count].tolist()}
            assert len(blocks) == -(-count // 4)


def test_orders_made_for_the_numbers_are_even_and_others_are_not():
    share = 1 / np.arange(4, 260)
    ids = np.random.default_rng(2).choice(256, 60_000, p=share / share.sum()).astype(np.uint8)
    moe = MoEConfig(experts=8, ngram=2, rows=4096)
    (table,) = build_tables(moe, 256, ids, num_tables=1, seed=1, cache_dir=None, counts=RULE)
    (fixed,) = build_tables(moe, 256, ids, num_tables=1, seed=1, cache_dir=None)
    assert max(found.experts for found in balances(table, ids, ())) < 1.002
    fixed = replace(fixed, first_rE=table.first_rE)
    assert max(found.experts for found in balances(fixed, ids, ())) > 1.02


@pytest.mark.parametrize("columns", [6, 9])
@pytest.mark.parametrize("rule", [None, RULE, RULE._replace(least=0)])
def test_balances_equal_plain_loops(rule, columns):
    """Of 6 experts; columns after them cost no row."""
    (table,) = build(replace(MOE, copy_experts=columns - 6), rule, num_tables=1)
    uses = row_frequency(table, text()).astype(int).tolist()
    for found in balances(table, text(), (1, 2, 3), experts=6):
        counts = [found.k] * 23 if rule is None else counts_of(table, found.k)
        load, touched = Counter(), Counter()
        for row, use in enumerate(uses):
            chosen = [expert for expert in table.order_rE[row, : counts[row]].tolist() if expert < 6]
            load.update(dict.fromkeys(chosen, use))
            for ranks in (1, 2, 3):
                touched[ranks] += use * len({expert // (6 // ranks) for expert in chosen})
        mean = sum(load.values()) / 6
        assert found.experts == pytest.approx(max(load.values()) / mean)
        for ranks, part in found.ranks.items():
            assert part.touched == pytest.approx(touched[ranks] / sum(uses))
            sums = [sum(load[e] for e in range(6) if e // (6 // ranks) == rank) for rank in range(ranks)]
            assert part.load == pytest.approx(max(sums) / (mean * 6 / ranks))


def test_numbers_are_part_of_the_table():
    (table,) = build(num_tables=1)
    again = table_from_state(table_state(table))
    assert torch.equal(again.first_rE, table.first_rE)
    assert table_from_state(table_state(replace(table, first_rE=None))).first_rE is None
    other = table.first_rE.clone()
    other[0, -1] -= 1
    first, second = (HashedRouter(one).identity(weights=False) for one in (table, replace(table, first_rE=other)))
    assert any((a != b).any() for a, b in zip(first, second, strict=True))
    assert len(HashedRouter(replace(table, first_rE=None)).identity()) == len(HashedRouter(table).identity()) - 1


def test_the_cache_is_by_rule(tmp_path):
    def cached(rule):
        (table,) = build(rule=rule, num_tables=1, cache_dir=tmp_path)
        return table, len(list(tmp_path.iterdir()))

    (plain, files), (table, more) = cached(None), cached(RULE)
    assert plain.first_rE is None and (files, more) == (1, 2)

    def unread(*_):
        raise AssertionError("the table is not read from the cache")

    again, same = cached(RULE._replace(value=unread))
    assert same == 2 and torch.equal(again.first_rE, table.first_rE) and torch.equal(again.order_rE, table.order_rE)
    with pytest.raises(AssertionError, match="not read"):
        cached(RULE._replace(value=unread, key=("other",)))
    random = replace(MOE, builder=Builder.random)
    keys = set()
    for ids in (text(), text(seed=1)):
        build_tables(random, VOCAB, ids, num_tables=1, seed=3, cache_dir=tmp_path / "random", counts=RULE)
        keys |= set((tmp_path / "random").iterdir())
    assert len(keys) == 2  # the numbers depend on the text, so the key does


def test_sets_of_a_router_have_its_numbers():
    (table,) = build(num_tables=1)
    router = HashedRouter(table)
    for k in (1, 3, 6):
        sets = router.row_sets(k)
        assert sets.count_r.dtype == torch.int32 and sets.count_r.tolist() == counts_of(table, k)
        weight_rK = sets.dense_weights(6)
        for row, count in enumerate(counts_of(table, k)):
            scores = table.logits_rE[row, :count].double()
            want = torch.zeros(6, dtype=torch.float64)
            want[table.order_rE[row, :count].long()] = scores.softmax(dim=0)
            torch.testing.assert_close(weight_rK[row].double(), want, rtol=1e-5, atol=1e-7)
