"""Sentences as ids and batches: nothing is lost, padding is where it should be."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from foreroute.engine.config import Tokens
from foreroute.engine.data.tokens.byte_values import ByteVocab
from foreroute.engine.errors import UserError
from foreroute.engine.finetune.glue import Example, read_examples
from foreroute.engine.finetune.sentences import Sentence, encode, foreign_bytes, pad, training_batches

SST2 = Path(os.environ.get("FOREROUTE_DATA", "")) / "sst2"


def sentences(*lengths):
    return [Sentence(np.full(n, i + 1, np.uint8), i % 2) for i, n in enumerate(lengths)]


def test_encodes_with_the_models_symbols():
    vocab = ByteVocab(Tokens.txl, b" abc")
    examples = [Example(b"cab", 1), Example(b"a\xc3xb", 0)]
    assert [s.ids.tolist() for s in encode(examples, vocab)] == [[3, 1, 2, 0], [1, 2, 0]]
    assert [s.label for s in encode(examples, vocab)] == [1, 0]
    assert foreign_bytes(examples, vocab) == 2
    assert encode([Example(b"xyz", 0)], vocab)[0].ids.tolist() == [0]  # the blank is left
    with pytest.raises(UserError, match="sentence b'xyz'"):
        encode([Example(b"xyz", 0)], ByteVocab(Tokens.txl, b"abc"))


def test_pads_at_the_right():
    ids = [np.array([7, 8, 9], np.uint8), np.array([5], np.uint8)]
    batch = pad([Sentence(ids[0], 1), Sentence(ids[1], 0)])
    assert batch.ids_BQ.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch.length_B.tolist() == [3, 1] and batch.label_B.tolist() == [1, 0]
    assert batch.ids_BQ.dtype == torch.int64


def test_an_epoch_takes_every_sentence_once():
    many = [Sentence(np.array([i], np.uint8), 0) for i in range(103)]
    epochs = []
    batches = training_batches(many, 4, seed=1)
    for _ in range(2):
        epoch = list(itertools.islice(batches, 26))
        assert sorted(i for batch in epoch for i in batch.ids_BQ[:, 0].tolist()) == list(range(103))
        epochs.append([batch.ids_BQ.tolist() for batch in epoch])
    assert epochs[0] != epochs[1]
    again = training_batches(many, 4, seed=1)
    assert [batch.ids_BQ.tolist() for batch in itertools.islice(again, 26)] == epochs[0]
    assert next(training_batches(many, 4, seed=2)).ids_BQ.tolist() != epochs[0][0]


def test_batches_are_of_about_equal_length():
    lengths = np.random.default_rng(0).integers(1, 200, 3000).tolist()
    many = [Sentence(np.ones(n, np.uint8), 0) for n in lengths]
    epoch = list(itertools.islice(training_batches(many, 16, seed=1), 188))
    padded = sum(batch.ids_BQ.numel() for batch in epoch)
    assert sum(lengths) < padded < 1.06 * sum(lengths)
    longest = [int(batch.length_B.max()) for batch in epoch]
    assert longest != sorted(longest)  # not the short ones first


@pytest.mark.slow
@pytest.mark.skipif(not SST2.is_dir(), reason="FOREROUTE_DATA has no sst2")
def test_padding_of_sst2():
    """What engine/finetune/sentences.py says of it."""
    many = encode(read_examples(SST2 / "train.tsv"), ByteVocab(Tokens.bytes, bytes(range(256))))
    padded = real = 0
    for batch in itertools.islice(training_batches(many, 16, seed=1), 2000):
        padded, real = padded + batch.ids_BQ.numel(), real + int(batch.length_B.sum())
    assert padded / real - 1 == pytest.approx(0.04, abs=0.02)
