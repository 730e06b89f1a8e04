"""Rows that leave a rank, by kind of exchange: from rank to rank on their way to experts, and their sums.

The rows' way to the experts is a matrix of hops, rows from a rank to a rank; results go back the same way, so their
matrix is the transpose, and the gradients of either follow them in backward. Three kinds are counted:

    tokens      each token to each rank that has one of its experts
    gather      all tokens to all ranks, as if sent to each by itself
    two_level   each token once to each other node that has one of its experts, to the rank there that has the sender's
                place on its node; from there to the ranks of that node that have one. On the way back the results of a
                node are added up at that rank first. The engine does not run it: the count shows the saving.

Letters: y layers, m micro-batches, g expert groups, P ranks of a group, h nodes of a group, q ranks of a group on a
node.
"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.certificate.counts.layout import Trips
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import Counts, StepCounts

KINDS = "tokens", "gather", "two_level"


def hops(counts: StepCounts, kind: str, placement: Placement, tokens: int) -> Counts:
    """Return the rows from each rank of a group to each other [y, m, g, P, P]; the diagonal is 0.

    Args:
        kind: one of KINDS.
        tokens: of a rank in a micro-batch.
    """
    if kind == "two_level":
        hops_ymgPP = _two_level(counts, placement)
    elif kind == "gather":
        hops_ymgPP = np.full_like(counts.sent_ymgPP, tokens)
    else:
        hops_ymgPP = counts.sent_ymgPP
    return hops_ymgPP * ~np.eye(placement.expert_ranks, dtype=bool)


def leaving(
    hops_ymgPP: Counts, trips: Trips | Sequence[Trips], near_PP: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Count the rows that leave each rank [y, m, g, P] in so many trips.

    Args:
        trips: of all layers, or of each.
        near_PP: count between these ranks only.
    """
    if near_PP is not None:
        hops_ymgPP = hops_ymgPP * near_PP
    to_experts, to_tokens = np.array(trips).reshape(-1, 2).T[..., None, None, None]
    found: Counts = to_experts * hops_ymgPP.sum(4) + to_tokens * hops_ymgPP.sum(3)
    return found


def _two_level(counts: StepCounts, placement: Placement) -> Counts:
    """Return the hops of a two-level exchange, the diagonal undefined.

    Example: two nodes of two ranks. A token of rank 0 with experts on ranks 1, 2 and 3 makes the hops 0 to 1, 0 to 2
    (the rank of rank 0's place on the other node) and 2 to 3; one with experts on rank 3 alone makes 0 to 2 and 2 to 3.
    """
    nodes = placement.group_nodes
    shape = counts.sent_ymgPP.shape
    places = placement.expert_ranks // nodes
    sent_hqhq = counts.sent_ymgPP.reshape(*shape[:3], nodes, places, nodes, places)
    found_hqhq = np.zeros_like(sent_hqhq)
    onward_qhq = sent_hqhq.sum(axis=3)  # by the sender's place, then the destination
    for node in range(nodes):
        found_hqhq[:, :, :, node, :, node] = onward_qhq[..., node, :]
    to_nodes_hqh = counts.nodes_ymgPh.reshape(*shape[:3], nodes, places, nodes)
    place_q = np.arange(places)
    for source, node in permutations(range(nodes), 2):
        rows_q = to_nodes_hqh[:, :, :, source, :, node]
        found_hqhq[:, :, :, source, place_q, node, place_q] = rows_q
    return found_hqhq.reshape(shape)
