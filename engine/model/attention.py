"""Multi-head relative attention of one block: projections around kernels.relative_attention.

LayerNorm, output dropout and the residual sum are the block's. What all layers share (u, v, the encoded distances) is
made once in engine/model/transformer_xl.py and comes in as SharedAttention.

Letters: B streams, Q query length, M memory length, S = M+Q, D model width, H heads, W head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreroute.engine.config import ModelConfig
from foreroute.kernels.ops.relative_attention import relative_attention


@dataclass(frozen=True, slots=True)
class SharedAttention:
    """Tensors that the attention of all layers shares in one forward pass."""

    distance_SD: Tensor  # encodings of the distances 0..S-1, after dropout
    u_HW: Tensor  # added to the query against the content of keys
    v_HW: Tensor  # added to the query against their distance
    window: int | None  # keys this far away or farther are hidden; None for no limit
    first_BQ: Tensor | None = None  # int32: the first key that each query sees; None: all keys before it


def encode_distances(count: int, width: int, *, clamp_len: int, like: Tensor) -> Tensor:
    """Encode the distances 0..count-1 as sines, then cosines, of wavelengths 2 pi 10000^(2i/D); [count, D].

    Args:
        clamp_len: distances beyond this are encoded as this; 0 for no clamp.
        like: has the device and dtype of the result, which is computed in fp32 at least.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    distance_S = torch.arange(count, device=like.device, dtype=dtype)
    if clamp_len > 0:
        distance_S = distance_S.clamp(max=clamp_len)
    exponent = torch.arange(0, width, 2, device=like.device, dtype=dtype) / width
    angle = torch.outer(distance_S, 10000.0**-exponent)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(like.dtype)


class RelativeAttention(nn.Module):
    """Attention from the queries to memory and themselves; no biases in the projections."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        inner = model.heads * model.head_width
        self.heads, self.head_width = model.heads, model.head_width
        self.query = nn.Linear(model.width, inner, bias=False)
        self.key_value = nn.Linear(model.width, 2 * inner, bias=False)
        self.distance = nn.Linear(model.width, inner, bias=False)
        self.output = nn.Linear(inner, model.width, bias=False)
        self.dropout = model.attention_dropout

    def forward(
        self, x_BQD: Tensor, context_BSD: Tensor, shared: SharedAttention, value_BSI: Tensor | None = None
    ) -> Tensor:
        """Attend from x to the context, which is memory followed by x; return [B, Q, D].

        Args:
            value_BSI: to be added to the context's values, heads side by side; None: nothing.
        """
        heads = self.heads, self.head_width
        key, value = self.key_value(context_BSD).unflatten(-1, (2, *heads)).unbind(2)
        if value_BSI is not None:
            value = value + value_BSI.unflatten(-1, heads)
        out_BQHW = relative_attention(
            self.query(x_BQD).unflatten(-1, heads),
            key,
            value,
            self.distance(shared.distance_SD).unflatten(-1, heads),
            shared.u_HW,
            shared.v_HW,
            scale=self.head_width**-0.5,
            first_BQ=shared.first_BQ,
            window=shared.window,
            dropout=self.dropout if self.training else 0.0,
        )
        y_BQD: Tensor = self.output(out_BQHW.flatten(2))
        return y_BQD
