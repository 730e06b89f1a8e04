"""Expert matrices as int8 with one scale for each output channel, for evaluation.

    q = round(w / s), s = max |w| / 127 over the channel's weights; w' = q s

An output channel of w1 and w3 is a hidden unit, a row of [F, D]; one of w2 is a column. Products run on w', which a
layer makes when it is called and then drops, so a model holds the int8 values alone. Rounding to the nearest as in
LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339, section 2), whose finer parts are left out.

Letters: L experts, F hidden units, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

CHANNEL_DIM = {"w1": 0, "w3": 0, "w2": 1}
"""Of an expert's matrix [F, D], the dim of its output channels."""


def quantised(weight_FD: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the int8 values [F, D], and the fp32 scales, [F, 1] for w1 and w3, [1, D] for w2.

    Example: a channel 0.5, -1, 0.25 has the scale 1 / 127 and the values 64, -127, 32.
    """
    most = weight_FD.abs().amax(dim=1 - CHANNEL_DIM[name], keepdim=True)
    scale = most / 127
    return (weight_FD / scale.where(scale > 0, 1.0)).round().to(torch.int8), scale


class Int8(nn.Module):
    """Makes a matrix of its int8 values when it is read."""

    scale: Tensor

    def __init__(self, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.dtype = dtype

    def forward(self, value_LFD: Tensor) -> Tensor:
        """Return the weights."""
        return (value_LFD * self.scale).to(self.dtype)


def hold_int8(experts: nn.Module, name: str, value_LFD: Tensor, scale: Tensor) -> None:
    """Replace a matrix of a layer's experts by int8 values and scales; it cannot be trained any more."""
    dtype = getattr(experts, name).dtype
    delattr(experts, name)
    experts.register_buffer(name, value_LFD)
    parametrize.register_parametrization(experts, name, Int8(scale, dtype), unsafe=True)


def holds_int8(model: nn.Module) -> bool:
    """Return whether any matrix of a model is held as int8."""
    return any(isinstance(module, Int8) for module in model.modules())
