"""The module in the place of a feed-forward; it asks engine/plug_in/planned_experts.py what to run by.

Letters: B sequences, Q ids of each, D width, T = B*Q tokens.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foreroute.engine.errors import require
from foreroute.engine.moe.layer import LayerOutput, MoELayer

if TYPE_CHECKING:
    from foreroute.engine.plug_in.planned_experts import PlannedExperts


class PlannedFeedForward(nn.Module):
    """An expert layer in the place of a feed-forward: x [..., D] to [..., D]."""

    def __init__(self, moe: MoELayer, experts: "PlannedExperts") -> None:
        super().__init__()
        self.moe = moe
        self._experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [B, Q, D], or to the same tokens row by row, [T, D].

        Raises:
            RuntimeError: no plan, or one that is not of this forward pass; or the model is traced or exported.
            ValueError: x is not of the batch that was planned.
        """
        _refuse_tracing(x)
        routing, running = self._experts.call(self.moe.layer, x)
        x_TD = x.reshape(-1, x.shape[-1]).to(self.moe.experts.w1.dtype)
        output: LayerOutput = self.moe(x_TD, routing)
        y = output.y_TD.to(x.dtype).view_as(x)
        self._experts.passes.note(y, running)
        return y

    @property
    def experts(self) -> "PlannedExperts":
        """What plans for it: in a copy of the model another one than in the model."""
        return self._experts

    def get_extra_state(self) -> Tensor:
        """Give a digest of the tables for the model's state_dict, which lacks them.

        It is 8 numbers of 0 .. 255 as fp32 [8]: averages and other number formats leave them as they are.
        """
        digest = self._experts.tables % 2**64
        return torch.tensor(list(digest.to_bytes(8, "little")), dtype=torch.float32)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the state of a model that was trained with other tables.

        Raises:
            UserError: it is.
        """
        here = self.get_extra_state()
        require(
            torch.equal(state.detach().cpu().float().round(), here),
            f"state of a model with other tables: digest {_hex(state)}, must be {_hex(here)} as here; give "
            "load_state_dict of the experts what its state_dict gave first",
        )


def _hex(digest: Tensor) -> str:
    return "".join(f"{round(number):02x}" for number in digest.tolist())


def _refuse_tracing(x: Any) -> None:
    """Raise where a record of the call would be run for other ids: it would keep the plan of this call's."""
    traced = isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting()
    captured = isinstance(x, Tensor) and x.is_cuda and torch.cuda.is_current_stream_capturing()
    if traced or captured:
        raise RuntimeError(
            "an expert layer cannot be traced, exported or captured in a CUDA graph: the record would keep this call's"
            " plan"
        )
