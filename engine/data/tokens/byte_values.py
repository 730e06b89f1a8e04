"""One id for each byte value of a vocabulary.

`bytes` keeps all 256 values, so bits per symbol are true bits per byte. `txl` drops newline bytes and keeps only the
values that occur in the whole corpus: the published Transformer-XL preprocessing of enwik8 does that (vocabulary 204),
because its tokeniser splits on line ends. The two are not comparable.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.config import Tokens
from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.tokens.vocab import Encoded, fingerprint_of, no_ends
from foreroute.engine.errors import UserError

NEWLINE = b"\n"


@dataclass(frozen=True, slots=True)
class ByteVocab:
    """The byte values that have an id.

    Example: `ByteVocab(Tokens.txl, b"abc").encode(b"cab\\na")` is [2, 0, 1, 0]; decoding it gives b"caba".
    """

    tokens: Tokens
    symbols: bytes  # sorted distinct byte values; a value's position is its id
    document_end: ClassVar[None] = None  # no id stands for it

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.symbols)

    @property
    def fingerprint(self) -> str:
        """sha256 of the byte values and of what is dropped."""
        return fingerprint_of(self.tokens.name, self.symbols)

    @property
    def dropped(self) -> bytes:
        """Byte values that encode() removes from the text."""
        return NEWLINE if self.tokens is Tokens.txl else b""

    def encode(self, text: bytes) -> NDArray[np.uint8]:
        """Turn text into ids [number of kept bytes].

        Raises:
            UserError: a byte is outside the vocabulary.
        """
        unknown = text.translate(None, self.symbols + self.dropped)
        if unknown:
            raise UserError(
                f"byte {unknown[0]} ({unknown[:1]!r}): not among the {self.size} symbols of this "
                f"{self.tokens.name} vocabulary"
            )
        table = bytearray(256)
        for i, value in enumerate(self.symbols):
            table[value] = i
        return np.frombuffer(text.translate(bytes(table), self.dropped), dtype=np.uint8)

    def decode(self, ids: NDArray[np.integer[Any]]) -> bytes:
        """Turn ids back into text (what `txl` dropped does not come back)."""
        outside = ids[(ids < 0) | (ids >= self.size)]
        if outside.size:
            raise ValueError(f"id {outside[0]}: must be in [0, {self.size})")
        return ids.astype(np.uint8).tobytes().translate(self.symbols.ljust(256, b"\0"))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[bytes]:
        """Yield the byte of each id."""
        for i in ids:
            yield self.symbols[i : i + 1]

    def encode_pieces(self, pieces: Iterable[Piece]) -> Iterator[Encoded]:
        """Turn documents into ids."""
        for data, ends in pieces:
            assert isinstance(data, bytes)
            ids = self.encode(data)
            yield Encoded(ids, np.array([len(ids)]) if ends else no_ends())

    def known(self, text: bytes) -> bytes:
        """Return a text without the bytes that have no id."""
        return text.translate(None, bytes(set(range(256)) - set(self.symbols)))

    def files(self) -> dict[str, bytes]:
        """Return nothing: meta.json holds the symbols."""
        return {}


def byte_vocab(tokens: Tokens, text: bytes) -> ByteVocab:
    """Make the vocabulary of a corpus from its whole text (all splits), or from the values that occur in it."""
    if tokens is Tokens.bytes:
        return ByteVocab(tokens, bytes(range(256)))
    return ByteVocab(tokens, bytes(sorted(set(text) - set(NEWLINE))))
