"""Experts that need no row: constants, copies and nulls (MoE++, arXiv 2410.07348; AdaMoE, arXiv 2406.13233).

They are columns of a router after its E experts, and are computed where the token is, so they cost no byte:

    constant    y += w (a1 x + a2 v),  (a1, a2) = softmax(Wc x), v and Wc learned
    copy        y += w x
    null        nothing

Letters: T tokens, D width, J of all of them, c constants.
"""

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig


class ZeroExperts(nn.Module):
    """The experts without rows of one layer, replicated on all ranks."""

    def __init__(self, width: int, moe: MoEConfig) -> None:
        super().__init__()
        self.constants, self.copies = moe.constant_experts, moe.copy_experts
        if self.constants:
            self.vector = nn.Parameter(torch.empty(self.constants, width).normal_())
            self.mix = nn.Parameter(torch.empty(self.constants, 2, width).normal_(0.0, width**-0.5))

    def forward(self, x_TD: Tensor, weight_TJ: Tensor) -> Tensor:
        """Return the sum of each token's outputs [T, D].

        Args:
            weight_TJ: weights of constants, copies and nulls; 0 where a token does not use one.
        """
        weight_TJ = weight_TJ.to(torch.promote_types(x_TD.dtype, torch.float32))
        copies_T1 = weight_TJ[:, self.constants : self.constants + self.copies].sum(dim=1, keepdim=True)
        factor_T1, y_TD = copies_T1, x_TD.new_zeros((), dtype=weight_TJ.dtype)
        if self.constants:
            wide_TD = x_TD.to(weight_TJ.dtype)
            mix_Tc2 = torch.einsum("td,cad->tca", wide_TD, self.mix.to(weight_TJ.dtype)).softmax(dim=-1)
            part_Tc2 = weight_TJ[:, : self.constants, None] * mix_Tc2
            factor_T1 = copies_T1 + part_Tc2[..., 0].sum(dim=1, keepdim=True)
            y_TD = part_Tc2[..., 1] @ self.vector.to(weight_TJ.dtype)
        return (factor_T1 * x_TD + y_TD).to(x_TD.dtype)


def zero_experts(width: int, moe: MoEConfig) -> ZeroExperts | None:
    """Build them; None where no column computes anything."""
    return ZeroExperts(width, moe) if moe.constant_experts or moe.copy_experts else None
