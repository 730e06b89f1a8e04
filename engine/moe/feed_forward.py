"""The dense feed-forward of dense blocks and the shared expert: linear, ReLU or SwiGLU, dropout, linear, with biases.

Letters: D model width, F hidden width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from foreroute.engine.config import Activation


class FeedForward(nn.Module):
    """W2 Dropout(act(W1 x + b1)) + b2; for SwiGLU act(z) is silu(z) * (W3 x), as in the experts."""

    w3: nn.Linear | None

    def __init__(self, width: int, inner: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        gated = activation is Activation.swiglu
        self.w3 = nn.Linear(width, inner, bias=False) if gated else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_D: Tensor, keep_F: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Apply the feed-forward to the last dim of x.

        Args:
            keep_F: bool, shape of the hidden units: replaces random dropout; units that are kept are multiplied by
                scale.
        """
        z_F = self.w1(x_D)
        hidden_F = F.relu(z_F) if self.w3 is None else F.silu(z_F) * self.w3(x_D)
        hidden_F = self.dropout(hidden_F) if keep_F is None else hidden_F * keep_F * scale
        y_D: Tensor = self.w2(hidden_F)
        return y_D
