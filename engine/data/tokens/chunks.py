"""Text in chunks that a tokeniser takes at once, cut where that changes no symbol."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from foreroute.engine.data.sources.pieces import Piece

CHUNK = 1 << 20  # bytes
# Tokenisers look at a run of white space as a whole, some with the sign before it: so in front of one, best behind a
# letter or digit.
_BEFORE_BLANK = re.compile(rb"(?s:.*)[0-9A-Za-z](?=\s)"), re.compile(rb"(?s:.*)\S(?=\s)")


class Chunk(NamedTuple):
    """The next part of a document, in whole characters."""

    text: str
    ends: bool  # the document ends with it


def chunks(pieces: Iterable[Piece], size: int = CHUNK) -> Iterator[Chunk]:
    """Yield documents in chunks; one longer than `size` bytes is cut, where possible in front of white space.

    The chunks depend on the documents alone, not on how they come in pieces.
    """
    held = b""
    for data, ends in pieces:
        assert isinstance(data, bytes)
        held += data
        while len(held) > size:
            end = _end(held[: size + 1], size)
            yield Chunk(held[:end].decode(), False)
            held = held[end:]
        if ends:
            yield Chunk(held.decode(), True)
            held = b""
    if held:  # a split ends in the document
        yield Chunk(held.decode(), False)


def _end(text: bytes, size: int) -> int:
    """Return where a chunk of at most `size` bytes ends; `text` has one byte more."""
    for before_blank in _BEFORE_BLANK:
        if found := before_blank.match(text):
            return found.end()
    end = size
    while 0x80 <= text[end] < 0xC0:
        end -= 1
    return end
