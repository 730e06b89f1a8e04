"""Texts as an encoder's ids, and as batches: one sequence for each text.

A batch is sorted by length in pools, as in engine/finetune/sentences.py, and filled up at the right with padding.

Letters: B sequences, Q ids of the longest one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from foreroute.engine.errors import UserError, require
from foreroute.engine.finetune.masking import Vocabulary

TOKENIZER, MASK, PADDING = "tokenizer.json", "[MASK]", "[PAD]"


class TokenSequence(NamedTuple):
    """A text with the special ids around it."""

    ids: NDArray[np.int64]
    end: NDArray[np.int64]  # of each id: where its piece ends in the text, in characters; 0 for special ids

    @property
    def sequences(self) -> tuple["TokenSequence", ...]:
        """Itself, as an example that is one sequence."""
        return (self,)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences side by side."""

    ids_BQ: Tensor  # int64, with padding after a sequence's end
    mask_BQ: Tensor  # int64, 0 for padding


class WordPieces:
    """The tokenizer of an encoder's folder.

    Args:
        folder: has a tokenizer.json of the library tokenizers.
        longest: ids of a sequence at most; of a longer one the end is cut off.

    Raises:
        UserError: the file is missing or no tokenizer, or has no mask or padding.
    """

    def __init__(self, folder: Path, longest: int) -> None:
        path = folder / TOKENIZER
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{path}: is no tokenizer ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(longest)
        special = [token["id"] for token in json.loads(path.read_text())["added_tokens"] if token["special"]]
        self.padding = self._id_of(path, PADDING)
        self.vocabulary = Vocabulary(self._tokenizer.get_vocab_size(), self._id_of(path, MASK), tuple(special))

    def _id_of(self, path: Path, token: str) -> int:
        found: int | None = self._tokenizer.token_to_id(token)
        require(found is not None, f"{path}: has no {token}")
        assert found is not None
        return found

    def encode(self, texts: Sequence[str]) -> list[TokenSequence]:
        """Encode texts."""
        return [
            TokenSequence(np.array(one.ids, np.int64), np.array([end for _, end in one.offsets], np.int64))
            for one in self._tokenizer.encode_batch(list(texts))
        ]

    def pad(self, sequences: Sequence[TokenSequence]) -> TokenBatch:
        """Put sequences side by side.

        Example, padding 0: ids [101, 7, 102] and [101, 102] become [[101, 7, 102], [101, 102, 0]].
        """
        shape = len(sequences), max(len(sequence.ids) for sequence in sequences)
        ids_BQ, mask_BQ = torch.full(shape, self.padding), torch.zeros(shape, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            ids_BQ[row, : len(sequence.ids)] = torch.from_numpy(sequence.ids)
            mask_BQ[row, : len(sequence.ids)] = 1
        return TokenBatch(ids_BQ, mask_BQ)
