"""Tables at a model's input of which each rank has the whole: n-grams find their rows, which enter the embedding.

`DenseTable` learns the vectors of its rows as parameters like others: n-gram tables (engine/ngram_tables/) in their
simplest form. `Signatures`, for dense models, tests whether hashed routing adds more than the information in its keys:
it has the fixed weights that hashed routing would use for each token's experts in every layer, and learns one linear
map of them. The loader finds the rows (TransformerXL.table_keys). Both tables are a part of the model's state.

Letters: B streams, Q segment length, D width, t tables, r rows, E experts, H rows that a token reads.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from foreroute.engine.config import ModelConfig, MoEConfig, NgramKeys, NgramTablesConfig
from foreroute.engine.config.model import num_tables
from foreroute.engine.config.ngram_tables import dense_table
from foreroute.engine.ngram_tables.entries import Added
from foreroute.engine.ngram_tables.hash_keys import HashKeys
from foreroute.engine.ngram_tables.tables import keys_of_table
from foreroute.engine.routing.methods import planned_method
from foreroute.engine.routing.ngram_rows import KeyRows
from foreroute.engine.routing.plans.row_plan import TableKeys


class DenseTable(nn.Module):
    """An n-gram table in one parameter; its initial values are those of the ids' embedding."""

    def __init__(self, config: NgramTablesConfig, width: int, keys: TableKeys) -> None:
        super().__init__()
        self.keys = keys
        self.embedding = nn.Embedding(keys.rows, config.width)
        self.entry = Added(keys.heads * config.width, width)

    @property
    def num_unread(self) -> int:
        """Numbers of the table that a symbol does not read."""
        return (self.keys.rows - self.keys.heads) * self.embedding.embedding_dim

    def forward(self, x_BQD: Tensor, row_BQH: Tensor) -> Tensor:
        """Return x with what the rows add."""
        added: Tensor = self.entry(self.embedding(row_BQH), x_BQD, None, memory=0).x_BQD
        return added


class Signatures(nn.Module):
    """A learned linear map, with bias, of the fixed weights of a token's rows in all tables.

    One map of all t*E weights at the input carries what a map for each layer would, in a single place.
    """

    weight_trE: Tensor
    num_unread = 0

    def __init__(self, width: int, experts: int, keys: HashKeys) -> None:
        super().__init__()
        self.keys = keys
        self.register_buffer("weight_trE", torch.zeros(keys.heads, keys.rows // keys.heads, experts))
        self.map = nn.Linear(keys.heads * experts, width)

    def fill(self, weights: Sequence[Tensor]) -> None:
        """Take the tables' mixing weights, fp32 [r, E] each."""
        self.weight_trE.copy_(torch.stack(list(weights)))

    def forward(self, x_BQD: Tensor, row_BQH: Tensor) -> Tensor:
        """Return x with the mapped weights."""
        weight_BQX = self.weight_trE.flatten(0, 1)[row_BQH].flatten(2)
        mapped_BQD: Tensor = self.map(weight_BQX.to(self.map.weight.dtype))
        return x_BQD + mapped_BQD


def input_tables(
    model: ModelConfig, moe: MoEConfig, tables: NgramTablesConfig, vocab_size: int, seed: int
) -> DenseTable | Signatures | None:
    """Build the table that the configuration asks for; None for models without one at their input."""
    dense = dense_table(model, tables)
    if dense is not None:
        return DenseTable(dense, model.width, _dense_keys(dense, model, moe, vocab_size, seed))
    if model.signatures:
        indices = range(num_tables(model, moe))
        own = tuple(KeyRows(moe.ngram, vocab_size, moe.rows, seed, index) for index in indices)
        return Signatures(model.width, moe.columns, HashKeys(own, whole=True))
    return None


def _dense_keys(tables: NgramTablesConfig, model: ModelConfig, moe: MoEConfig, vocab_size: int, seed: int) -> TableKeys:
    """Return how n-grams find the rows of a dense table.

    Its heads have hashes of routers' tables. Beside routers with n-grams they have numbers that none of these has, so
    that other n-grams share rows here than there.
    """
    if tables.keys is not NgramKeys.hash:
        return replace(keys_of_table(tables, 0, vocab_size, seed), whole=True)
    planned = planned_method(moe)
    first = num_tables(model, moe) if planned is not None and "ngram" in planned.uses else 0
    own = [
        KeyRows(order, vocab_size, tables.rows, seed, first + head)
        for order in tables.orders
        for head in range(tables.heads)
    ]
    return HashKeys(tuple(own), whole=True)
