"""The router of a Hugging Face block, as a live router: their module itself, with their weights and their arithmetic.

So its choices are theirs to the bit, also in bf16, and what transformers reads from it by hooks is there: with
output_router_logits=True their model computes its own balance loss from it.

Letters: T tokens, D width, E experts, K active experts.
"""

from typing import Any

import torch
from torch import Tensor

from foreroute.engine.config import MoEConfig
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter
from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.plan import Route


class HostRouter(LiveRouter):
    """softmax of x W^T in fp32, top k, divided by their sum or not, as the block's own module has it."""

    card = Card(
        "top k of the softmax of a trained linear gate, divided by their sum or as they are",
        "Qwen3, arXiv 2505.09388; OLMoE, arXiv 2409.02060; Mixtral, arXiv 2401.04088",
        "as learned; the loss is the model's own",
        "models of Hugging Face",
    )
    gate: Any
    """Module: returns logits [T, E], weights [T, K] and experts [T, K]; set after construction."""

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        super().__init__(width, moe, layer)

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to k experts each."""
        self.gate.top_k = k
        logits_TE, weight_TK, expert_TK = self.gate(x_TD)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return LiveRoute(Route(expert_TK, weight_TK.to(wide)), logits_TE.to(wide))
