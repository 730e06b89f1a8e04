"""Ids that somebody made before, without the tokeniser that made them: text is the numbers, with blanks between."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.tokens.vocab import Encoded, Ids, fingerprint_of, ids_dtype, no_ends
from foreroute.engine.errors import require


@dataclass(frozen=True, slots=True)
class NumberVocab:
    """Ids from 0 to size - 1."""

    size: int
    document_end: ClassVar[None] = None  # no id stands for it

    @property
    def fingerprint(self) -> str:
        """sha256 of the size."""
        return fingerprint_of("ids", str(self.size).encode())

    def encode(self, text: bytes) -> Ids:
        """Read numbers.

        Raises:
            UserError: something is no number, or none of these ids.
        """
        words = text.split()
        for word in words:
            known = word.isdigit() and int(word) < self.size
            require(known, f"{word.decode(errors='replace')!r}: this run has ids from 0 to {self.size - 1:,} for text")
        return np.array([int(word) for word in words], ids_dtype(self.size))

    def decode(self, ids: NDArray[np.integer[Any]]) -> bytes:
        """Write numbers."""
        return b"".join(self.decode_stream(ids.tolist()))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[bytes]:
        """Yield each number with a blank."""
        for i in ids:
            yield b"%d " % i

    def encode_pieces(self, pieces: Iterable[Piece]) -> Iterator[Encoded]:
        """Take the ids of documents as they are."""
        return pass_on(pieces, self.size)

    def known(self, text: bytes) -> bytes:
        """Return the numbers that are ids."""
        return b" ".join(word for word in text.split() if word.isdigit() and int(word) < self.size)

    def files(self) -> dict[str, bytes]:
        """Return nothing: meta.json holds the size."""
        return {}


def pass_on(pieces: Iterable[Piece], size: int) -> Iterator[Encoded]:
    """Yield the ids of documents as they are.

    Raises:
        UserError: one is beyond the vocabulary.
    """
    position = 0
    for data, ends in pieces:
        assert isinstance(data, np.ndarray)
        if len(data):
            place = int(data.argmax())
            require(
                int(data[place]) < size,
                f"corpus.vocab_size={size}: id {data[place]} at place {position + place:,} is beyond it",
            )
        position += len(data)
        yield Encoded(data.astype(ids_dtype(size)), np.array([len(data)]) if ends else no_ends())
