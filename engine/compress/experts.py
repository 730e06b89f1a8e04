"""The weights and moments of merged or pruned experts.

M-SMoE (arXiv 2310.01334, section 3.1): a feed-forward does not depend on the order of its hidden units, so each
expert's units are brought into the order of its leader's before they are averaged. The order maximises the sum of inner
products of matched units, rows of w1, w2 and w3 and b1 together (Ainsworth et al. 2022, "Git Re-Basin", arXiv
2209.04836), by a linear assignment. The mean is weighted by use. Adam's moments are averaged likewise.

Letters: E experts, G groups, F hidden units, D width.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from foreroute.engine.compress.groups import Groups

OF_UNITS = "w1", "b1", "w2", "w3"
"""Parameters of an expert whose first dim is the hidden unit; b2 has none."""
Layer = Mapping[str, Mapping[str, Tensor]]
"""Of one layer's experts: the kinds weight, exp_avg and exp_avg_sq, and of each the parameters [E, ...]."""


def matched_units(leader: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> NDArray[np.int64]:
    """Return which hidden unit of another expert matches each unit of the leader [F].

    Args:
        leader: weights of one expert, w1 and w2 [F, D], b1 [F], and with a gate w3 [F, D]; `other` likewise.
    """
    names = [name for name in OF_UNITS if name in leader]
    ours_FN, theirs_FN = (
        torch.cat(
            [
                expert[name].double().flatten(1) if expert[name].ndim > 1 else expert[name].double()[:, None]
                for name in names
            ],
            dim=1,
        )
        for expert in (leader, other)
    )
    _, unit_F = linear_sum_assignment((ours_FN @ theirs_FN.T).numpy(), maximize=True)
    found: NDArray[np.int64] = unit_F
    return found


def regrouped(layer: Layer, groups: Groups, use_E: NDArray[np.float64]) -> dict[str, dict[str, Tensor]]:
    """Return a layer's experts after merging or pruning, fp32 [G, ...]; an expert without others is unchanged.

    Args:
        use_E: weights of the means; equal ones where a group has no use.
    """
    found: dict[str, dict[str, list[Tensor]]] = {kind: {name: [] for name in named} for kind, named in layer.items()}
    weight = layer["weight"]
    for group, leader in enumerate(groups.leader_G.tolist()):
        members = np.flatnonzero(groups.group_E == group).tolist()
        units = {e: _units(weight, leader, e) for e in members}
        share_e = (
            use_E[members] / use_E[members].sum() if use_E[members].any() else np.full(len(members), 1 / len(members))
        )
        for kind, named in layer.items():
            for name, value_E in named.items():
                parts = [value_E[e][units[e]] if name in OF_UNITS else value_E[e] for e in members]
                found[kind][name].append(_mean(parts, share_e))
    return {kind: {name: torch.stack(parts) for name, parts in named.items()} for kind, named in found.items()}


def _units(weight: Mapping[str, Tensor], leader: int, expert: int) -> Tensor:
    if expert == leader:
        return torch.arange(weight["w1"].shape[1])
    ours, theirs = ({name: value_E[e] for name, value_E in weight.items()} for e in (leader, expert))
    return torch.from_numpy(matched_units(ours, theirs))


def _mean(parts: list[Tensor], share_e: NDArray[np.float64]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    total = sum((share * part.double() for share, part in zip(share_e.tolist(), parts, strict=True)), torch.zeros(()))
    return total.to(parts[0].dtype)
