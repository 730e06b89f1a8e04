"""Masked-language training: which ids a model has to restore, drawn anew for each batch.

15 % of the ids are asked for (BERT, arXiv 1810.04805, section 3.1): of these 80 % are replaced by the mask, 10 % by
a random id, and 10 % stay. They are drawn anew each time that a text is seen (RoBERTa, arXiv 1907.11692, section 4.1).
A router's keys must be those of the masked ids: keys of the original ones would show the answers.

Letters: B sequences, Q ids of the longest one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SHARE, MASKED, RANDOM = 0.15, 0.8, 0.1
NOT_ASKED = -100
"""The label of an id that is not asked for, as in PyTorch's cross_entropy."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The facts of a vocabulary that masking needs."""

    size: int
    mask: int  # the id of the mask
    special: tuple[int, ...]  # ids that are never asked for, such as padding


class Masked(NamedTuple):
    """A batch of masked sequences."""

    ids_BQ: Tensor  # int64, what the model and its routers see
    label_BQ: Tensor  # int64, the original id where it is asked for, NOT_ASKED elsewhere


def mask_ids(ids_BQ: Tensor, vocabulary: Vocabulary, generator: torch.Generator, share: float = SHARE) -> Masked:
    """Mask a batch of ids.

    Each id is asked for with probability `share`, by itself, so a batch may have none.

    Args:
        ids_BQ: int64 on the host, with special ids as padding.
        generator: of the host; the drawn numbers depend on the batch's shape, not on its ids.
    """
    asked_BQ = torch.rand(ids_BQ.shape, generator=generator) < share
    asked_BQ &= ~torch.isin(ids_BQ, torch.tensor(vocabulary.special))
    kind_BQ = torch.rand(ids_BQ.shape, generator=generator)
    random_BQ = torch.randint(vocabulary.size, ids_BQ.shape, generator=generator)
    replaced_BQ = random_BQ.where((kind_BQ < MASKED + RANDOM) & (kind_BQ >= MASKED), ids_BQ)
    replaced_BQ = replaced_BQ.masked_fill(kind_BQ < MASKED, vocabulary.mask)
    return Masked(replaced_BQ.where(asked_BQ, ids_BQ), ids_BQ.where(asked_BQ, NOT_ASKED))
