"""The experts of one layer on this rank: stacked parameters and the call into kernels.moe_ffn.

Parameter names and layout decide checkpoint keys and are what DeepSpeed's expert-parallel contract asks for: w1, w2
and, for SwiGLU, w3, each [L, F, D] (one row per hidden unit, also in w2, so that all experts together are one dense
feed-forward seen as [L*F, D]), and the biases b1 [L, F], b2 [L, D].

Letters: L experts on this rank, D width, F expert hidden width, R received rows.
"""

import torch
from torch import Tensor, nn

from engine.config import Activation, Backend, KernelsConfig, MoEConfig, require
from engine.moe.plan import Plan
from kernels import Dropout, ExpertWeights, moe_ffn
from kernels.launching import can_launch


class Experts(nn.Module):
    """E_i(x) = W2_i Dropout(act(W1_i x + b1_i)) + b2_i for the local experts i."""

    w3: nn.Parameter | None

    def __init__(self, width: int, moe: MoEConfig, kernels: KernelsConfig) -> None:
        super().__init__()
        shape = (moe.experts, moe.expert_width, width)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.b1 = nn.Parameter(torch.zeros(shape[:2]))
        self.w2 = nn.Parameter(torch.empty(shape))
        self.b2 = nn.Parameter(torch.zeros(moe.experts, width))
        gated = moe.activation is Activation.swiglu
        self.register_parameter("w3", nn.Parameter(torch.empty(shape)) if gated else None)
        self.kernels = kernels
        self.masked_from_k = moe.experts + 1
        if kernels.backend is Backend.cpu and kernels.masked_from_k is not None:
            self.masked_from_k = kernels.masked_from_k
        require(
            kernels.backend is not Backend.triton or can_launch(self.w1),
            f"kernels.backend=triton: the model is on {self.w1.device}; needs a GPU, or TRITON_INTERPRET=1 for tests",
        )
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Draw each expert's matrices from N(0, std^2); biases are zero."""
        for weight in (self.w1, self.w2, self.w3):
            if weight is not None:
                nn.init.normal_(weight, 0.0, std)

    def forward(self, received_RD: Tensor, plan: Plan, dropout: Dropout | None) -> Tensor:
        """Return the weighted sum [R, D] of each received row's local experts."""
        return moe_ffn(
            received_RD,
            plan.weight_N,
            ExpertWeights(self.w1, self.b1, self.w2, self.b2, self.w3),
            plan.rows,
            dropout=dropout,
            masked=plan.k >= self.masked_from_k,
            backend=self.kernels.backend.value,
            mode=self.kernels.mode.value,
            precision=self.kernels.precision.value,
            debug=self.kernels.debug,
        )
