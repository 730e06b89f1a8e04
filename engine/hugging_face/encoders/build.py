"""Builds an encoder with a head for a task."""

from dataclasses import dataclass
from pathlib import Path

import torch

from foreroute.engine.config.model import DENSE
from foreroute.engine.finetune.trainee import Trainee
from foreroute.engine.hugging_face.encoders.bert import open_bert
from foreroute.engine.hugging_face.encoders.experts import as_experts, stream_of
from foreroute.engine.hugging_face.encoders.models import Encoder
from foreroute.engine.hugging_face.encoders.tasks import Parts
from foreroute.engine.hugging_face.encoders.texts import WordPieces

CLIP = 1.0
"""The largest gradient norm with which BERT is fine-tuned."""


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """How an encoder is made of a folder of transformers."""

    router: str = "frozen"  # of its experts: dense for none, frozen, or a planned router such as hashed
    experts: int = 8
    split: bool = True  # experts are slices of the feed-forwards, otherwise copies
    dropout: float = 0.1  # of hidden states, attention and head
    seed: int = 1  # of the head, the router and the clusters
    pretrained: bool = True  # otherwise all weights are new


def build_encoder(folder: Path, words: WordPieces, parts: Parts, options: EncoderOptions) -> Trainee:
    """Read an encoder, turn its feed-forwards into experts, and add the head of the examples' task.

    Raises:
        UserError: transformers is not installed, the folder holds no BERT, or an option does not fit it.
    """
    found = open_bert(
        folder, dropout=options.dropout, masked=parts.masked, seed=options.seed, pretrained=options.pretrained
    )
    experts = None
    if options.router != DENSE:
        ids = stream_of(parts.train_sequences)
        experts = as_experts(found.model, options.router, options.experts, ids, split=options.split, seed=options.seed)
    encoder = Encoder(found.model, experts)
    torch.manual_seed(options.seed)
    return parts.add_head(encoder, words, found, options.dropout)
