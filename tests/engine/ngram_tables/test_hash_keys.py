"""From n-grams to a table's rows, against plain loops over the hash's own definition."""

import pytest
import torch

from foreroute.engine.ngram_tables.hash_keys import hash_keys
from foreroute.engine.routing.hashing import Purpose, hash64

KEYS = hash_keys((1, 3), 2, 50, vocab_size=12, seed=9, table=1)
IDS, LEFT = torch.tensor([[5, 11, 0, 3], [2, 2, 2, 7]]), torch.tensor([[1, 4, 8], [9, 9, 10]])


def rows(new_document: list[list[bool]] | None = None) -> list[list[list[int]]]:
    """The rows by loops; all n-grams of order 1 have a row each, those of order 3 are hashed."""
    found = []
    for b, (left, ids) in enumerate(zip(LEFT.tolist(), IDS.tolist(), strict=True)):
        stream, line = left + ids, []
        for place in range(3, 7):
            heads = []
            for number, order in enumerate((1, 3)):
                gram = stream[place - order + 1 : place + 1]
                if new_document is not None:
                    for back in range(order - 1):  # ids before a start count as 0
                        if new_document[b][place - back]:
                            gram[: order - 1 - back] = [0] * (order - 1 - back)
                for head in range(2):
                    index = ((1 << 16) + head) * 8 + order
                    key = sum(symbol * 12**i for i, symbol in enumerate(reversed(gram)))
                    within = key if 12**order <= 50 else int(hash64(Purpose.table_row, 9, index, key)) % 50
                    heads.append(50 * (2 * number + head) + within)
            line.append(heads)
        found.append(line)
    return found


def test_rows_equal_loops():
    got = KEYS.rows_of(IDS, LEFT)
    assert got.dtype == torch.int64 and got.tolist() == rows()
    assert KEYS.rows == 200 and KEYS.heads == 4 and KEYS.context == 2
    marks = torch.zeros(2, 7, dtype=torch.bool)
    marks[0, 4] = marks[1, 2] = True
    got = KEYS.rows_of(IDS, LEFT, marks)
    assert got.tolist() == rows(marks.tolist()) != rows()


def test_the_example():
    keys = hash_keys((1, 2), 1, 100, vocab_size=10, seed=0, table=0)
    assert keys.rows_of(torch.tensor([[3, 4]]), torch.tensor([[7]])).tolist() == [[[3, 173], [4, 134]]]


def test_heads_and_tables_have_hashes_of_their_own():
    ids, left = torch.arange(300)[None] % 12, torch.zeros(1, 2, dtype=torch.int64)
    keys = hash_keys((3,), 2, 1000, vocab_size=12, seed=9, table=0)
    first, second = keys.rows_of(ids, left)[0].T
    other = hash_keys((3,), 2, 1000, vocab_size=12, seed=9, table=1).rows_of(ids, left)[0].T
    for a, b in ((first, second - 1000), (first, other[0]), (second, other[1])):
        assert (a == b).float().mean() < 0.1


def test_too_few_ids_left_are_refused():
    with pytest.raises(ValueError, match="needs 2"):
        KEYS.rows_of(IDS, LEFT[:, :1])
