"""One layer of the model: attention, then a feed-forward (dense or experts), each with residual sum and LayerNorm.

Post-norm (published): h = LN(x + Dropout(sublayer(x))). Pre-norm: h = x + Dropout(sublayer(LN(x))).

Letters: B streams, Q query length, S = M+Q, D width, T = B*Q tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.attention import RelativeAttention
from engine.config import KernelsConfig, ModelConfig, MoEConfig, Router
from engine.feed_forward import FeedForward
from engine.moe.layer import LayerCall, LayerOutput, MoELayer


class Positions(NamedTuple):
    """What all blocks share in a forward pass."""

    encoding_SD: Tensor  # of the distances 0..S-1
    u_HW: Tensor
    v_HW: Tensor
    window: int | None


class Block(nn.Module):
    """Attention and feed-forward of one layer."""

    def __init__(
        self, model: ModelConfig, moe: MoEConfig, kernels: KernelsConfig, layer: int
    ) -> None:
        super().__init__()
        self.pre_norm = model.pre_norm
        self.attention = RelativeAttention(model)
        self.attention_norm = nn.LayerNorm(model.width)
        self.dense = moe.router is Router.dense
        if self.dense:
            self.feed_forward = FeedForward(
                model.width, moe.dense_width, moe.activation, model.dropout
            )
        else:
            self.moe = MoELayer(model, moe, kernels, layer)
        self.feed_forward_norm = nn.LayerNorm(model.width)
        self.dropout = nn.Dropout(model.dropout)

    def forward(
        self, x_BQD: Tensor, memory_BMD: Tensor, positions: Positions, call: LayerCall
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the next hidden states [B, Q, D], the auxiliary loss, and the rows of each expert (None: dense)."""
        norm, pre = self.attention_norm, self.pre_norm
        both_BSD = torch.cat([memory_BMD, x_BQD], dim=1)
        attended_BQD = self.attention(
            norm(both_BSD) if pre else both_BSD, positions.encoding_SD, positions.u_HW, positions.v_HW,
            queries=x_BQD.shape[1], window=positions.window,
        )  # fmt: skip
        x_BQD = x_BQD + self.dropout(attended_BQD)
        x_BQD = x_BQD if pre else norm(x_BQD)
        norm = self.feed_forward_norm
        found = self._feed_forward((norm(x_BQD) if pre else x_BQD).flatten(0, 1), call)
        x_BQD = x_BQD + self.dropout(found.y_TD).view_as(x_BQD)
        return (
            x_BQD if pre else norm(x_BQD),
            found.auxiliary_loss,
            None if self.dense else found.count_E,
        )

    def _feed_forward(self, x_TD: Tensor, call: LayerCall) -> LayerOutput:
        if self.dense:
            zero = x_TD.new_zeros(())
            return LayerOutput(self.feed_forward(x_TD), zero, zero)
        output: LayerOutput = self.moe(x_TD, call)
        return output
