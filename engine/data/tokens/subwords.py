"""Byte-pair encoding and whatever else a tokenizer.json says, by the library `tokenizers`.

A tokeniser of one's own is byte-level BPE as GPT-2's (Radford et al. 2019), trained on the training split. A document
ends with the id of the end-of-text token, where the tokeniser has one.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.tokens.chunks import CHUNK, Chunk, chunks
from foreroute.engine.data.tokens.numbers import pass_on
from foreroute.engine.data.tokens.vocab import Encoded, Ids, characters, fingerprint_of, ids_dtype, spelled_bytes
from foreroute.engine.errors import UserError

TOKENIZER = "tokenizer.json"
_END = "<|endoftext|>"
_TRAINED = 1 << 16  # bytes of a chunk for training, of which the library holds 256
_ENDS = (_END, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@dataclass(frozen=True, slots=True)
class SubwordVocab:
    """A tokeniser of the library."""

    content: bytes  # of its tokenizer.json
    tokenizer: Tokenizer
    size: int
    document_end: int | None  # id behind a document
    unknown: int | None = None  # id of all that has none of its own

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer.json."""
        return fingerprint_of("tokenizer", self.content)

    def encode(self, text: bytes) -> Ids:
        """Turn a text into ids, without the end of a document.

        Raises:
            UserError: it is not UTF-8.
        """
        found = self.tokenizer.encode(characters(text), add_special_tokens=False).ids
        return np.array(found, ids_dtype(self.size))

    def decode(self, ids: NDArray[np.integer[Any]]) -> bytes:
        """Turn ids back into text; the end of a document has none."""
        return bytes(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode())

    def decode_stream(self, ids: Iterable[int]) -> Iterator[bytes]:
        """Yield text as soon as its characters are whole."""
        stream = DecodeStream(skip_special_tokens=True)
        for i in ids:
            yield (stream.step(self.tokenizer, i) or "").encode()

    def encode_pieces(self, pieces: Iterable[Piece]) -> Iterator[Encoded]:
        """Turn documents of text into ids, each with its end; documents of ids are taken as they are."""
        rest = iter(pieces)
        first = list(islice(rest, 1))
        if first and not isinstance(first[0].data, bytes):
            yield from pass_on(chain(first, rest), self.size)
            return
        for batch in _batches(chunks(chain(first, rest))):
            yield self._encode_batch(batch)

    def _encode_batch(self, batch: list[Chunk]) -> Encoded:
        found = self.tokenizer.encode_batch_fast([chunk.text for chunk in batch], add_special_tokens=False)
        ids: list[int] = []
        ends, spelled = [], 0
        for chunk, part in zip(batch, found, strict=True):
            ids += part.ids
            if self.unknown in part.ids:
                spelled += spelled_bytes(self._unknown_parts(chunk.text))
            if chunk.ends:
                ids += [] if self.document_end is None else [self.document_end]
                ends.append(len(ids))
        return Encoded(np.array(ids, ids_dtype(self.size)), np.array(ends, np.int64), spelled)

    def _unknown_parts(self, text: str) -> Iterator[str]:
        found = self.tokenizer.encode(text, add_special_tokens=False)
        for i, (start, end) in zip(found.ids, found.offsets, strict=True):
            if i == self.unknown:
                yield text[start:end]

    def known(self, text: bytes) -> bytes:
        """Return the text, in which what is not UTF-8 is replaced."""
        return text.decode(errors="replace").encode()

    def files(self) -> dict[str, bytes]:
        """Return the tokenizer.json."""
        return {TOKENIZER: self.content}


def _batches(found: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Put chunks together that are about `CHUNK` long."""
    batch, size = [], 0
    for chunk in found:
        batch.append(chunk)
        size += len(chunk.text)
        if size >= CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def train_bpe(pieces: Iterable[Piece], size: int) -> SubwordVocab:
    """Train byte-level BPE on a training split.

    Args:
        size: ids at most: 256 for the bytes, one for the end of a document, and merges.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=[_END], initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator((chunk.text for chunk in chunks(pieces, _TRAINED)), trainer)
    return open_tokenizer(tokenizer.to_str(pretty=True).encode(), TOKENIZER)


def open_tokenizer(content: bytes, name: str) -> SubwordVocab:
    """Open a tokenizer.json.

    Raises:
        UserError: it is none; `name` is that of the option or file.
    """
    try:
        model = json.loads(content)["model"]
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{name}: not a tokenizer.json ({str(error)[:200]})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = tokenizer.get_vocab(with_added_tokens=True)
    if not known:
        raise UserError(f"{name}: a tokenizer.json without symbols")
    unknown = known.get(model.get("unk_token"), model.get("unk_id"))  # unk_id: of Unigram
    end = next((known[token] for token in _ENDS if token in known), None)
    return SubwordVocab(content, tokenizer, max(known.values()) + 1, end, unknown)
