"""The interface of a vocabulary, for all kinds of symbols."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.errors import UserError

Ids = NDArray[np.unsignedinteger[Any]]


class Encoded(NamedTuple):
    """The next ids of a corpus."""

    ids: Ids
    ends: NDArray[np.int64]  # where documents end among them, ascending: the place behind their last id
    spelled: int = 0  # see spelled_bytes


class Vocab(Protocol):
    """The symbols that have an id, and how text becomes ids."""

    @property
    def size(self) -> int:
        """Number of ids."""

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides which ids a text has."""

    @property
    def document_end(self) -> int | None:
        """Id that it puts at the end of each document; None if it puts none."""

    def encode(self, text: bytes) -> Ids:
        """Turn a text, such as a prompt, into ids.

        Raises:
            UserError: something in it has no id.
        """

    def decode(self, ids: NDArray[np.integer[Any]]) -> bytes:
        """Turn ids back into text."""

    def decode_stream(self, ids: Iterable[int]) -> Iterator[bytes]:
        """Yield the text of ids as they come; a character that needs several ids comes with the last of them."""

    def encode_pieces(self, pieces: Iterable[Piece]) -> Iterator[Encoded]:
        """Turn a stream of documents into ids, with a bounded part of it in memory.

        Raises:
            UserError: something in it has no id.
        """

    def known(self, text: bytes) -> bytes:
        """Return a text without what has no id."""

    def files(self) -> dict[str, bytes]:
        """Return the files, by name, from which the vocabulary can be opened again; none where its name is enough."""


def ids_dtype(size: int) -> DTypeLike:
    """Return the narrowest of uint8, uint16 and uint32 that holds the ids of a vocabulary."""
    return np.uint8 if size <= 1 << 8 else np.uint16 if size <= 1 << 16 else np.uint32


def fingerprint_of(kind: str, content: bytes) -> str:
    """Return the sha256 of a vocabulary."""
    return hashlib.sha256(kind.encode() + b"\0" + content).hexdigest()


def characters(text: bytes) -> str:
    """Return a text, such as a prompt, as characters.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start:,} of the text is not UTF-8 ({error.reason})") from None


def spelled_bytes(unknown: Iterable[str]) -> int:
    """Return the bytes that spell out parts of a text that have no id of their own, each with a byte that ends it."""
    return sum(len(part.encode()) + 1 for part in unknown)


def no_ends() -> NDArray[np.int64]:
    """Return the ends of no documents."""
    return np.empty(0, np.int64)
