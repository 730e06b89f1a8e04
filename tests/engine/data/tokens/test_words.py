"""Words against a plain reading of Transformer-XL's rules: lines from Python's file, dicts, and sorting."""

import io

import numpy as np
import pytest

from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.tokens import words as module
from foreroute.engine.data.tokens.words import WORDS, count_words, open_words
from foreroute.engine.errors import UserError

TRAIN = "the cat sat\n\n the  dog\tsat on the mat \r\nlast \u00e9\u4e2d line".encode()
HELD_OUT = b"the bird sat\non"


def plain(train, text, most=None):
    """The words by id, and the ids of a text."""
    count = {}
    for line in io.TextIOWrapper(io.BytesIO(train), "utf-8"):
        for word in line.strip().split():
            count[word] = count.get(word, 0) + 1
    known = ["<eos>", *sorted(count, key=lambda word: -count[word])]  # equal ones stay in order
    if "<unk>" not in count:
        known = [*known[: most and most - 1], "<unk>"]
    ids = []
    for line in io.TextIOWrapper(io.BytesIO(text), "utf-8"):
        ids += [known.index(word if word in known else "<unk>") for word in line.strip().split()] + [0]
    return known, ids


def encoded(vocab, *documents):
    found = list(vocab.encode_pieces(Piece(document, True) for document in documents))
    return np.concatenate([part.ids for part in found]).tolist()


@pytest.mark.parametrize("most", [None, 4])
@pytest.mark.parametrize("text", [TRAIN, HELD_OUT, b"\n", b"no end", b"<eos> the\n"])
def test_words_and_ids_are_those_of_the_published_rules(text, most):
    known, ids = plain(TRAIN, text, most)
    vocab = count_words([Piece(TRAIN, True)], most)
    assert vocab.words == known and vocab.size == len(known) == (most or 11)
    assert encoded(vocab, text) == ids
    assert encoded(vocab, text, HELD_OUT) == ids + plain(TRAIN, HELD_OUT, most)[1]


@pytest.mark.parametrize("size", [1 << 20, 12])
def test_words_without_an_id_are_counted_in_bytes(monkeypatch, size):
    """Each with a byte that ends it; <unk> itself has an id."""
    real = module.chunks
    monkeypatch.setattr(module, "chunks", lambda pieces: real(pieces, size))
    vocab = count_words([Piece(TRAIN, True)], None)
    text = "the b\u00efrd sat\non  \u4e2d\u4e2d <unk>\n".encode()
    found = list(vocab.encode_pieces([Piece(text, True), Piece(TRAIN, True)]))
    assert sum(part.spelled for part in found) == (5 + 1) + (6 + 1)
    assert sum((part.ids == vocab.words.index("<unk>")).sum() for part in found) == 3


def test_a_text_may_have_its_own_unknown_word():
    train = b"<unk> a a b <unk> <unk>"
    vocab = count_words([Piece(train, True)], None)
    assert vocab.words == ["<eos>", "<unk>", "a", "b"]
    assert encoded(vocab, b"z b") == [1, 3, 0]
    assert count_words([Piece(b"a a a b b <unk>", True)], 3).words == ["<eos>", "a", "<unk>"]


def test_ids_do_not_depend_on_chunks(monkeypatch):
    text = b"".join(b"w%d%s" % (i * i % 97, b"\n" if i % 7 == 0 else b" ") for i in range(2000))
    vocab = count_words([Piece(text, True)], None)
    whole = encoded(vocab, text)
    real = module.chunks
    monkeypatch.setattr(module, "chunks", lambda pieces: real(pieces, 50))
    assert encoded(vocab, text) == whole == plain(text, text)[1]
    assert count_words([Piece(text, True)], None) == vocab


def test_text_comes_back_with_single_blanks():
    vocab = count_words([Piece(TRAIN, True)], None)
    ids = vocab.encode(b"the  cat\nsat bird")
    assert ids.tolist() == [vocab.words.index(word) for word in ("the", "cat", "<eos>", "sat", "<unk>")]
    assert vocab.decode(ids) == b"the cat \nsat <unk> "
    assert b"".join(vocab.decode_stream(ids.tolist())) == vocab.decode(ids)


def test_the_file_of_words_opens_again():
    vocab = count_words([Piece(TRAIN, True)], None)
    again = open_words(vocab.files()[WORDS])
    assert again == vocab and again.fingerprint == vocab.fingerprint
    assert count_words([Piece(TRAIN + b" more", True)], None).fingerprint != vocab.fingerprint


def test_a_prompt_that_is_not_utf8_is_refused():
    with pytest.raises(UserError, match="byte 2 of the text is not UTF-8"):
        count_words([Piece(TRAIN, True)], None).encode(b"ab\xff")
