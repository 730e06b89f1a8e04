"""The module that replaces a feed-forward; it gets its plans from engine/plug_in/planned_experts.py.

Letters: B sequences, Q ids of each, D width, T = B*Q tokens.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foreroute.engine.errors import require
from foreroute.engine.moe.layer import LayerOutput, MoELayer
from foreroute.engine.plug_in.passes import Pass
from foreroute.engine.routing.plan import Routing

if TYPE_CHECKING:
    from foreroute.engine.plug_in.planned_experts import PlannedExperts


class PlannedFeedForward(nn.Module):
    """An expert layer that replaces a feed-forward: x [..., D] to [..., D]."""

    def __init__(self, moe: MoELayer, experts: "PlannedExperts") -> None:
        super().__init__()
        self.moe = moe
        self._experts = experts

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Apply the layer to x [B, Q, D], or to the same tokens flattened, [T, D].

        Args:
            seen: read by a live router in place of x, of its shape.

        Raises:
            RuntimeError: there is no plan for this forward pass, or the model is traced or exported.
            ValueError: the shape of x differs from that of the planned batch.
        """
        _refuse_tracing(x)
        routing, running = self._experts.call(self.moe.layer, x)
        plan, tokens = routing.plan_of(self.moe.layer), x.numel() // x.shape[-1]
        most = plan.num_tokens if plan is not None else tokens if routing.real_T is None else len(routing.real_T)
        seen_TD = None if seen is None else self._rows(seen, most)
        y = self._run(self._rows(x, most), routing, running, seen_TD).y_TD[:tokens].to(x.dtype).view_as(x)
        self._experts.passes.note(y, running)
        return y

    def _rows(self, x: Tensor, most: int) -> Tensor:
        """Return x as rows in the format of the experts, with zeros where another rank of the expert group has more."""
        x_TD = x.reshape(-1, x.shape[-1]).to(self.moe.experts.first_weight.dtype)
        return x_TD if most <= len(x_TD) else torch.cat((x_TD, x_TD.new_zeros(most - len(x_TD), x_TD.shape[1])))

    def _run(self, x_TD: Tensor, routing: Routing, running: Pass, seen_TD: Tensor | None) -> LayerOutput:
        output: LayerOutput = self.moe(x_TD, routing)
        return output

    @property
    def experts(self) -> "PlannedExperts":
        """The expert layers of the model; a copy of the model has its own."""
        return self._experts

    def get_extra_state(self) -> Tensor:
        """Return a digest of the tables for the model's state_dict, which does not hold them.

        It is 8 numbers from 0 to 255 as fp32 [8], which averaging and conversion to other number formats preserve.
        """
        digest = self._experts.tables % 2**64
        return torch.tensor(list(digest.to_bytes(8, "little")), dtype=torch.float32)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a state belongs to a model with the same tables.

        Raises:
            UserError: the model was trained with other tables.
        """
        here = self.get_extra_state()
        require(
            torch.equal(state.detach().cpu().float().round(), here),
            f"state of a model with other tables: digest {_hex(state)}, must be {_hex(here)} as here; first load the"
            " state_dict of its experts with load_state_dict of these experts",
        )


def _hex(digest: Tensor) -> str:
    return "".join(f"{round(number):02x}" for number in digest.tolist())


def _refuse_tracing(x: Any) -> None:
    """Raise if the call is recorded to run again with other ids: the record would keep this call's plan."""
    traced = isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting()
    captured = isinstance(x, Tensor) and x.is_cuda and torch.cuda.is_current_stream_capturing()
    if traced or captured:
        raise RuntimeError(
            "an expert layer cannot be traced, exported or captured in a CUDA graph: the record would keep this call's"
            " plan"
        )
