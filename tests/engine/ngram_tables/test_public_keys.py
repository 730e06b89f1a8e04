"""Rows that published models find, against loops in Python's integers, published numbers and transformers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foreroute.engine.errors import UserError
from foreroute.engine.ngram_tables.public_keys import engram_keys, is_prime, qwen_keys
from tests.references import multiply_xor as plain

ORDERS = [(2,), (2, 3), (3,), (2, 3, 4), (1, 4)]


def text(size, vocab_size, seed=0):
    ids = np.random.default_rng(seed).integers(0, vocab_size, size)
    ids[::5] = vocab_size - 1
    return ids


def rows_of(keys, ids, segment, missing, marks=None):
    """Rows of a text that is cut into segments."""
    whole = torch.cat([torch.full((keys.context,), missing), torch.from_numpy(ids)])
    found = []
    for first in range(0, len(ids), segment):
        seen = whole[first : first + keys.context + segment]
        begins = None
        if marks is not None:
            begins = torch.tensor([place - keys.context in marks for place in range(first, first + len(seen))])[None]
        found.append(keys.rows_of(seen[None, keys.context :], seen[None, : keys.context], begins)[0])
    return torch.cat(found).tolist()


@pytest.mark.parametrize("orders", ORDERS, ids=str)
@pytest.mark.parametrize("vocab_size", [2, 257, 129_280, 2**29])
def test_engram_rows_equal_plain_loops(orders, vocab_size):
    """Also of the second layer, whose primes are not those of the first; segments end anywhere."""
    layers, sizes, taken = (1, 15), tuple(50 + 7 * n for n in orders), set()
    ids = text(23, vocab_size)
    for layer in layers:
        primes = [plain.primes(least, 3, taken) for least in sizes]
        multipliers = plain.engram_multipliers(vocab_size, orders[-1], 5, layer)
        keys = engram_keys(vocab_size, layers, layer, orders=orders, rows=sizes, heads=3, seed=5, missing=1)
        expected = plain.rows(ids.tolist(), orders, primes, multipliers, missing=1)
        assert (keys.heads, keys.rows) == (3 * len(orders), sum(map(sum, primes)))
        for segment in (23, 7, 1):
            assert rows_of(keys, ids, segment, missing=1) == expected
        assert all(m % 2 == 1 and (vocab_size - 1) * m < 2**63 for m in keys.multipliers)
    other = engram_keys(vocab_size, layers, 1, orders=orders, rows=sizes, heads=3, seed=5, missing=1)
    assert rows_of(other, ids, 23, missing=1) != expected  # control: of the first layer


@pytest.mark.parametrize("orders", ORDERS, ids=str)
@pytest.mark.parametrize(("vocab_size", "number"), [(2, 0), (257, 1), (151_936, 0), (2**31, 3)])
def test_qwen_rows_equal_plain_loops(orders, vocab_size, number):
    ids, taken = text(40, vocab_size, seed=1), set()
    end = int(ids[3])
    for _ in range(number + 1):
        primes = [plain.primes(90, 2, taken) for _ in orders]
    multipliers = plain.qwen_multipliers(vocab_size, orders[-1], 1234, number)
    keys = qwen_keys(vocab_size, number, orders=orders, rows=90, heads=2, document_end=end)
    begins = [0, *(place + 1 for place in range(len(ids)) if ids[place] == end)]
    expected = plain.rows(ids.tolist(), orders, primes, multipliers, end, begins)
    for segment in (40, 9, 1):
        assert rows_of(keys, ids, segment, missing=end) == expected
    if orders[-1] > 2:  # control: across documents; the id before a document's first is the end that is missing
        assert expected != plain.rows(ids.tolist(), orders, primes, multipliers, end)


def test_known_document_starts_count_too():
    ids, marks = text(30, 50), {4, 5, 19}
    keys = engram_keys(50, (0,), 0, rows=(101, 151), heads=2, missing=7)
    expected = plain.rows(ids.tolist(), (2, 3), keys.primes, keys.multipliers, 7, [0, *sorted(marks)])
    assert rows_of(keys, ids, 8, missing=7, marks=marks) == expected
    assert rows_of(keys, ids, 8, missing=7) != expected


def test_new_ids_come_first():
    ids = text(20, 6)
    new_ids = torch.tensor([0, 1, 1, 0, 2, 3])
    keys = engram_keys(4, (0,), 0, rows=(101, 151), heads=2, missing=3, new_ids=new_ids)
    expected = plain.rows(new_ids[ids].tolist(), (2, 3), keys.primes, keys.multipliers, 3)
    left = torch.full((1, 2), 5)  # 5 becomes 3
    assert keys.rows_of(torch.from_numpy(ids)[None], left)[0].tolist() == expected


def test_tables_are_as_large_as_published():
    """DeepSeek-V4.1-Flash: 384,006,168 and 384,016,682 rows for layers 1 and 14, 8 heads for n = 2, 3 and 4 each.
    Qwen3.8-Flash-Next: 320,001,536 rows, a multiple of 128, for 16 heads from 20,000,000 on."""
    deepseek = [engram_keys(129_280, (1, 14), n, orders=(2, 3, 4), rows=(16_000_000,) * 3) for n in (1, 14)]
    assert [keys.rows for keys in deepseek] == [384_006_168, 384_016_682]
    assert -(-qwen_keys(151_936, 0).rows // 128) * 128 == 320_001_536


def test_rows_are_those_of_transformers():
    module = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    sizes = {"ngram_size": 3, "heads_per_ngram": 8, "ngram_vocab_size_base": 211}
    config = SimpleNamespace(**sizes, vocab_size=90, seed=1234, eos_token_id=4, make_ngram_vocab_size_divisible_by=128)
    ids_BQ = torch.from_numpy(text(60, 90).reshape(2, 30))
    ids_BQ[0, 9] = ids_BQ[0, 11] = ids_BQ[1, 20] = 4
    for number in (0, 2):
        theirs = module.Qwen4ExpTextNGramEmbedding(config, 16 * 4, 0, number)
        keys = qwen_keys(90, number, rows=211, document_end=4)
        row_BQH = keys.rows_of(ids_BQ, torch.full((2, 2), 4))
        assert keys.rows == theirs.total_vocab_size
        found_BQD = theirs.ngram_embedding.weight[row_BQH].flatten(2)
        assert torch.equal(found_BQD, theirs(ids_BQ, None))


def test_primes():
    sieve = [n for n in range(2000) if n > 1 and all(n % d for d in range(2, n))]
    assert [n for n in range(2000) if is_prime(n)] == sieve
    strong_liars = 3_215_031_751, 3_474_749_660_383, 341_550_071_728_321  # of witnesses up to 7, 13 and 17
    assert not any(map(is_prime, strong_liars)) and is_prime(2**61 - 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"orders": (3, 2)}, r"orders=\[3, 2\]"),
        ({"orders": ()}, r"orders=\[\]"),
        ({"orders": (0, 2)}, r"orders=\[0, 2\]"),
        ({"rows": (5,)}, r"rows=\[5\]: must be one number for each of 2"),
        ({"vocab_size": 2**31 + 1}, "2147483649 ids"),
    ],
)
def test_what_is_wrong_is_named(change, words):
    given = {"vocab_size": 50, "layers": (0,), "layer": 0, "orders": (2, 3), "rows": (5, 5)} | change
    with pytest.raises(UserError, match=words):
        engram_keys(**given)


def test_too_few_ids_left():
    keys = qwen_keys(9, 0, rows=5)
    with pytest.raises(ValueError, match="left_BC has 1 ids"):
        keys.rows_of(torch.zeros(1, 3).long(), torch.zeros(1, 1).long())
