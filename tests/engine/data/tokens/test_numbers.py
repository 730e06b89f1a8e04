import numpy as np
import pytest

from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.tokens.numbers import NumberVocab
from foreroute.engine.data.tokens.vocab import ids_dtype
from foreroute.engine.errors import UserError


def test_text_is_numbers():
    vocab = NumberVocab(300)
    ids = vocab.encode(b" 12 0\n299 ")
    assert ids.tolist() == [12, 0, 299] and ids.dtype == np.uint16
    assert vocab.decode(ids) == b"".join(vocab.decode_stream([12, 0, 299])) == b"12 0 299 "
    assert vocab.known(b"12 x 300 0") == b"12 0"
    for word in (b"300", b"-1", b"x"):
        with pytest.raises(UserError, match=f"'{word.decode()}': this run has ids from 0 to 299 for text"):
            vocab.encode(b"1 " + word)


def test_an_id_beyond_the_vocabulary_is_named():
    pieces = [Piece(np.array([1, 2]), False), Piece(np.array([3, 5, 4]), True)]
    found = list(NumberVocab(6).encode_pieces(pieces))
    assert [part.ids.tolist() for part in found] == [[1, 2], [3, 5, 4]]
    assert [part.ends.tolist() for part in found] == [[], [3]]
    with pytest.raises(UserError, match=r"corpus.vocab_size=5: id 5 at place 3 is beyond it"):
        list(NumberVocab(5).encode_pieces(pieces))


def test_ids_are_as_narrow_as_the_vocabulary_allows():
    for size, dtype in ((2, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)):
        assert ids_dtype(size) is dtype and np.iinfo(dtype).max >= size - 1
