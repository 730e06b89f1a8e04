"""Text to ids and back: one id for each byte value of a vocabulary.

`bytes` keeps all 256 values, so bits per symbol are true bits per byte. `txl` drops newline bytes and keeps only the
values that occur in the whole corpus: the published Transformer-XL preprocessing of enwik8 does that (vocabulary 204),
because its tokeniser splits on line ends. The two are not comparable. engine/data/corpus.py decides which text is
encoded.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.config import Tokens
from foreroute.engine.errors import UserError

NEWLINE = b"\n"


@dataclass(frozen=True, slots=True)
class Vocab:
    """The byte values that have an id.

    Example: `Vocab(Tokens.txl, b"abc").encode(b"cab\\na")` is [2, 0, 1, 0]; decoding it gives b"caba".
    """

    tokens: Tokens
    symbols: bytes  # sorted distinct byte values; a value's position is its id

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.symbols)

    @property
    def dropped(self) -> bytes:
        """Byte values that encode() removes from the text."""
        return NEWLINE if self.tokens is Tokens.txl else b""

    def encode(self, data: bytes) -> NDArray[np.uint8]:
        """Turn text into ids [number of kept bytes].

        Raises:
            UserError: a byte is outside the vocabulary.
        """
        unknown = data.translate(None, self.symbols + self.dropped)
        if unknown:
            raise UserError(
                f"byte {unknown[0]} ({unknown[:1]!r}): not among the {self.size} symbols of this "
                f"{self.tokens.name} vocabulary"
            )
        table = bytearray(256)
        for i, value in enumerate(self.symbols):
            table[value] = i
        return np.frombuffer(data.translate(bytes(table), self.dropped), dtype=np.uint8)

    def decode(self, ids: NDArray[np.integer]) -> bytes:
        """Turn ids back into text (what `txl` dropped does not come back)."""
        outside = ids[(ids < 0) | (ids >= self.size)]
        if outside.size:
            raise ValueError(f"id {outside[0]}: must be in [0, {self.size})")
        return ids.astype(np.uint8).tobytes().translate(self.symbols.ljust(256, b"\0"))


def build_vocab(tokens: Tokens, text: bytes) -> Vocab:
    """Make the vocabulary of a corpus from its whole text (all splits)."""
    if tokens is Tokens.bytes:
        return Vocab(tokens, bytes(range(256)))
    return Vocab(tokens, bytes(value for value in range(256) if value != NEWLINE[0] and value in text))
