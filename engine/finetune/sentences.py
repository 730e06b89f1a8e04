"""Sentences as ids, and as batches of about equal length.

A sentence is its bytes and one blank, as GLUE's files have it, so every sentence ends at the same symbol. Rows of a
batch are filled up at the right with id 0. The model is causal, so no real position sees them, and a hashed router's
keys look left only.

Letters: B sentences, Q ids of the longest one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.data.tokens.vocab import Vocab
from foreroute.engine.errors import require
from foreroute.engine.finetune.glue import Example

_POOL = 64  # batches that are sorted by length together: about 4 % of the ids are padding then (SST-2, batches of 16)


@dataclass(frozen=True, slots=True)
class Sentence:
    """An example as the model reads it."""

    ids: NDArray[np.unsignedinteger[Any]]  # at least one
    label: int


@dataclass(frozen=True, slots=True)
class SentenceBatch:
    """Sentences side by side."""

    ids_BQ: Tensor  # int64, 0 after a sentence's end
    length_B: Tensor  # int64: ids of each sentence
    label_B: Tensor  # int64

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self.label_B)


def encode(examples: Sequence[Example], vocab: Vocab) -> list[Sentence]:
    """Turn examples into ids; bytes that have none are left out (`foreign_bytes` counts them).

    Raises:
        UserError: nothing is left of a sentence.
    """
    found = []
    for example in examples:
        ids = vocab.encode(vocab.known(example.text + b" "))
        require(len(ids) > 0, f"sentence {example.text[:40]!r}: the model's vocabulary has none of its bytes")
        found.append(Sentence(ids, example.label))
    return found


def foreign_bytes(examples: Sequence[Example], vocab: Vocab) -> int:
    """Count the bytes that have no id."""
    return sum(max(len(example.text) - len(vocab.known(example.text)), 0) for example in examples)


def pad(sentences: Sequence[Sentence]) -> SentenceBatch:
    """Put sentences side by side.

    Example: ids [7, 8, 9] and [5] become [[7, 8, 9], [5, 0, 0]] with lengths [3, 1].
    """
    lengths = [len(sentence.ids) for sentence in sentences]
    ids_BQ = torch.zeros(len(sentences), max(lengths), dtype=torch.int64)
    for row, sentence in zip(ids_BQ, sentences, strict=True):
        row[: len(sentence.ids)] = torch.from_numpy(sentence.ids.astype(np.int64))
    labels = [sentence.label for sentence in sentences]
    return SentenceBatch(ids_BQ, torch.tensor(lengths), torch.tensor(labels))


def training_batches(sentences: Sequence[Sentence], batch: int, seed: int) -> Iterator[SentenceBatch]:
    """Yield batches without end; see `training_places`."""
    lengths = [len(sentence.ids) for sentence in sentences]
    for places in training_places(lengths, batch, seed):
        yield pad([sentences[i] for i in places])


def training_places(lengths: Sequence[int], batch: int, seed: int) -> Iterator[list[int]]:
    """Yield the places of the examples of each batch without end, epoch after epoch, each in a new order.

    An epoch takes every example once. Its order is random, but for pools of batches that are sorted by length; then
    the batches of a pool are shuffled.
    """
    generator = np.random.default_rng(seed)
    pool = batch * _POOL
    while True:
        order = generator.permutation(len(lengths)).tolist()
        for start in range(0, len(order), pool):
            cuts = by_length(lengths, order[start : start + pool], batch)
            for place in generator.permutation(len(cuts)).tolist():
                yield cuts[place]


def by_length(lengths: Sequence[int], places: Sequence[int], batch: int) -> list[list[int]]:
    """Cut places of examples into batches, the shortest first; the last one may be smaller."""
    order = sorted(places, key=lambda i: lengths[i])
    return [order[start : start + batch] for start in range(0, len(order), batch)]
