"""Byte-pair encoding: the library alone, on whole texts, is the truth for what comes in pieces."""

import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from tokenizers.pre_tokenizers import Whitespace

from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.tokens import subwords
from foreroute.engine.data.tokens.subwords import TOKENIZER, open_tokenizer, train_bpe
from foreroute.engine.errors import UserError

TEXT = "".join(f"def name_{i % 13}(x):\n    return {i * i}  # \u00e9\u4e2d\n\n" for i in range(400)).encode()
SIZE = 300


@pytest.fixture(scope="module")
def vocab():
    return train_bpe([Piece(TEXT, True)], SIZE)


def encoded(vocab, pieces):
    found = list(vocab.encode_pieces(pieces))
    ends, start = [], 0
    for part in found:
        ends += (start + part.ends).tolist()
        start += len(part.ids)
    return np.concatenate([part.ids for part in found]), ends


def test_training_is_the_same_each_time_and_knows_all_bytes(vocab):
    assert train_bpe([Piece(TEXT[:700], False), Piece(TEXT[700:], True)], SIZE).content == vocab.content
    assert vocab.size == SIZE and vocab.document_end == 0
    every = bytes(range(256)).decode("latin-1").encode()
    assert vocab.decode(vocab.encode(every)) == every


def test_ids_are_those_of_the_library_for_each_whole_document(vocab, monkeypatch):
    documents = [TEXT, b"", b"  short", TEXT[:5000]]
    plain = Tokenizer.from_str(vocab.content.decode())
    want, ends = [], []
    for document in documents:
        want += [*plain.encode(document.decode()).ids, 0]
        ends.append(len(want))
    real = subwords.chunks
    for size in (1 << 20, 700):
        monkeypatch.setattr(subwords, "chunks", lambda pieces, size=size: real(pieces, size))
        ids, found = encoded(vocab, (Piece(document, True) for document in documents))
        assert ids.dtype == np.uint16 and ids.tolist() == want and found == ends
    assert vocab.decode(ids) == b"".join(documents)  # the end of a document has no text


def test_text_comes_character_by_character(vocab):
    ids = vocab.encode("a\u4e2d\U0001f600b".encode()).tolist()
    parts = list(vocab.decode_stream(ids))
    assert len(parts) == len(ids) and b"" in parts  # some characters have several ids
    assert b"".join(parts) == "a\u4e2d\U0001f600b".encode()


def test_a_tokenizer_json_of_another_kind(tmp_path):
    words = Tokenizer(WordLevel({"a": 0, "b": 7, "[UNK]": 3, "</s>": 5}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.enable_truncation(2)
    vocab = open_tokenizer(words.to_str().encode(), "x")
    assert (vocab.size, vocab.document_end) == (8, 5)
    ids, ends = encoded(vocab, [Piece(b"a b z a", True), Piece(b"b", True)])
    assert ids.tolist() == [0, 7, 3, 0, 5, 7, 5] and ends == [5, 7]
    again = open_tokenizer(vocab.files()[TOKENIZER], "x")
    assert again.fingerprint == vocab.fingerprint
    ids, ends = encoded(vocab, [Piece(np.array([1, 7]), True)])  # ids of a file are taken as they are
    assert ids.tolist() == [1, 7] and ends == [2]


UNKNOWN = [
    (WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), (2 + 1) + (3 + 1)),
    (WordPiece({"a": 0, "[UNK]": 1, "##b": 2}, unk_token="[UNK]"), 3 + 1),
    (Unigram([("a", -1.0), ("<unk>", -9.0), ("b", -1.0)], unk_id=1), 3 + 1),
    (BPE({"a": 0, "b": 1, "[UNK]": 2}, [], unk_token="[UNK]"), 3 + 1),
    (BPE({"a": 0, "b": 1}, []), 0),  # knows no unknown symbol
]


@pytest.mark.parametrize(("model", "spelled"), UNKNOWN)
def test_what_has_no_id_is_counted_in_bytes(model, spelled):
    """Each part with a byte that ends it: of words all of ab, elsewhere the sign of three bytes alone."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    vocab = open_tokenizer(tokenizer.to_str().encode(), "x")
    found = list(vocab.encode_pieces([Piece("a ab \u4e2d a".encode(), True), Piece(b"a", True)]))
    assert sum(part.spelled for part in found) == spelled


@pytest.mark.parametrize("content", [b"", b"{}", b"no JSON", b'{"model": 3}', b"\xff"])
def test_what_is_no_tokenizer_is_named(content):
    with pytest.raises(UserError, match=r"^corpus.tokenizer=x: not a tokenizer.json"):
        open_tokenizer(content, "corpus.tokenizer=x")


def test_real_text_comes_back(monkeypatch):
    data = os.environ.get("FOREROUTE_DATA")
    if not data:
        pytest.skip("FOREROUTE_DATA is unset")
    text = (
        (Path(data) / "enwik8_prefix" / "enwik8.first4154394").read_bytes()[:200_000].decode(errors="ignore").encode()
    )
    vocab = train_bpe([Piece(text, True)], 1000)
    ids, _ = encoded(vocab, [Piece(text, True)])
    assert vocab.decode(ids) == text and len(ids) < len(text) / 2
    plain = Tokenizer.from_str(vocab.content.decode()).encode(text.decode()).ids
    real = subwords.chunks
    monkeypatch.setattr(subwords, "chunks", lambda pieces, size=0: real(pieces, 10_000))
    assert encoded(vocab, [Piece(text, True)])[0].tolist() == ids.tolist() == [*plain, 0]
