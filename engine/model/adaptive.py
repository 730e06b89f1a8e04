"""Adaptive input embedding and softmax, as Transformer-XL has them for words (arXiv 1901.02860; Baevski and Auli, arXiv
1809.10853; Grave et al., arXiv 1609.04309).

Ids are in order of frequency, and cut-offs make clusters of them. The head decides among the symbols of the first
cluster and the other clusters; each of these has a tail, that decides among its symbols:

    p(symbol) = p_head(symbol), or p_head(cluster) * p_tail(symbol)

Cluster i has embeddings of width D // div_val^i, that a projection brings to the width D. As in the public code for
WikiText-103, the output has the input's embeddings and the tails its projections; the head's is one of its own. With
div_val = 1 there are no projections. Where the public code leaves out a cluster that no target is in, here each one is
in the graph of each step, so that all ranks reduce the same gradients. Each cluster has parameters of its own, not
slices of a whole one.

Letters: T tokens, D width, V symbols, d width of a cluster's embeddings, n clusters besides the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from foreroute.engine.config import ModelConfig
from foreroute.engine.errors import require
from foreroute.kernels.ops.linear_cross_entropy import CrossEntropy, linear_cross_entropy

_IDS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Cluster:
    """Symbols that are neighbours in frequency."""

    first: int  # id
    size: int
    width: int  # of its embeddings (d)


def clusters(model: ModelConfig, vocab_size: int) -> tuple[Cluster, ...]:
    """Return the clusters of a vocabulary; one of all symbols where the model has no cut-offs.

    Example: 10 symbols, width 16, cutoffs 4 and 7, div_val 2: ids 0-3 of width 16, 4-6 of width 8, 7-9 of width 4.

    Raises:
        UserError: a cut-off is beyond the vocabulary.
    """
    require(
        not model.cutoffs or model.cutoffs[-1] < vocab_size,
        f"model.cutoffs={model.cutoffs}: must be below the {vocab_size} symbols of the corpus",
    )
    ends = pairwise([0, *model.cutoffs, vocab_size])
    return tuple(Cluster(first, stop - first, model.width // model.div_val**i) for i, (first, stop) in enumerate(ends))


def target_shares(ids: NDArray[Any], found: Sequence[Cluster]) -> tuple[float, ...]:
    """Return the share of the ids that each cluster has.

    Args:
        ids: of a text, any integers; read in pieces.
    """
    if len(found) == 1:
        return (1.0,)
    starts = [cluster.first for cluster in found]
    count_n = np.zeros(len(found), np.int64)
    for start in range(0, len(ids), _IDS_AT_ONCE):
        place = np.searchsorted(starts, ids[start : start + _IDS_AT_ONCE], side="right") - 1
        count_n += np.bincount(place, minlength=len(found))
    return tuple((count_n / max(1, len(ids))).tolist())


class AdaptiveEmbedding(nn.Module):
    """Embeddings of several widths, brought to one."""

    def __init__(self, model: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.clusters = clusters(model, vocab_size)
        self.projection_std = model.proj_init_std
        self.tables = nn.ModuleList(nn.Embedding(cluster.size, cluster.width) for cluster in self.clusters)
        projected = self.clusters if model.div_val > 1 else ()
        self.projections = nn.ParameterList(torch.empty(model.width, cluster.width) for cluster in projected)

    def init_weights(self) -> None:
        """Draw projections from N(0, proj_init_std^2)."""
        for projection in self.projections:
            nn.init.normal_(projection, 0.0, self.projection_std)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of ids, [..., D]."""
        total: Tensor | None = None
        for i, (cluster, table) in enumerate(zip(self.clusters, self.tables, strict=True)):
            place = ids - cluster.first
            outside = (place < 0) | (place >= cluster.size)
            found = table(place.masked_fill(outside, 0)).masked_fill(outside[..., None], 0)
            if self.projections:
                found = F.linear(found, self.projections[i])
            total = found if total is None else total + found
        assert total is not None
        return total


