"""The problem of benchmarks/bench_memory for all systems: a text, batches of it on each rank, the table rows that they
read, and the bytes that follow from these.

Letters: P ranks, T tokens of a rank, W width of a row, n ids in an n-gram.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.config import Corpus, CorpusConfig, Split, Tokens
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.streams import Batch, Streams
from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.ngram_tables.hash_keys import HashKeys, hash_keys
from foreroute.engine.routing.plans.row_plan import ID_BYTES, distinct_rows

PREFIX = "enwik8_prefix/enwik8.first4154394"
TEXTS = {"bytes": Tokens.bytes, "bpe8k": Tokens.bpe}
WORDS = {"words": Tokens.word}  # that only count
STREAMS, SEGMENT = 4, 512  # of a rank
REQUEST_BYTES, COUNT_BYTES = 8, 8  # of the public protocol's int64
BATCHES = 4  # that a measurement takes turns with


class Table(NamedTuple):
    """A table and how n-grams find its rows; one head."""

    rows: int
    width: int
    ngram: int


@dataclass(frozen=True)
class Text:
    """A text as ids."""

    ids: Ids
    vocab_size: int

    def keys(self, table: Table) -> HashKeys:
        """Return how n-grams find their rows."""
        return hash_keys((table.ngram,), 1, table.rows, vocab_size=self.vocab_size, seed=1, table=0)

    def batch(self, table: Table, rank: int, ranks: int, number: int) -> Batch:
        """Return a rank's part of a batch out of the middle of the text."""
        streams = Streams(self.ids, ranks * STREAMS, SEGMENT, self.keys(table).context, start=0.5)
        return streams.batch(number, range(rank * STREAMS, (rank + 1) * STREAMS))

    def rows(self, table: Table, rank: int, ranks: int, number: int) -> NDArray[np.int64]:
        """Return the rows [T] that a rank's tokens read in a batch."""
        own = self.batch(table, rank, ranks, number)
        return self.keys(table).rows_of(own.ids_BQ, own.left_BC).numpy().reshape(-1)


def read_text(kind: str, path: str | None) -> Text:
    """Read a text as bytes, byte pairs or words.

    Args:
        path: None: the prefix of enwik8 in the folder FOREROUTE_DATA, or without it Python's own sources.
    """
    found = path or Path(os.environ.get("FOREROUTE_DATA", "")) / PREFIX
    known = Path(found).exists()
    config = CorpusConfig(
        Corpus.file if known else Corpus.stdlib, str(found) if known else None, {**TEXTS, **WORDS}[kind]
    )
    corpus = prepare(config)
    return Text(corpus.split(Split.train), corpus.vocab.size)


class Bytes(NamedTuple):
    """The bytes that leave the ranks for each other in one step, all ranks together."""

    planned: int  # distinct rows and their gradients, fp32
    ids: int  # that the hosts tell each other ahead
    requested: int  # counts, ids, and a vector and a gradient for each request


def count_bytes(rank_rows: Sequence[NDArray[np.int64]], table: Table) -> Bytes:
    """Count what a step sends, planned and by the public protocol.

    Megatron-LM's Engram, as TorchRec's sharded tables, sorts requests by owner, exchanges their counts and then their
    ids, and sends a vector for each, twice where a row is asked for twice; as many gradients go back.
    """
    ranks, vector = len(rank_rows), 4 * table.width
    planned = ids = requested = 0
    for rank, rows in enumerate(rank_rows):
        asked = np.bincount(rows % ranks, minlength=ranks)
        asked[rank] = 0
        splits = distinct_rows(rows, table.rows, ranks).splits
        distinct = sum(splits) - splits[rank]
        planned += 2 * distinct * vector
        ids += (distinct + ranks - 1) * ID_BYTES
        requested += int(asked.sum()) * (2 * vector + REQUEST_BYTES) + (ranks - 1) * COUNT_BYTES
    return Bytes(planned, ids, requested)
