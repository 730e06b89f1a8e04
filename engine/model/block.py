"""One Transformer-XL block: attention, then a dense feed-forward or an expert layer, with residual sums.

post-LN (published): h = LN(x + Dropout(f(x)));  pre-LN: h = x + Dropout(f(LN(x))), where memory is normalised too.

Letters: B streams, Q query length, M memory length, S = M+Q, D model width, T = B*Q tokens (row-major: b, then q),
E experts, S strata (expert layers one behind the other, 1 unless said otherwise).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreroute.engine.config import KernelsConfig, ModelConfig, MoEConfig
from foreroute.engine.config.model import expert_layers, feed_forward_width
from foreroute.engine.model.attention import RelativeAttention, SharedAttention
from foreroute.engine.moe.feed_forward import FeedForward
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.routing.methods import live_method
from foreroute.engine.routing.plan import Routing
from foreroute.engine.tracing import traced


class BlockOutput(NamedTuple):
    """Result of a block."""

    y_BQD: Tensor
    auxiliary_loss: Tensor | None  # scalar, already weighted; None for routers without a loss
    count_SE: Tensor | None  # int64: rows of each stratum's experts, 0 where one has fewer than others; None when dense
    carried: Tensor | None = None  # of a live router, for that of the next expert layer


def join_counts(counts: Sequence[Tensor]) -> Tensor:
    """Concatenate the counts of layers [any, E], and add zeros where a layer has fewer experts than another."""
    most = max(count_SE.shape[1] for count_SE in counts)
    return torch.cat([F.pad(count_SE, (0, most - count_SE.shape[1])) for count_SE in counts])


class Block(nn.Module):
    """Attention and feed-forward of layer number `layer`."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, kernels: KernelsConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm = model.pre_norm
        self.attention = RelativeAttention(model)
        self.attention_norm = nn.LayerNorm(model.width)
        layers = expert_layers(model, moe)
        self.has_experts = not moe.dense and layer in layers
        if self.has_experts:
            first, section = layers.index(layer) * moe.strata, moe.at_layer(layer)
            live_before = sum(live_method(moe.at_layer(before)) is not None for before in layers if before < layer)
            self.moe, *deeper = (
                MoELayer(
                    model.width,
                    section.at_stratum(stratum),
                    kernels,
                    first + stratum,
                    plan=first + stratum - live_before,
                    dropout=model.dropout,
                )
                for stratum in range(moe.strata)
            )
            self.strata = nn.ModuleList(deeper)  # behind the first; a token without experts there stays as it is
            self.strata_norms = nn.ModuleList(nn.LayerNorm(model.width) for _ in deeper)
        else:
            inner = feed_forward_width(model, moe, layer)
            self.feed_forward = FeedForward(model.width, inner, moe.activation, model.dropout)
        self.feed_forward_norm = nn.LayerNorm(model.width)
        self.dropout = nn.Dropout(model.dropout)

    def forward(
        self,
        x_BQD: Tensor,
        memory_BMD: Tensor,
        shared: SharedAttention,
        routing: Routing,
        carried: Tensor | None = None,
        value_BSI: Tensor | None = None,
    ) -> BlockOutput:
        """Apply the block to x; value_BSI as for RelativeAttention."""
        x_BQD = self._attend(x_BQD, memory_BMD, shared, value_BSI)
        inner_BQD = self.feed_forward_norm(x_BQD) if self.pre_norm else x_BQD
        auxiliary_loss, count_SE = None, None
        if self.has_experts:
            y_TD, auxiliary_loss, count_E, carried = self.moe(inner_BQD.flatten(0, 1), routing, carried)
            y_BQD, count_SE = y_TD.view_as(x_BQD), count_E[None]
        else:
            y_BQD = traced("feed_forward", self.feed_forward, inner_BQD)
        y_BQD = x_BQD + self.dropout(y_BQD)
        if not self.pre_norm:
            y_BQD = self.feed_forward_norm(y_BQD)
        if count_SE is not None and len(self.strata) > 0:
            y_BQD, count_SE = self._pass_through_strata(y_BQD, routing, count_SE)
        return BlockOutput(y_BQD, auxiliary_loss, count_SE, carried)

    def _pass_through_strata(self, x_BQD: Tensor, routing: Routing, count_1E: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the strata behind the first, h = x + Dropout(f(LN(x))) each; return the counts of all."""
        counts = [count_1E]
        for norm, stratum in zip(self.strata_norms, self.strata, strict=True):
            found = stratum(norm(x_BQD).flatten(0, 1), routing)
            x_BQD = x_BQD + self.dropout(found.y_TD.view_as(x_BQD))
            counts.append(found.count_E[None])
        return x_BQD, join_counts(counts)

    def _attend(
        self, x_BQD: Tensor, memory_BMD: Tensor, shared: SharedAttention, value_BSI: Tensor | None = None
    ) -> Tensor:
        context_BSD = torch.cat((memory_BMD, x_BQD), dim=1)
        if self.pre_norm:
            context_BSD = self.attention_norm(context_BSD)
            query_BQD = context_BSD[:, memory_BMD.shape[1] :]
            y_BQD: Tensor = self.dropout(traced("attention", self.attention, query_BQD, context_BSD, shared, value_BSI))
            return x_BQD + y_BQD
        y_BQD = traced("attention", self.attention, x_BQD, context_BSD, shared, value_BSI)
        y_BQD = self.attention_norm(x_BQD + self.dropout(y_BQD))
        return y_BQD
