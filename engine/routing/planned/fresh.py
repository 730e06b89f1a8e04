"""`moe.router=fresh`: new random experts for each token at each forward pass.

SMoE-Dropout's public code (CustomRandomGate) takes the top k of U(0, 1) scores and their softmax as weights, which are
within a factor e of each other and say nothing of the token: the weights here are their mean, 1/k. A control: it shows
what of a router's gain is the choice of experts.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import MoEConfig
from foreroute.engine.routing.hashing import Purpose, hash64
from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.planned_router import Draw, GroupTokens, PlannedRouter, RouterInputs
from foreroute.engine.routing.row_sets import Choice, RowSets, column_dtype, equal_weights


class FreshRouter(PlannedRouter):
    """Draws the order of the experts anew at each forward pass; the first k are active."""

    card = Card(
        "new random experts for each token at each forward pass, weights 1/k",
        "SMoE-Dropout's public code (CustomRandomGate), arXiv 2303.01610",
        "as hashed; no certificate",
        "a control: what of a gain is the choice of experts",
    )

    uses: ClassVar[tuple[str, ...]] = ("share_table",)
    of_ids = False
    each_token: ClassVar[bool] = True

    def __init__(self, experts: int, *, seed: int, index: int) -> None:
        """Take what the draws are hashed from.

        Args:
            index: number of the router within the run; layers draw independently.
        """
        super().__init__(experts)
        self.seed, self.index = seed, index

    @classmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Make them; nothing is read."""
        return [cls(moe.experts, seed=inputs.seed, index=index) for index in range(inputs.number)]

    def choose(self, tokens: GroupTokens, k: int) -> Choice:
        """Draw the micro-batch's orders; the ids do not matter."""
        draw = tokens.needed_draw
        row_PT = np.zeros(draw.token_PT.shape, np.int64)
        if self.each_token:
            row_PT = np.arange(row_PT.size).reshape(row_PT.shape)
        return Choice(row_PT, RowSets(self.order(draw)[:, :k], equal_weights))

    def order(self, draw: Draw) -> Tensor:
        """Draw the experts' order: uint8, or int16 above 256 experts, [P*T, E], or [1, E] for all tokens."""
        token_r1 = draw.token_PT.reshape(-1, 1) if self.each_token else np.zeros((1, 1), np.int64)
        numbers = self.seed, self.index, draw.held_out, draw.index, draw.number
        hash_rE = hash64(Purpose.drawn_order, *numbers, token_r1, np.arange(self.experts))
        return torch.from_numpy(hash_rE.argsort(axis=1, kind="stable").astype(column_dtype(self.experts)))

    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return what the draws are hashed from."""
        return [np.array([self.experts, self.each_token, self.seed, self.index])]


ROUTER = FreshRouter