class AdaptiveSoftmax(nn.Module):
    """Nats of targets, and logarithms of all probabilities, by clusters.

    The public code counts the head's clusters from its last column back, this from the first one on.
    """

    def __init__(self, model: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.clusters = clusters(model, vocab_size)
        self.init_std, self.projection_std = model.init_std, model.proj_init_std
        tails = len(self.clusters) - 1
        self.biases = nn.ParameterList(torch.zeros(cluster.size) for cluster in self.clusters)
        self.cluster_weight = nn.Parameter(torch.empty(tails, model.width))
        self.cluster_bias = nn.Parameter(torch.zeros(tails))
        width = model.width if model.div_val > 1 else 0
        self.head_projection = nn.Parameter(torch.empty(width, width)) if width else None

    def init_weights(self) -> None:
        """Draw the clusters' rows from N(0, init_std^2), the head's projection from N(0, proj_init_std^2); biases are
        zero."""
        nn.init.normal_(self.cluster_weight, 0.0, self.init_std)
        if self.head_projection is not None:
            nn.init.normal_(self.head_projection, 0.0, self.projection_std)
        for bias in (*self.biases, self.cluster_bias):
            nn.init.zeros_(bias)

    def forward(
        self, hidden_TD: Tensor, target_T: Tensor, embedding: AdaptiveEmbedding, tail_tokens: Sequence[Tensor] = ()
    ) -> CrossEntropy:
        """Compute the mean nats of targets and the nats of each.

        Args:
            hidden_TD: hidden states.
            target_T: int64 ids.
            embedding: of the input.
            tail_tokens: int64, the tokens whose targets each tail has, as planned (Routing); without them they are
                found here, for which the host waits for a GPU.
        """
        head, *tails = self.clusters
        cluster_T = torch.stack([target_T >= tail.first for tail in tails]).sum(0)
        scale = 1 / max(1, len(target_T))
        head_target_T = torch.where(target_T < head.size, target_T, head.size - 1 + cluster_T)
        loss, nll_T = linear_cross_entropy(
            self._projected(hidden_TD, 0, embedding), *self._head(embedding), head_target_T, scale=scale
        )
        tail_tokens = tail_tokens or [(cluster_T == i).nonzero().squeeze(1) for i in range(1, len(self.clusters))]
        for i, (tail, counted_N) in enumerate(zip(tails, tail_tokens, strict=True), 1):
            found = linear_cross_entropy(
                self._projected(hidden_TD, i, embedding),
                embedding.tables[i].weight,  # type: ignore[arg-type]
                self.biases[i],
                target_T - tail.first,
                scale=scale,
                counted_N=counted_N,
            )
            loss, nll_T = loss + found.loss, nll_T + found.nll_T
        return CrossEntropy(loss, nll_T)

    def log_probabilities(self, hidden: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        """Compute the logarithm of each symbol's probability, [..., V], for hidden states [..., D]."""
        head = self.clusters[0]
        logits = F.linear(self._projected(hidden, 0, embedding), *self._head(embedding))
        symbols, others = logits.log_softmax(-1).split([head.size, len(self.clusters) - 1], -1)
        found = [symbols]
        for i in range(1, len(self.clusters)):
            weight = embedding.tables[i].weight
            tail = F.linear(self._projected(hidden, i, embedding), weight, self.biases[i])  # type: ignore[arg-type]
            found.append(others[..., i - 1 : i] + tail.log_softmax(-1))
        return torch.cat(found, -1)

    def _head(self, embedding: AdaptiveEmbedding) -> tuple[Tensor, Tensor]:
        """Weight and bias of the head: the first cluster's symbols, then the other clusters."""
        weight: Tensor = embedding.tables[0].weight  # type: ignore[assignment]
        return torch.cat((weight, self.cluster_weight)), torch.cat((self.biases[0], self.cluster_bias))

    def _projected(self, hidden: Tensor, i: int, embedding: AdaptiveEmbedding) -> Tensor:
        """Hidden states in the width of a cluster's embeddings."""
        if self.head_projection is None:
            return hidden
        return hidden @ (embedding.projections[i] if i else self.head_projection)
