"""One feed-forward network: the dense baseline's, and the shared expert's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import Activation


class FeedForward(nn.Module):
    """W2 Dropout(act(W1 x + b1)) + b2 with act = ReLU, or SwiGLU = silu(.) * (W3 x) (arXiv 2002.05202)."""

    gate: nn.Linear | None

    def __init__(self, width: int, inner: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        gated = activation is Activation.swiglu
        self.gate = nn.Linear(width, inner, bias=False) if gated else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Apply to rows [..., D]."""
        hidden = self.up(x_TD)
        hidden = torch.relu(hidden) if self.gate is None else F.silu(hidden) * self.gate(x_TD)
        out: Tensor = self.down(self.dropout(hidden))
        return out
