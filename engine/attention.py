"""Relative multi-head attention of Transformer-XL (Dai et al. 2019, arXiv 1901.02860), projections and positions.

The products of queries, keys and distances are in kernels/relative_attention.py. Residual sum and norm are the block's.

Letters: B streams, Q query length, M memory length, S = M+Q, D width, H heads, W head width.
"""

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from kernels.relative_attention import relative_attention


def sinusoids(distances_S: Tensor, width: int) -> Tensor:
    """Encode distances as [S, D]: sines then cosines of d / 10000^(2i/D), as published."""
    frequency = 10000 ** (-torch.arange(0, width, 2, device=distances_S.device) / width)
    angle = distances_S[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class RelativeAttention(nn.Module):
    """Attention of each position to itself and what is left of it; no biases in the projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_width = config.heads, config.head_width
        inner = config.heads * config.head_width
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.r = nn.Linear(config.width, inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)
        self.dropout = config.attention_dropout

    def forward(
        self,
        x_BSD: Tensor,
        position_SD: Tensor,
        u_HW: Tensor,
        v_HW: Tensor,
        *,
        queries: int,
        window: int | None,
    ) -> Tensor:
        """Return [B, Q, D] for the last `queries` positions of x_BSD (memory, then the segment).

        Args:
            position_SD: encodings of the distances 0..S-1.
            window: keys at this distance or more are hidden; None for no limit.
        """
        streams, keys, _ = x_BSD.shape
        inner = self.heads * self.head_width
        heads = (self.heads, self.head_width)
        memory = keys - queries
        query_weight, key_value_weight = self.qkv.weight.split([inner, 2 * inner])
        query = nn.functional.linear(x_BSD[:, memory:], query_weight)
        key, value = nn.functional.linear(x_BSD, key_value_weight).chunk(2, dim=-1)
        out_BQHW = relative_attention(
            query.view(streams, queries, *heads),
            key.view(streams, keys, *heads),
            value.view(streams, keys, *heads),
            self.r(position_SD).view(keys, *heads),
            u_HW,
            v_HW,
            scale=self.head_width**-0.5,
            window=window,
            dropout=self.dropout if self.training else 0.0,
        )
        out_BQD: Tensor = self.out(out_BQHW.reshape(streams, queries, inner))
        return out_BQD
