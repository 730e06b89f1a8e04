"""Words between white space, as in Transformer-XL's public preprocessing of WikiText-103.

Every line ends with <eos>. Ids: <eos>, then the words of the training split, the frequent ones first, equally frequent
ones in the order in which they first occur (vocabulary.py of https://github.com/kimiyoung/transformer-xl). A word that
the training split lacks is <unk>, which is the last id where the text has no such word itself.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.tokens.chunks import chunks
from foreroute.engine.data.tokens.vocab import (
    Encoded,
    Ids,
    characters,
    fingerprint_of,
    ids_dtype,
    no_ends,
    spelled_bytes,
)

WORDS = "words.txt"
_EOS, _UNKNOWN = "<eos>", "<unk>"


@dataclass(frozen=True, slots=True)
class WordVocab:
    """Words and their ids."""

    words: list[str]  # by id
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)
    document_end: ClassVar[None] = None  # no id stands for it

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {word: i for i, word in enumerate(self.words)})

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.words)

    @property
    def fingerprint(self) -> str:
        """sha256 of the words."""
        return fingerprint_of("word", self.files()[WORDS])

    def encode(self, text: bytes) -> Ids:
        """Turn a text into ids; each of its line breaks is <eos>.

        Raises:
            UserError: it is not UTF-8.
        """
        return self._encode(characters(text), ends=False)

    def _encode(self, text: str, *, ends: bool) -> Ids:
        """Turn text into ids; `ends`: its last line ends, too."""
        get, unknown, found = self._ids.get, self._ids[_UNKNOWN], []
        lines = _lines(text)
        for line in lines[:-1]:
            found += [get(word, unknown) for word in line.split()]
            found.append(0)
        if lines[-1]:
            found += [get(word, unknown) for word in lines[-1].split()]
            found += [0] if ends else []
        return np.array(found, ids_dtype(self.size))

    def decode(self, ids: NDArray[np.integer[Any]]) -> bytes:
        """Turn ids into words with blanks between, and lines."""
        return b"".join(self.decode_stream(ids.tolist()))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[bytes]:
        """Yield each word with a blank behind it; <eos> is a line break."""
        for i in ids:
            yield b"\n" if i == 0 else self.words[i].encode() + b" "

    def encode_pieces(self, pieces: Iterable[Piece]) -> Iterator[Encoded]:
        """Turn documents into ids."""
        for text, ends in chunks(pieces):
            ids = self._encode(text, ends=ends)
            spelled = spelled_bytes(word for word in text.split() if word not in self._ids)
            yield Encoded(ids, np.array([len(ids)]) if ends else no_ends(), spelled)

    def known(self, text: bytes) -> bytes:
        """Return the text: every word has an id."""
        return text

    def files(self) -> dict[str, bytes]:
        """Return the words, one a line."""
        return {WORDS: "".join(f"{word}\n" for word in self.words).encode()}


def count_words(pieces: Iterable[Piece], most: int | None) -> WordVocab:
    """Make the vocabulary of a training split.

    Args:
        most: ids at most, of the most frequent words; None for all.
    """
    counter: Counter[str] = Counter()
    for text, _ in chunks(pieces):
        for line in _lines(text):
            counter.update(line.split())
    counter.pop(_EOS, None)
    own = _UNKNOWN in counter
    limit = None if most is None else max(most - 1 - (not own), 0)
    words = [_EOS, *(word for word, _ in counter.most_common(limit))]
    return WordVocab(words if _UNKNOWN in words else [*words[: most and most - 1], _UNKNOWN])


def open_words(content: bytes) -> WordVocab:
    """Open the vocabulary of a words.txt."""
    return WordVocab(content.decode().split("\n")[:-1])


def _lines(text: str) -> list[str]:
    """Return the lines of a text as Python's files have them, and what is behind the last line break."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
