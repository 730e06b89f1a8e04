import numpy as np
import pytest

from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.tokens.chunks import chunks


def pieces(documents, size):
    for document in documents:
        for start in range(0, len(document), size):
            yield Piece(document[start : start + size], False)
        yield Piece(b"", True)


def mixed_text(seed, length):
    words = ["a", "\n", "\n\n", " ", "  ", "\u00e9", "\u4e2d\u6587", "word", "\t", "\r\n", "\U0001f600"]
    return "".join(np.random.default_rng(seed).choice(words, length)).encode()


def test_chunks_are_the_documents_however_they_come():
    documents = [mixed_text(1, 300), b"", b"x" * 100, mixed_text(2, 50)]
    whole = list(chunks(pieces(documents, 10**9), 40))
    assert len(whole) > 20
    for size in (1, 3, 64):
        assert list(chunks(pieces(documents, size), 40)) == whole
    found, part = [], ""
    for text, ends in whole:
        assert len(text.encode()) <= 40
        part += text
        if ends:
            found.append(part.encode())
            part = ""
    assert found == documents


def test_a_split_may_end_in_a_document():
    assert list(chunks([Piece(b"abc", False)])) == [("abc", False)]


@pytest.mark.parametrize(
    "text, first",
    [
        (b"ab cd\n\n  ef ghijk", b"ab cd\n\n  ef"),  # in front of the last white space
        (b"ab cd. \nefghijkl", b"ab"),  # but behind a letter or digit
        (b"a. b. c., d., e.", b"a. b. c.,"),
        ("\u00e9\u00e9 \u00e9\u00e9\u00e9\u00e9\u00e9".encode(), "\u00e9\u00e9".encode()),
        (b"abcdefghijklmno", b"abcdefghijkl"),
        ("abcdefghijk\u00e9lmn".encode(), b"abcdefghijk"),
    ],
)
def test_where_a_chunk_ends(text, first):
    assert next(chunks([Piece(text, True)], 12)).text.encode() == first
