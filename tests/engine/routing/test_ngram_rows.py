"""Keys of n-grams and the rows they find, against Python's own integers, one id at a time."""

import numpy as np
import pytest
import torch

from foreroute.engine.config import MoEConfig, RouteWeights
from foreroute.engine.errors import UserError
from foreroute.engine.routing.hashing import hash64
from foreroute.engine.routing.ngram_rows import KeyRows, ngram_keys
from foreroute.engine.routing.tables import build_tables, row_frequency

LAST_EXACT, FIRST_HASHED = 55_108, 55_109  # ids whose numbers of 4-grams are just below, and above, 2**63
ROWS = [1, 7, 4096, 8191, 8192, 8193, 65_536, 1_000_003, 2**22]


def plain_key(gram, vocab_size):
    """Of ids, oldest first."""
    if vocab_size ** len(gram) >= 2**63:
        return int(hash64(*gram).view(np.int64))
    key = 0
    for number in gram:
        key = key * vocab_size + number
    return key


def grams(ids, ngram, begins=()):
    """The n-gram that ends at each id but the first ngram - 1; ids of earlier documents are 0."""
    found = []
    for last in range(ngram - 1, len(ids)):
        places = range(last - ngram + 1, last + 1)
        start = max((place for place in begins if place <= last), default=0)
        found.append([ids[place] if place >= start else 0 for place in places])
    return found


def test_the_limit_is_where_numbers_no_longer_fit():
    assert LAST_EXACT**4 < 2**63 <= FIRST_HASHED**4


@pytest.mark.parametrize("ngram", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab_size", [2, 256, LAST_EXACT, FIRST_HASHED, 2**31])
@pytest.mark.parametrize("begins", [(), (0,), (3,), (5, 6, 8, 9, 20), tuple(range(40))], ids=str)
def test_keys_equal_plain_numbers(vocab_size, ngram, begins):
    ids = np.random.default_rng(ngram).integers(0, vocab_size, 40)
    ids[::7] = vocab_size - 1
    marks = np.zeros((1, 40), bool)
    marks[0, list(begins)] = True
    expected = [plain_key(gram, vocab_size) for gram in grams(ids.tolist(), ngram, begins)]
    for given in [marks] if begins else [marks, None]:
        assert ngram_keys(ids[None], vocab_size, ngram, given).tolist() == [expected]


def test_numbers_that_do_not_fit_would_be_of_several_ngrams():
    """Negative control: without the hash, these two wrap to one number."""
    vocab_size = 2**16
    one, other = np.array([[1, 2, 3, 4]]), np.array([[2**15 + 1, 2, 3, 4]])
    wrapped = [sum(int(x) * vocab_size**i for i, x in enumerate(ids[0, ::-1])) % 2**63 for ids in (one, other)]
    assert wrapped[0] == wrapped[1]
    assert ngram_keys(one, vocab_size, 4) != ngram_keys(other, vocab_size, 4)


def test_example_of_the_docstring():
    ids = np.array([[7, 3, 4]])
    assert ngram_keys(ids, 10, 2).tolist() == [[73, 34]]
    assert ngram_keys(ids, 10, 2, np.array([[False, False, True]])).tolist() == [[73, 4]]


def test_too_many_ids_are_refused():
    with pytest.raises(UserError, match="a vocabulary of 2147483649 ids: must have at most 2147483648"):
        ngram_keys(np.zeros((1, 4), np.int64), 2**31 + 1, 2)


@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_the_hash_modulo_their_number(rows):
    keys = np.random.default_rng(rows).integers(-(2**63), 2**63, 50_000)
    found = KeyRows(4, 2**20, rows, seed=5, index=3).of_keys(keys.reshape(2, -1))
    expected = [number % rows for number in hash64(1, 5, 3, keys).tolist()]
    assert found.shape == (2, 25_000) and found.reshape(-1).tolist() == expected


@pytest.mark.parametrize("vocab_size", [300, 60_000])
@pytest.mark.parametrize("segment", [1, 3, 12])
def test_documents_in_segments_are_those_of_the_stream(vocab_size, segment):
    """Also with more ids on the left than a key needs."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocab_size, 30))
    marks = torch.zeros(30, dtype=torch.bool)
    marks[[0, 6, 7, 15, 17, 29]] = True
    keys = KeyRows(4, vocab_size, 5000, seed=1, index=0)
    whole = keys.of(ids[None, 6:], ids[None, :6], marks[None])[0]
    for at in range(6, 30, segment):
        parts = ids[None, at : at + segment], ids[None, at - 6 : at]
        assert keys.of(*parts, marks[None, at - 6 : at + segment]).tolist() == [
            whole[at - 6 : at - 6 + segment].tolist()
        ]
    assert whole.tolist() != keys.of(ids[None, 6:], ids[None, :6])[0].tolist()


def test_a_text_and_a_batch_have_the_same_keys_where_numbers_do_not_fit():
    ids = np.random.default_rng(0).integers(0, 60_000, 500)
    moe = MoEConfig(experts=4, ngram=4, rows=300, weights=RouteWeights.uniform)
    (table,) = build_tables(moe, 60_000, ids, num_tables=1, seed=1, cache_dir=None)
    rows = table.rows_of(torch.from_numpy(ids)[None], torch.zeros(1, 3, dtype=torch.int64))
    assert torch.bincount(rows[0], minlength=300).tolist() == row_frequency(table, ids).tolist()
