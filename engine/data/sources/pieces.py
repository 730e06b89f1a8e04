"""A source as a stream of pieces of documents, and where the stream is cut into splits.

A source is text (bytes) or ids (an array); pieces of both are counted, sliced and hashed alike. A document is a file, a
line of JSON lines, or what an index of ids says.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Data = bytes | NDArray[np.integer[Any]]
_SPACE_FROM, _ANYWHERE_FROM = 1 << 16, 1 << 17  # bytes without the end of a line


class Piece(NamedTuple):
    """The next part of a document."""

    data: Data
    ends: bool  # the document ends with it

    @property
    def hashed(self) -> bytes | memoryview:
        """The bytes that represent it in a hash: ids in 64 bits, for any width in a file."""
        return self.data if isinstance(self.data, bytes) else np.ascontiguousarray(self.data, "<i8").data


class Cuts(NamedTuple):
    """Where a stream is cut into splits: bytes, or ids."""

    at: Sequence[int]  # where all splits but the first begin
    exact: bool  # there; else where a document ends, or a line
    slack: int  # what a cut that is not exact may move to reach the end of a document


def cut(pieces: Iterable[Piece], cuts: Cuts) -> Iterator[tuple[int, Piece]]:
    """Yield the pieces with the number of their split; a piece that lies in two splits is cut.

    A cut that is not exact lies at the first end of a document from its place on, or after `slack` more at the first
    end of a line; a text with lines of 64 KiB is cut after a blank, and one without blanks between any two characters.

    Example: pieces abc, def. with cuts exactly at 2 and 4: (0, ab), (1, c), (1, d), (2, ef.).
    """
    place = position = 0
    for piece in pieces:
        while place < len(cuts.at):
            found = _offset(piece, position, cuts.at[place], cuts)
            if found is None:
                break
            head = Piece(piece.data[:found], piece.ends and found == len(piece.data))
            if found or head.ends:
                yield place, head
            place += 1
            position += found
            piece = Piece(piece.data[found:], piece.ends and found < len(piece.data))
        if len(piece.data) or piece.ends:
            yield place, piece
        position += len(piece.data)


def _offset(piece: Piece, position: int, at: int, cuts: Cuts) -> int | None:
    """Return where in a piece a split begins; None: not in it, and not at its end."""
    size = len(piece.data)
    if cuts.exact:
        return at - position if at - position <= size else None
    found = [size] if piece.ends and at <= position + size else []
    free = at + cuts.slack - position  # from here on a document may be cut
    if not isinstance(piece.data, bytes):
        found += [max(free, 0)] if free <= size else []
    else:
        for wait, mark in ((0, b"\n"), (_SPACE_FROM, b" ")):
            end = piece.data.find(mark, max(free + wait - 1, 0)) + 1
            found += [end] if end else []
        place = max(free + _ANYWHERE_FROM, 0)
        while place < size and 0x80 <= piece.data[place] < 0xC0:
            place += 1
        found += [place] if place < size else []
    return min(found) if found else None
