"""`moe.router=strata`: a chain of expert layers in each layer, through which a token's n-gram passes for as long as a
table says, k of them on average.

The planned form of Stratified MoE (Xu et al. 2023, arXiv 2305.02176), where a gate sends each token to an expert of its
stratum or a later one, and the ranks agree after each pass on the lowest stratum that is left: a wait for the host in
each. Here the depth of a row is known with the batch, a stratum is an expert layer of its own (moe.strata of them) with
norm and residual sum, and a token beyond its depth has no expert there: no row, no byte, and it stays as it is. For
those who want hard tokens to be computed for longer than others.

    h_1 = h + E_1(LN(h)), h_2 = h_1 + E_2(LN_2(h_1)), ... up to the row's depth; one expert of each stratum, weight 1

All strata have moe.experts experts of equal width, or each a number of its own, moe.strata_experts: published are
strata that grow. The depth of a row at k is the largest d with d <= t w, at least 1,
with t solved so that the mean over the training text is k (engine/routing/row_counts.py), and w from 1/2, for rows of
the most frequent n-grams, to 3/2, for the rarest; with moe.options.deep=frequent the other way round. Each stratum's
experts are balanced over the rows that reach it.

Letters: S strata, r table rows, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import Builder, MoEConfig, RouteWeights
from foreroute.engine.config.option import option
from foreroute.engine.routing.hashing import Purpose, hash64
from foreroute.engine.routing.loops.strata_experts import lightest_experts
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.planned_router import RouterInputs, TableRouter
from foreroute.engine.routing.row_counts import solve
from foreroute.engine.routing.row_sets import RowSets, column_dtype, unit_weights
from foreroute.engine.routing.tables import Table, row_uses, table_from_state, table_state, tables_of

_UNIT = 1 << 32


class Deep(Enum):
    """Rows that pass through more strata than others."""

    rare = "rare"
    frequent = "frequent"


@dataclass
class StrataOptions:
    """moe.options of this router."""

    deep: Deep = option(Deep.rare, "Rows that pass through more strata: rare or frequent n-grams.")


class StrataRouter(TableRouter):
    """The router of one stratum of one layer."""

    card = Card(
        "a chain of expert layers in each layer, as long as the token's n-gram says, k of them on average",
        "Stratified MoE, arXiv 2305.02176, planned",
        "an exchange each way for each stratum; tokens beyond their depth send nothing",
        "tokens that are computed for longer than others",
    )
    uses = ("ngram", "rows", "share_table", "strata", "options")

    def __init__(self, table: Table, experts: int) -> None:
        """Take a table of one choice: the expert of each row, and the first k at which the row has it."""
        super().__init__(experts, table.key_rows)
        self.table = table

    @classmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Build the tables; they are not in the cache."""
        deep = read_options(moe, StrataOptions).deep
        plain = replace(
            moe, router="hashed", options={}, experts=1, builder=Builder.random, pack=None, weights=RouteWeights.sum
        )
        rows = tables_of(plain, replace(inputs, cache_dir=None), number=inputs.number // moe.strata)
        found = []
        for table, use_r in zip(rows, row_uses(rows, inputs), strict=True):
            first_rS = _first_k(use_r, moe.strata, deep, table.seed, table.index)
            for stratum, first_r in enumerate(first_rS.T):
                own = moe.at_stratum(stratum)
                expert_r = _experts(use_r, first_r, own, table, stratum)
                one = replace(table, order_rE=torch.from_numpy(expert_r)[:, None].clone())
                found.append(cls(replace(one, first_rE=torch.from_numpy(first_r.copy())[:, None]), own.experts))
        return found

    @classmethod
    def restore(cls, moe: MoEConfig, inputs: RouterInputs, states: Sequence[Mapping[str, Tensor]]) -> Sequence[Self]:
        """Take the saved tables."""
        experts = [moe.at_stratum(number % moe.strata).experts for number in range(len(states))]
        return [cls(table_from_state(dict(state)), own) for state, own in zip(states, experts, strict=True)]

    def state(self) -> dict[str, Tensor]:
        """Return the table."""
        return table_state(self.table)

    def row_sets(self, k: int) -> RowSets:
        """Return each row's expert, where the row is deep enough."""
        return RowSets(self.table.order_rE, unit_weights, None, self.table.count_r(k))

    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return the table."""
        return self.table.identity(self.experts, weights=weights)


def _first_k(use_r: NDArray[np.int64], strata: int, deep: Deep, seed: int, index: int) -> NDArray[np.int16]:
    """Return the first k [r, S] at which each row passes through each stratum."""
    use_r = use_r if use_r.any() else np.ones_like(use_r)
    order_r = np.argsort(-use_r, kind="stable")
    share_r = np.empty(use_r.size)  # of the text that more frequent rows have, and half of the row's own
    share_r[order_r] = (use_r[order_r].cumsum() - use_r[order_r] / 2) / use_r.sum()
    weight_r = 0.5 + (share_r if deep is Deep.rare else 1 - share_r)
    value_rS = (np.arange(1, strata + 1) / weight_r[:, None] * _UNIT).astype(np.int64)
    tie_rS = hash64(Purpose.strata_count_tie, seed, index, np.arange(use_r.size)[:, None], np.arange(strata))
    return solve(value_rS, use_r, tie_rS, least=1)


def _experts(
    use_r: NDArray[np.int64], first_r: NDArray[np.int16], moe: MoEConfig, table: Table, stratum: int
) -> NDArray[Any]:
    """Return the expert of each row in a stratum; rows that the text does not use choose last."""
    row_s = np.argsort(-use_r, kind="stable")
    expert_r = np.empty(use_r.size, column_dtype(moe.experts))
    state = np.uint64(hash64(Purpose.strata_tie, table.seed, table.index, stratum))
    use_s = np.maximum(use_r[row_s], 1)
    lightest_experts(row_s, use_s, np.ascontiguousarray(first_r[row_s]), moe.strata, moe.experts, state, expert_r)
    return expert_r


ROUTER = StrataRouter
