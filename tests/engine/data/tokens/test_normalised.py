"""Texts that ids have in common, against Python's own unicodedata."""

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.tokens.normalised import normalised_ids
from foreroute.engine.data.tokens.subwords import open_tokenizer, train_bpe
from tests.references.multiply_xor import normalised

WORDS = "The the THE tHe Caf\u00e9 cafe CAFE\u0301 na\u00efve \ufb01n fin"
OTHERS = "\u00bd \t\n x \u5b57 \u0130i I \u00df \u03a3\u03c3"
TEXT = f" {WORDS} {OTHERS} " * 3


def plain_ids(vocab):
    number, found = {}, []
    for old in range(vocab.size):
        text = vocab.tokenizer.decode([old], skip_special_tokens=False)
        key = vocab.tokenizer.id_to_token(old) if "\ufffd" in text else normalised(text) or text
        found.append(number.setdefault(key, len(number)))
    return found


def test_ids_of_a_trained_vocabulary():
    vocab = train_bpe(iter([Piece(TEXT.encode(), True)]), 340)
    new_ids = normalised_ids(vocab)
    assert new_ids.tolist() == plain_ids(vocab)
    alone = [vocab.encode(text.encode()) for text in (" The", " the", " THE")]
    assert len({tuple(new_ids[ids.astype(np.int64)].tolist()) for ids in alone if len(ids) == 1}) == 1


@pytest.mark.parametrize(
    "spellings", [("the", "The", " THE "), ("cafe", "caf\u00e9", "cafe\u0301"), ("fin", "\ufb01n"), (" ", "\n", "\t\t")]
)
def test_spellings_become_one(spellings):
    words = {word: number for number, word in enumerate((*spellings, "other"))}
    vocab = open_tokenizer(Tokenizer(WordLevel(words, unk_token="other")).to_str().encode(), "x")
    assert normalised_ids(vocab).tolist() == [0] * len(spellings) + [1]
