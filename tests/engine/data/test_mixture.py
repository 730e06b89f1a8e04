"""A mixture against a plain loop that reads each corpus on from where it was."""

import numpy as np
import pytest

from foreroute.engine.config import MoEConfig
from foreroute.engine.data.mixture import Mixture
from foreroute.engine.data.streams import Streams
from foreroute.engine.errors import UserError
from foreroute.engine.evaluation.ngram_baselines import count_grams
from foreroute.engine.routing.tables import build_tables


def plain(corpora, weights, stretch, cycles):
    """Ids of a mixture; the order of a cycle by the largest share that is still due."""
    order, given = [], [0] * len(weights)
    for step in range(1, sum(weights) + 1):
        due = [weight * step / sum(weights) - have for weight, have in zip(weights, given, strict=True)]
        chosen = max(range(len(weights)), key=lambda i: round(due[i], 9))
        given[chosen] += 1
        order.append(chosen)
    cursor, found = [0] * len(corpora), []
    for chosen in order * cycles:
        for _ in range(stretch):
            found.append(int(corpora[chosen][cursor[chosen] % len(corpora[chosen])]))
            cursor[chosen] += 1
    return found


def mixture(corpora, weights, stretch):
    ends = np.cumsum([len(corpus) for corpus in corpora]).tolist()
    return Mixture(np.concatenate(corpora), ends, weights, stretch)


def test_worked_example():
    made = mixture([np.arange(5, dtype=np.uint8), np.array([10, 11], np.uint8)], [2, 1], 2)
    assert np.asarray(made).tolist() == [0, 1, 10, 11, 2, 3, 4, 0, 10, 11, 1, 2]
    assert (len(made), made.size, made.dtype) == (12, 12, np.uint8)


@pytest.mark.parametrize("weights", [[1, 1, 1], [7, 2, 1], [1, 5, 3]])
@pytest.mark.parametrize("stretch", [1, 4, 50])
def test_every_place_is_that_of_a_plain_loop(weights, stretch):
    corpora = [np.arange(size, dtype=np.uint16) + 1000 * i for i, size in enumerate((90, 31, 7))]
    made = mixture(corpora, weights, stretch)
    cycles = len(made) // sum(weights) // stretch
    want = plain(corpora, weights, stretch, cycles)
    assert made[:].tolist() == want
    places = np.random.default_rng(0).integers(0, len(made), (3, 20))
    assert made[places].tolist() == np.array(want)[places].tolist()
    assert made[5:9].tolist() == want[5:9] and made[-1] == want[-1]
    shares = np.bincount(np.array(want) // 1000) / len(want)
    assert shares == pytest.approx(np.array(weights) / sum(weights))
    assert set(want) == {int(i) for corpus in corpora for i in corpus}  # all of each
    less = plain(corpora, weights, stretch, cycles - 1)  # control: a cycle less would not do
    assert set(less) != set(want)


def test_documents_start_where_a_plain_loop_sees_another_one():
    made = mixture([np.arange(5, dtype=np.uint8), np.array([10, 11], np.uint8)], [2, 1], 2)
    assert made.document_starts(np.array([3, 5, 7])).tolist() == [2, 4, 5, 7, 8, 10]
    rng = np.random.default_rng(0)
    for weights in ([1], [3], [1, 1], [3, 1, 2]):
        sizes = [int(size) for size in rng.integers(3, 40, len(weights))]
        corpora = [np.arange(size) + 100 * i for i, size in enumerate(sizes)]
        inside = [np.sort(rng.choice(np.arange(1, size), size // 3, replace=False)) for size in sizes]
        offset = np.cumsum([0, *sizes])
        ends = np.concatenate(
            [[*own + start, start + size] for own, start, size in zip(inside, offset, sizes, strict=False)]
        )
        made = mixture(corpora, weights, 4)
        ids, starts = made[:].tolist(), []
        for place in range(1, len(ids)):
            corpus, at = divmod(ids[place], 100)
            goes_on = ids[place - 1] == ids[place] - 1 and at not in inside[corpus]
            starts += [] if goes_on else [place]
        assert made.document_starts(ends).tolist() == starts


def test_streams_read_a_mixture_as_any_text():
    corpora = [np.arange(200, dtype=np.uint8), np.arange(200, 240, dtype=np.uint8)]
    made = mixture(corpora, [3, 1], 16)
    lazy, copied = (Streams(ids, 3, 10, 2, 0.3) for ids in (made, made[:]))
    for index in range(40):
        a, b = lazy.batch(index, range(3)), copied.batch(index, range(3))
        assert all((getattr(a, n) == getattr(b, n)).all() for n in ("ids_BQ", "targets_BQ", "left_BC", "stream_B"))


def test_tables_and_counts_see_a_mixture_as_any_text():
    rng = np.random.default_rng(1)
    made = mixture([rng.integers(0, 9, 400).astype(np.uint8), rng.integers(5, 9, 90).astype(np.uint8)], [3, 1], 16)
    moe = MoEConfig(experts=4, ngram=2, rows=50)
    lazy, copied = (build_tables(moe, 9, ids, num_tables=2, seed=1, cache_dir=None) for ids in (made, made[:]))
    assert all((a.order_rE == b.order_rE).all() for a, b in zip(lazy, copied, strict=True))
    counts = [count_grams(ids, 2, 9) for ids in (made, made[:])]
    assert counts[0].keys.tolist() == counts[1].keys.tolist() and counts[0].counts.tolist() == counts[1].counts.tolist()


def test_as_many_weights_as_corpora():
    with pytest.raises(UserError, match=r"corpus.weights=\[1, 2\]: 1 corpora need as many weights"):
        mixture([np.arange(5)], [1, 2], 3)
