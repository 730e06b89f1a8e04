import os
from pathlib import Path

import numpy as np
import pytest

from foreroute.engine.config import Tokens
from foreroute.engine.data.tokens.byte_values import ByteVocab, byte_vocab
from foreroute.engine.errors import UserError

ALL_BYTES = bytes(range(256))


def test_bytes_keeps_every_value_and_round_trips():
    vocab = byte_vocab(Tokens.bytes, b"only a few")
    assert vocab.size == 256
    assert vocab.encode(ALL_BYTES).tolist() == list(range(256))
    assert vocab.decode(vocab.encode(b"a\nb\xff\0")) == b"a\nb\xff\0"


def test_txl_drops_newlines_and_sorts_what_occurs():
    vocab = byte_vocab(Tokens.txl, b"cab\na\n")
    assert vocab.symbols == b"abc"
    ids = vocab.encode(b"cab\na")
    assert ids.dtype == np.uint8
    assert ids.tolist() == [2, 0, 1, 0]
    assert vocab.decode(ids) == b"caba"


def test_encode_equals_plain_loop():
    text = bytes(np.random.default_rng(0).choice(list(b"xyz\n\xe9"), 500).tolist())
    vocab = byte_vocab(Tokens.txl, text)
    plain = [sorted(b"xyz\xe9").index(value) for value in text if value != 10]
    assert vocab.encode(text).tolist() == plain


def test_unknown_byte_is_named():
    with pytest.raises(UserError, match=r"byte 113 \(b'q'\): not among the 3 symbols of this txl"):
        ByteVocab(Tokens.txl, b"abc").encode(b"a\nq")


@pytest.mark.parametrize("bad", [3, -1, 300])
def test_decode_refuses_ids_outside(bad):
    with pytest.raises(ValueError, match=rf"id {bad}: must be in \[0, 3\)"):
        ByteVocab(Tokens.txl, b"abc").decode(np.array([0, bad]))


def test_enwik8_prefix_has_200_values_with_newline():
    data = os.environ.get("FOREROUTE_DATA")
    if not data:
        pytest.skip("FOREROUTE_DATA is unset")
    text = (Path(data) / "enwik8_prefix" / "enwik8.first4154394").read_bytes()
    vocab = byte_vocab(Tokens.txl, text)
    assert vocab.size == 199  # the data's README counts 200 distinct bytes
    assert vocab.decode(vocab.encode(text)) == text.replace(b"\n", b"")
