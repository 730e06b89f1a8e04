"""Tables at a model's input: n-grams find their rows as in hashed routing, and the rows are added to the embedding.

Dense baselines use them to test whether hashed routing adds more than the information in its keys. `NgramEmbedding`
learns a vector for each row, also beside experts. `Signatures`, for dense models, has the fixed weights that hashed
routing would use for each token's experts in every layer, and learns one linear map of them. The loader finds the rows
(TransformerXL.input_keys). Both tables are a part of the model's state.

Letters: B streams, Q segment length, D width, t tables, r rows, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foreroute.engine.config import ModelConfig, MoEConfig
from foreroute.engine.config.model import num_tables
from foreroute.engine.routing.methods import planned_method
from foreroute.engine.routing.ngram_rows import KeyRows


class NgramEmbedding(nn.Module):
    """A learned vector for each row; the embedding's initial values are those of the ids' embedding."""

    def __init__(self, width: int, keys: KeyRows) -> None:
        super().__init__()
        self.keys = (keys,)
        self.embedding = nn.Embedding(keys.rows, width)

    def forward(self, row_1BQ: Tensor) -> Tensor:
        """Return the rows' sum [B, Q, D]."""
        found_BQD: Tensor = self.embedding(row_1BQ[0])
        return found_BQD


class Signatures(nn.Module):
    """A learned linear map, with bias, of the fixed weights of a token's rows in all tables.

    One map of all t*E weights at the input carries what a map for each layer would, in a single place.
    """

    weight_trE: Tensor

    def __init__(self, width: int, experts: int, keys: Sequence[KeyRows]) -> None:
        super().__init__()
        self.keys = tuple(keys)
        shape = len(keys), keys[0].rows, experts
        self.register_buffer("weight_trE", torch.zeros(shape))
        self.map = nn.Linear(len(keys) * experts, width)

    def fill(self, weights: Sequence[Tensor]) -> None:
        """Take the tables' mixing weights, fp32 [r, E] each."""
        self.weight_trE.copy_(torch.stack(list(weights)))

    def forward(self, row_tBQ: Tensor) -> Tensor:
        """Return the mapped weights [B, Q, D]."""
        parts = [weight_rE[row_BQ] for weight_rE, row_BQ in zip(self.weight_trE, row_tBQ, strict=True)]
        found_BQD: Tensor = self.map(torch.cat(parts, dim=-1).to(self.map.weight.dtype))
        return found_BQD


def input_tables(model: ModelConfig, moe: MoEConfig, vocab_size: int, seed: int) -> NgramEmbedding | Signatures | None:
    """Build the tables that the configuration asks for; None for models without tables at their input."""
    if model.ngram:
        # Beside routers with n-grams a number that none of them has, so that other n-grams share rows here than there.
        planned = planned_method(moe)
        index = num_tables(model, moe) if planned is not None and "ngram" in planned.uses else 0
        keys = KeyRows(model.ngram, vocab_size, model.ngram_rows, seed, index)
        return NgramEmbedding(model.width, keys)
    if model.signatures:
        indices = range(num_tables(model, moe))
        own = [KeyRows(moe.ngram, vocab_size, moe.rows, seed, index) for index in indices]
        return Signatures(model.width, moe.columns, own)
    return None
