"""The live router of slices (MoEfication, arXiv 2110.01786, section 3.3): a small network predicts the slices in use.

    logits = V tanh(U x + u) + v,   U [E, D], V [E, E]

A token has the k slices with the largest logits, each with weight 1. Before training U has the directions of the
slices' centres and V is the identity. It is trained once, apart from the model: the binary cross entropy with each
slice's share of the largest slice's activation (engine/convert/selection.py), by Adam with the published step 0.01. It
is then a buffer, since weights of 1 have no gradient.

Letters: T tokens, D width, E slices, F hidden width of the dense feed-forward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from foreroute.engine.config import MoEConfig
from foreroute.engine.convert.clusters import unit_rows
from foreroute.engine.routing.live_router import LiveRoute, LiveRouter
from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.plan import Route

SLICE_ROUTER = f"{__name__}:SliceRouter"
"""Its name as moe.router."""
_STEP, _BATCH = 0.01, 512


class SliceRouter(LiveRouter):
    """The k largest logits of a network that was trained to predict the slices' activation; each slice counts 1."""

    card = Card(
        "the k slices of a dense feed-forward that a small trained network expects to be most active, each with weight"
        " 1",
        "MoEfication, arXiv 2110.01786",
        "as frozen, with a network of E tanh units",
        "slices of a dense feed-forward (engine/convert/)",
    )
    inner_ED: Tensor
    inner_E: Tensor
    outer_EE: Tensor
    outer_E: Tensor

    def __init__(self, width: int, moe: MoEConfig, layer: int = 0) -> None:
        super().__init__(width, moe, layer)
        experts = moe.experts
        shapes = {
            "inner_ED": (experts, width),
            "inner_E": (experts,),
            "outer_EE": (experts,) * 2,
            "outer_E": (experts,),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the logits of hidden states [T, E], fp32 at least."""
        return _logits(x_TD, (self.inner_ED, self.inner_E, self.outer_EE, self.outer_E))

    def forward(self, x_TD: Tensor, k: int, carried: Tensor | None = None) -> LiveRoute:
        """Route hidden states [T, D] to k slices each."""
        logits_TE = self.logits(x_TD)
        expert_TK = logits_TE.topk(k, dim=1).indices
        return LiveRoute(Route(expert_TK, torch.ones_like(expert_TK, dtype=logits_TE.dtype)), logits_TE)

    def train_on(self, x_TD: Tensor, mass_TE: Tensor, first_EfD: Tensor, *, epochs: int = 30, seed: int = 0) -> None:
        """Train the network from its beginning.

        Args:
            x_TD: hidden states.
            mass_TE: what each slice is activated by them, not negative (selection.slice_mass).
            first_EfD: the slices' rows of the first matrix.
            epochs: passes over the tokens.
            seed: of the order of the tokens.
        """
        centre_ED = torch.stack([unit_rows(rows).mean(0) for rows in first_EfD]).to(x_TD)
        identity = torch.eye(len(centre_ED)).to(x_TD)
        began = centre_ED, torch.zeros_like(centre_ED[:, 0]), identity, torch.zeros_like(centre_ED[:, 0])
        network = [tensor.clone().requires_grad_() for tensor in began]
        target_TE = mass_TE / mass_TE.amax(dim=1, keepdim=True).clamp(min=torch.finfo(mass_TE.dtype).tiny)
        adam = torch.optim.Adam(network, lr=_STEP)
        generator = torch.Generator().manual_seed(seed)
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.randperm(len(x_TD), generator=generator).split(_BATCH):
                    rows = rows.to(x_TD.device)
                    loss = F.binary_cross_entropy_with_logits(_logits(x_TD[rows], network), target_TE[rows].float())
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
        for name, value in zip(("inner_ED", "inner_E", "outer_EE", "outer_E"), network, strict=True):
            self.get_buffer(name).copy_(value.detach())


def _logits(x_TD: Tensor, network: "tuple[Tensor, ...] | list[Tensor]") -> Tensor:
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    inner_ED, inner_E, outer_EE, outer_E = (tensor.to(wide) for tensor in network)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(torch.tanh(F.linear(x_TD.to(wide), inner_ED, inner_E)), outer_EE, outer_E)
