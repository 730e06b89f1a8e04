"""Which experts of a layer become one, or are dropped: by use and likeness, or at random as a control.

Merging follows M-SMoE (Li et al. 2024, "Merge, Then Compress", arXiv 2310.01334, section 3.1): the most used experts
lead, and the others join the leaders that they are most like. There likeness is that of router logits. A table has
none, so likeness here is that of the experts' outputs for the same hidden states, or the share of tokens that use both.
Groups are of equal size here, as near as can be, so that a balanced load stays so.

Letters: E experts, G groups, T tokens, D width, r table rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from foreroute.engine.routing.planned.hashed import HashedRouter

DROPPED = -1


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a layer's experts."""

    leader_G: NDArray[np.int64]
    """The expert to whose hidden units the others are aligned; ascending, so that kept experts keep their order."""
    group_E: NDArray[np.int64]  # the group of each expert; DROPPED: none

    @property
    def sizes(self) -> list[int]:
        """How many experts each group has."""
        return [int((self.group_E == group).sum()) for group in range(len(self.leader_G))]


def uses(router: HashedRouter, freq_r: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Return how many tokens use each expert at k, exactly [E].

    Args:
        freq_r: how many tokens have each row (engine/routing/tables.py, row_frequency).
    """
    return freq_r @ _used(router, k)


def shared_use(router: HashedRouter, freq_r: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Return for each two experts the tokens that use both, as a share of those that use one of them [E, E]."""
    used_rE = _used(router, k)
    both_EE = used_rE.T @ (used_rE * freq_r[:, None])
    use_E = both_EE.diagonal()
    either_EE = use_E[:, None] + use_E - both_EE
    found: NDArray[np.float64] = both_EE / np.maximum(either_EE, 1.0)
    return found


def output_likeness(y_ETD: Tensor) -> NDArray[np.float64]:
    """Return minus the squared distance between each two experts' outputs for the same tokens [E, E].

    A cosine would join experts of large outputs, whose common part is large as well, and whose mean costs most.
    """
    flat_EN = y_ETD.double().flatten(1)
    inner_EE = flat_EN @ flat_EN.T
    square_E = inner_EE.diagonal()
    found: NDArray[np.float64] = (2 * inner_EE - square_E[:, None] - square_E).numpy()
    return found


def merged(use_E: NDArray[np.float64], like_EE: NDArray[np.float64], number: int) -> Groups:
    """Let the most used experts lead, ties by number, and the others join them so that all are most alike together.

    A group has at most E / G experts, rounded up. Without this limit, experts of small outputs would gather in one
    group, which would then have most of the load.

    Example: uses 5, 1, 4, 2 and two groups: experts 0 and 2 lead and take one each; expert 1 joins expert 0 if
    like_EE[1, 0] + like_EE[3, 2] is larger than like_EE[1, 2] + like_EE[3, 0].
    """
    leader_G, experts = _most_used(use_E, number), len(use_E)
    others = np.setdiff1d(np.arange(experts), leader_G)
    place = np.repeat(np.arange(number), -(-experts // number) - 1)
    taker, taken = linear_sum_assignment(like_EE[np.ix_(others, leader_G[place])], maximize=True)
    group_E = np.full(experts, DROPPED)
    group_E[others[taker]] = place[taken]
    return _joined(leader_G, group_E)


def kept(use_E: NDArray[np.float64], number: int) -> Groups:
    """Keep the most used experts and drop the others; ties by number."""
    return _joined(_most_used(use_E, number), np.full(len(use_E), DROPPED))


def _used(router: HashedRouter, k: int) -> NDArray[np.float64]:
    """Return 1 where a row uses an expert at k, else 0 [r, E]."""
    sets = router.row_sets(k)
    used_rK = torch.ones(sets.order_rK.shape) if sets.used_rK is None else sets.used_rK.float()
    used_re = torch.zeros(len(used_rK), router.columns).scatter_(1, sets.order_rK.long(), used_rK)
    return used_re[:, : router.experts].double().numpy()


def _most_used(use_E: NDArray[np.float64], number: int) -> NDArray[np.int64]:
    return np.sort(np.argsort(-use_E, kind="stable")[:number])


def _joined(leader_G: NDArray[np.int64], group_E: NDArray[np.int64]) -> Groups:
    group_E[leader_G] = np.arange(len(leader_G))
    return Groups(leader_G, group_E)
