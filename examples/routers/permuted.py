"""COMET's permutation search (Ibrahim et al., KDD 2023, arXiv 2306.02824, section 4) for tables: which of the trained
experts each row's first, second, ... choice shall be.

It replaces a fixed numbering of the experts. The published search puts a permutation of the experts behind any gate,
hash routing among them, since gradients alone do not leave a poor assignment. It learns the permutation in training by
Gumbel-Sinkhorn, nearly hard but for its gradient, and fixes it after some epochs; until then each token needs the
outputs of all experts. A planned token has k of them. So `search` tries permutations as they are: in each layer it
swaps two experts, measures the loss on a fixed part of the training text, and keeps a swap that lowers it, until none
does. The loss there never rises, and the result is a local optimum among swaps. For those who put new tables, of
another n-gram or seed, on experts that are trained.

    def loss(number_yE):  # of a run's model, with its PermutedRouters under these numbers
        routers = [router.renumbered(number_E) for router, number_E in zip(run.routers, number_yE)]
        return evaluate(replace(run, routers=routers), split=Split.train, k=4, max_symbols=20000).bpc

    np.save("permutations.npy", search(loss, identity(layers, experts)))

Then moe.options.permutations=permutations.npy gives the tables these numbers. `evaluate` is that of
engine/evaluation/held_out.py, `run` what engine/checkpoint/trained_run.py opens. The example shows tables with the
weights of moe.weights, and a change of them.

Letters: y expert layers, E experts, r table rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import MoEConfig, RouteWeights
from foreroute.engine.config.option import option
from foreroute.engine.errors import UserError, require
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.planned_router import RouterInputs, TableRouter
from foreroute.engine.routing.row_sets import WEIGH, RowSets
from foreroute.engine.routing.tables import Table, table_from_state, table_state, tables_of

Permutations = NDArray[np.int64]
"""The new number [y, E] of each expert of each layer."""


@dataclass
class Options:
    """The method's own options."""

    permutations: str = option(
        "", "A .npy file of whole numbers [layers, experts]: the new number of each expert. Empty: as they are."
    )


class PermutedRouter(TableRouter):
    """The router of one table, whose experts have other numbers than its builder gave them."""

    card = Card(
        "as hashed, the experts of each layer renumbered by a search on the training text",
        "COMET, arXiv 2306.02824: its permutation search",
        "as hashed; the search runs the model E (E - 1) / 2 times and more for each layer",
        "new tables on trained experts",
    )
    uses = (
        *("ngram", "rows", "builder", "pack", "weights", "spread", "share_table", "options"),
        *("gate", "gate_normalised", "gate_scale"),
    )
    at_most_k = True

    def __init__(self, table: Table, weights: RouteWeights) -> None:
        """Take a table."""
        super().__init__(table.order_rE.shape[1], table.key_rows)
        self.table, self.weights = table, weights

    @classmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Build the tables and renumber their experts.

        Raises:
            UserError: the file cannot be read, or has no permutation of the experts for each table.
        """
        routers = [cls(table, moe.weights) for table in tables_of(moe, inputs, number=inputs.number)]
        file = read_options(moe, Options).permutations
        if not file:
            return routers
        found_yE = _read(file, layers=len(routers), experts=moe.experts)
        return [router.renumbered(found_E) for router, found_E in zip(routers, found_yE, strict=True)]

    @classmethod
    def restore(cls, moe: MoEConfig, inputs: RouterInputs, states: Sequence[Mapping[str, Tensor]]) -> Sequence[Self]:
        """Take the saved tables; the file is not needed."""
        return [cls(table_from_state(dict(state)), moe.weights) for state in states]

    def renumbered(self, number_E: NDArray[Any]) -> Self:
        """Return the router with expert number_E[e] wherever it has expert e."""
        order_rE = self.table.order_rE
        new_E = torch.from_numpy(np.asarray(number_E)).to(order_rE.dtype)
        return type(self)(replace(self.table, order_rE=new_E[order_rE.long()]), self.weights)

    def row_sets(self, k: int) -> RowSets:
        """Return the first k experts of each row."""
        logits_rE = self.table.logits_rE
        scores_rK = None if logits_rE is None else logits_rE[:, :k]
        return RowSets(self.table.order_rE[:, :k], WEIGH[self.weights], scores_rK)

    def state(self) -> dict[str, Tensor]:
        """Return the table."""
        return table_state(self.table)

    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return the table."""
        return self.table.identity(weights=weights)


def _read(file: str, *, layers: int, experts: int) -> Permutations:
    name = f"moe.options.permutations={file}"
    try:
        found_yE: Permutations = np.load(Path(file), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{name}: cannot be read as a file of NumPy's ({error})") from error
    wanted_yE = identity(layers, experts)
    require(
        found_yE.shape == wanted_yE.shape and bool((np.sort(found_yE, axis=1) == wanted_yE).all()),
        f"{name}: must be a permutation of the {experts} experts for each of {layers} tables",
    )
    return found_yE


def identity(layers: int, experts: int) -> Permutations:
    """Return the permutations that change nothing [y, E]."""
    return np.tile(np.arange(experts), (layers, 1))


def search(loss: Callable[[Permutations], float], start_yE: Permutations) -> Permutations:
    """Return permutations of which no swap of two experts of a layer has a lower loss, found from the given ones.

    Args:
        loss: the same at each call with the same permutations.
    """
    best_yE, lowest, improved = start_yE.copy(), loss(start_yE), True
    while improved:
        improved = False
        for layer in range(len(best_yE)):
            for one, other in combinations(range(best_yE.shape[1]), 2):
                tried_yE = best_yE.copy()
                tried_yE[layer, [one, other]] = best_yE[layer, [other, one]]
                if (found := loss(tried_yE)) < lowest:
                    best_yE, lowest, improved = tried_yE, found, True
    return best_yE
