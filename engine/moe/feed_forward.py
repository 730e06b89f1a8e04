"""The dense feed-forward of dense blocks and the shared expert: linear, activation, dropout, linear, with biases.

Letters: D model width, F hidden width.
"""

from torch import Tensor, nn

from foreroute.engine.config import Activation
from foreroute.kernels.activations import ACTIVATIONS


class FeedForward(nn.Module):
    """W2 Dropout(act(W1 x + b1)) + b2; with a gate act(W1 x + b1) * (W3 x), as in the experts."""

    w3: nn.Linear | None

    def __init__(self, width: int, inner: int, activation: Activation, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        self.w3 = nn.Linear(width, inner, bias=False) if activation.gated else None
        self.activation = ACTIVATIONS[activation.function]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_D: Tensor, keep_F: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Apply the feed-forward to the last dim of x.

        Args:
            keep_F: bool, shape of the hidden units: replaces random dropout; units that are kept are multiplied by
                scale.
        """
        hidden_F = self.activation.apply(self.w1(x_D))
        if self.w3 is not None:
            hidden_F = hidden_F * self.w3(x_D)
        hidden_F = self.dropout(hidden_F) if keep_F is None else hidden_F * keep_F * scale
        y_D: Tensor = self.w2(hidden_F)
        return y_D
