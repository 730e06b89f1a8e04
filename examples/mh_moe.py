"""MH-MoE (Wu et al. 2024, arXiv 2404.15045): a token is cut into h sub-tokens, which are routed one by one to experts
of width D/h and joined again.

It replaces an expert layer whose choice is for a whole token: with h times as many choices, more experts are active and
a token mixes more of them, at the same arithmetic for h times as many experts' hidden units.

    x' = W_h x + b_h;  x' = [s_1 .. s_h];  o_j = MoE(s_j);  y = W_m [o_1 .. o_h] + b_m

Published is a choice by a gate on s_j, which any live router makes here. `SubTokenRouter` is the planned form: the key
of a sub-token is its token's n-gram and its place j, so each place has a table of its own. Its plan has h rows for each
token, of D/h numbers each; k experts of a sub-token therefore send no more bytes than k experts of a token.

The layer is for a model of your own. In the model of launch.train a block makes its expert layer by itself, and a
certificate counts rows of D numbers, one for each token.

Letters: T tokens, D width, h sub-tokens of a token, P ranks of the expert group, r table rows, K experts of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foreroute.engine.config import KernelsConfig, MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.errors import require
from foreroute.engine.moe.layer import LayerOutput, MoELayer
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned_router import GroupTokens, PlannedRouter, RouterInputs
from foreroute.engine.routing.row_sets import WEIGH, Choice, RowSets
from foreroute.engine.routing.tables import Table, tables_of


@dataclass
class Options:
    """Options of the router."""

    heads: int = option(2, "Sub-tokens of a token (h).", at_least=1)


class SubTokenRouter(PlannedRouter):
    """The router of one layer: a table for each place of a sub-token in its token."""

    card = Card(
        "parts of tokens, each routed by the token's n-gram and its place in the token",
        "MH-MoE, arXiv 2404.15045, planned",
        "as hashed, with h rows of D/h numbers for each token",
        "more experts of a token at the same arithmetic",
    )
    uses = ("ngram", "rows", "builder", "pack", "weights", "spread", "options")
    at_most_k = True

    def __init__(self, tables: Sequence[Table], moe: MoEConfig) -> None:
        """Take the tables of all places."""
        super().__init__(moe.experts)
        self.tables, self.weights = list(tables), moe.weights
        self._sets: dict[int, RowSets] = {}

    @classmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Build the tables of each layer."""
        heads = read_options(moe, Options).heads
        tables = tables_of(moe, inputs, number=inputs.number * heads)
        return [cls(tables[first : first + heads], moe) for first in range(0, len(tables), heads)]

    def choose(self, tokens: GroupTokens, k: int) -> Choice:
        """Look up the row of each sub-token [P, T * h], token by token."""
        rows = len(self.tables[0].order_rE)
        row_PTh = np.stack(
            [
                place * rows + table.key_rows.narrow(tokens.keys(table.key_rows))
                for place, table in enumerate(self.tables)
            ],
            axis=2,
        )
        if k not in self._sets:
            self._sets = {k: self._row_sets(k)}
        return Choice(row_PTh.reshape(len(row_PTh), -1), self._sets[k])

    def _row_sets(self, k: int) -> RowSets:
        """Return the first k experts of the rows of all tables, one after the other."""
        logits = [table.logits_rE[:, :k] for table in self.tables if table.logits_rE is not None]
        order_rK = torch.cat([table.order_rE[:, :k] for table in self.tables])
        return RowSets(order_rK, WEIGH[self.weights], torch.cat(logits) if logits else None)

    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return the tables."""
        return [array for table in self.tables for array in table.identity(weights=weights)]


class SubTokenLayer(nn.Module):
    """Maps and cuts tokens, applies an expert layer of width D/h to the parts, joins and maps them."""

    def __init__(
        self, width: int, heads: int, moe: MoEConfig, kernels: KernelsConfig, layer: int, *, dropout: float = 0.0
    ) -> None:
        """Build the layer with all experts; arguments as for MoELayer.

        Args:
            heads: sub-tokens of a token (h).

        Raises:
            UserError: they do not divide the width.
        """
        super().__init__()
        require(width % heads == 0, f"heads={heads}: must divide the width, {width}")
        self.heads = heads
        self.split, self.merge = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (self.split, self.merge):
            nn.init.xavier_uniform_(linear.weight, gain=1 / sqrt(2))
            nn.init.zeros_(linear.bias)
        self.moe = MoELayer(width // heads, moe, kernels, layer, dropout=dropout)

    def forward(self, x_TD: Tensor, routing: Routing, carried: Tensor | None = None) -> LayerOutput:
        """Apply the layer to the tokens x_TD.

        Args:
            routing: its plans are of sub-tokens; its tokens are whole.
            carried: of the live router of the expert layer before, of sub-tokens.
        """
        place_h = torch.arange(self.heads, device=x_TD.device)
        if routing.token_T is not None:
            routing = replace(routing, token_T=(routing.token_T[:, None] * self.heads + place_h).flatten())
        if routing.real_T is not None:
            routing = replace(routing, real_T=routing.real_T.repeat_interleave(self.heads))
        parts_nd = self.split(x_TD).view(len(x_TD) * self.heads, -1)
        found: LayerOutput = self.moe(parts_nd, routing, carried)
        return found._replace(y_TD=self.merge(found.y_TD.view_as(x_TD)))
