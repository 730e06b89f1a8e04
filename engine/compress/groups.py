"""Which experts of a layer become one, or are dropped: by use and likeness, or at random as a control.

Merging follows M-SMoE (Li et al. 2024, "Merge, Then Compress", arXiv 2310.01334, section 3.1): the most used experts
lead, and each other expert joins the leader that it is most like. There likeness is that of router logits. A table has
none, so likeness here is that of the experts' outputs for the same hidden states, or the share of tokens that use both.

Letters: E experts, G groups, T tokens, D width, r table rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
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
    """Return the cosine between each two experts' outputs for the same tokens, all tokens as one vector [E, E]."""
    unit_EN = torch.nn.functional.normalize(y_ETD.double().flatten(1), dim=1)
    found: NDArray[np.float64] = (unit_EN @ unit_EN.T).numpy()
    return found


def merged(use_E: NDArray[np.float64], like_EE: NDArray[np.float64], number: int) -> Groups:
    """Let the most used experts lead and each other one join the leader that it is most like; ties by number.

    Example: uses 5, 1, 4, 2 and two groups: experts 0 and 2 lead; expert 1 joins expert 0 if like_EE[1, 0] is at least
    like_EE[1, 2].
    """
    leader_G = _most_used(use_E, number)
    return _joined(leader_G, like_EE[:, leader_G].argmax(axis=1))


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
