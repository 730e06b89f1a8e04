"""Balanced k-means: rows of a matrix in clusters of equal size, by direction.

As in MoEfication (arXiv 2110.01786, section 3.2), which takes a constrained k-means of the rows divided by their norms.
In turn rows are assigned to clusters of equal size so that the sum of their products with the centres is the largest,
and each centre becomes the mean of its rows. The assignment is the auction of BASE layers
(engine/routing/live/base.py), within 0.1% of the range of products of the best: scipy's exact linear_sum_assignment
needs a matrix [F, F].

Letters: F rows, D columns, E clusters.
"""

import torch
from torch import Tensor

from foreroute.engine.routing.live.base import assign

_TOLERANCE = 1e-3


def unit_rows(rows_FD: Tensor) -> Tensor:
    """Return rows divided by their norms, fp64 on the host; a row of zeros stays."""
    return torch.nn.functional.normalize(rows_FD.detach().to("cpu", torch.float64), dim=1)


def balanced_clusters(rows_FD: Tensor, clusters: int, *, rounds: int, generator: torch.Generator) -> Tensor:
    """Return the numbers of all rows, cluster by cluster, int64 [F]; within a cluster they ascend.

    Args:
        clusters: divides the number of rows.
        rounds: the most rounds; 0 leaves the rows in their order.
        generator: draws the rows that are the first centres.

    Example: rows [[1, 0], [0, 1], [2, 0], [0, 3]] in 2 clusters: [0, 2, 1, 3], or [1, 3, 0, 2].
    """
    rows_FD = unit_rows(rows_FD)
    cluster_F = torch.arange(len(rows_FD)) // (len(rows_FD) // clusters)
    centres_ED = rows_FD[torch.randperm(len(rows_FD), generator=generator)[:clusters]]
    best = -torch.inf
    for _ in range(rounds):
        scores_FE = rows_FD @ centres_ED.T
        found_F = assign(scores_FE, _TOLERANCE)
        total = scores_FE.gather(1, found_F[:, None]).sum().item()
        if total <= best:
            break
        best, cluster_F = total, found_F
        centres_ED = torch.zeros_like(centres_ED).index_add_(0, cluster_F, rows_FD) * clusters / len(rows_FD)
    return cluster_F.argsort(stable=True)
