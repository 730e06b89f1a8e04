"""Where a stream of documents is cut, against plain loops over its bytes."""

import numpy as np
import pytest

from foreroute.engine.data.sources.pieces import Cuts, Piece, cut


def in_pieces(documents, sizes):
    """Documents in pieces of the given sizes, again and again."""
    place = 0
    for document in documents:
        start = 0
        while start < len(document):
            size = sizes[place % len(sizes)]
            place += 1
            yield Piece(document[start : start + size], False)
            start += size
        yield Piece(document[:0], True)


def parts(pieces, cuts):
    """The content of each split, and the places of the ends of documents over all."""
    found, ends, position = {0: [], 1: [], 2: []}, [], 0
    for place, piece in cut(pieces, cuts):
        found[place].append(piece.data)
        position += len(piece.data)
        if piece.ends:
            ends.append(position)
    return [list(b"".join(map(bytes, data))) for data in found.values()], ends


DOCUMENTS = [b"one\ntwo\n", b"three", b"", b"four\nfive\nsix", b"se ven\n"]
TEXT = b"".join(DOCUMENTS)


def test_worked_example():
    found = list(cut([Piece(b"abc", False), Piece(b"def", True)], Cuts([2, 4], True, 0)))
    assert found == [(0, (b"ab", False)), (1, (b"c", False)), (1, (b"d", False)), (2, (b"ef", True))]


@pytest.mark.parametrize("sizes", [[1], [2, 3], [100]])
@pytest.mark.parametrize("at", [[0, 0], [3, 3], [5, 20], [8, 13], [len(TEXT), len(TEXT)]])
def test_exact_cuts_lie_where_they_are_asked(at, sizes):
    found, ends = parts(in_pieces(DOCUMENTS, sizes), Cuts(at, True, 0))
    assert [bytes(part) for part in found] == [TEXT[: at[0]], TEXT[at[0] : at[1]], TEXT[at[1] :]]
    assert ends == np.cumsum([len(document) for document in DOCUMENTS]).tolist()


def plain_cut(at, slack):
    """The first end of a document from `at` on, or of a line from at + slack on."""
    ends = set(np.cumsum([len(document) for document in DOCUMENTS]).tolist())
    for place in range(at, len(TEXT) + 1):
        if place in ends or (place >= at + slack and place > 0 and TEXT[place - 1 : place] == b"\n"):
            return place
    raise AssertionError


@pytest.mark.parametrize("sizes", [[1], [2, 3], [100]])
@pytest.mark.parametrize("slack", [0, 3, 50])
def test_other_cuts_lie_at_the_end_of_a_document_or_of_a_line(sizes, slack):
    seen = set()
    for at in range(1, len(TEXT)):
        found, _ = parts(in_pieces(DOCUMENTS, sizes), Cuts([at, len(TEXT)], False, slack))
        place = plain_cut(at, slack)
        assert (bytes(found[0]), bytes(found[1])) == (TEXT[:place], TEXT[place:])
        seen.add(place)
    assert len(seen) >= 4


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_a_text_without_lines_is_cut_at_a_blank_and_one_without_blanks_between_characters(size):
    for text, place in (
        (b"x" * 70_000 + b" " + b"y" * 100_000, 70_001),
        ("\u00e9".encode() * 100_000, 131_074),
        (b"z" * 140_000, 131_073),
    ):
        found, _ = parts(in_pieces([text], [size]), Cuts([1, len(text)], False, 0))
        assert len(found[0]) == place
        bytes(found[0]).decode()


def test_ids_are_cut_at_the_end_of_a_document_or_where_they_are_asked():
    documents = [np.arange(10, dtype=np.uint8), np.arange(10, 13, dtype=np.uint8)]
    for at, slack, place in ((4, 0, 4), (4, 9, 10), (4, 2, 6), (11, 5, 13)):
        found, ends = parts(in_pieces(documents, [3]), Cuts([at, 13], False, slack))
        assert found[0] == list(range(place)) and ends == [10, 13]


def test_ids_hash_alike_in_any_width():
    narrow, wide = (Piece(np.array([1, 2, 255], dtype), False).hashed for dtype in (np.uint8, np.int64))
    assert bytes(narrow) == bytes(wide) == b"".join(i.to_bytes(8, "little") for i in (1, 2, 255))
