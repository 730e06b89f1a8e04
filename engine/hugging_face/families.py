"""Families of Hugging Face whose expert blocks foreroute's layer can be: where they are, and their weights as ours.

The blocks of Qwen3-MoE, OLMoE and Mixtral are equal but for their classes and for whether the weights of a token's
experts are divided by their sum:

    gate.weight            [E, D]     of the router
    experts.gate_up_proj   [E, 2F, D] ours: w1 over w3, act(w1 x) * (w3 x)
    experts.down_proj      [E, D, F]  ours: w2, transposed

There are no biases. Transposing and cutting is exact, so weights come back bit for bit.

Letters: D width, F hidden width of an expert, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.engine.config import Activation
from foreroute.engine.errors import require
from foreroute.engine.moe.experts import Experts

BLOCKS = ("Qwen3MoeSparseMoeBlock", "OlmoeSparseMoeBlock", "MixtralSparseMoeBlock")
ROUTERS = ("Qwen3MoeTopKRouter", "OlmoeTopKRouter", "MixtralTopKRouter")
_ACTIVATIONS = {  # by the classes of transformers' hidden_act
    "ReLU": Activation.reglu,
    "SiLU": Activation.swiglu,
    "SiLUActivation": Activation.swiglu,
    "GELUActivation": Activation.geglu,
    "GELUTanh": Activation.geglu_tanh,
    "NewGELUActivation": Activation.geglu_tanh,
    "FastGELUActivation": Activation.geglu_tanh,
}
_GATES = ("gate", "router.gate")  # in our layer: with planned routes, with the live router


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that all expert blocks of a model have in common."""

    width: int  # D
    experts: int  # E
    expert_width: int  # F
    k: int
    activation: Activation
    normalised: bool  # the weights of a token's experts are divided by their sum
    dtype: torch.dtype


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's expert blocks by their names, in its order.

    Raises:
        UserError: there are none.
    """
    found = {name: module for name, module in model.named_modules() if type(module).__name__ in BLOCKS}
    require(
        len(found) > 0, f"{type(model).__name__}: has no expert block of transformers; must have {', '.join(BLOCKS)}"
    )
    return found


def shape_of(name: str, block: nn.Module) -> Shape:
    """Return the shape of a block.

    Raises:
        UserError: it has something that foreroute's layer has not.
    """
    experts: Any = block.get_submodule("experts")
    gate: Any = block.get_submodule("gate")
    up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
    activation = type(experts.act_fn).__name__
    require(
        activation in _ACTIVATIONS,
        f"{name}: hidden_act of class {activation}; must be one of {', '.join(_ACTIVATIONS)}",
    )
    noise = getattr(block, "jitter_noise", 0.0)
    require(noise == 0.0, f"{name}: router_jitter_noise={noise}; must be 0")
    require(not up.is_meta, f"{name}: is on the meta device; give the model its device and weights first")
    require(not hasattr(up, "ds_id"), f"{name}: was built inside deepspeed.zero.Init; must be built outside")
    others = {n for n, _ in block.named_parameters()} - {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    require(not others, f"{name}: has {', '.join(sorted(others))} besides router and experts")
    normalised = bool(getattr(gate, "norm_topk_prob", True))
    sizes = down.shape[1], down.shape[0], down.shape[2]
    return Shape(*sizes, int(gate.top_k), _ACTIVATIONS[activation], normalised, up.dtype)


def import_experts(experts: Experts, block: nn.Module) -> None:
    """Set all experts of a layer to those of a block, which have no biases."""
    theirs = block.get_submodule("experts")
    up, down = theirs.get_parameter("gate_up_proj"), theirs.get_parameter("down_proj")
    w1, w3 = (part.contiguous() for part in up.detach().clone().chunk(2, dim=1))
    w2 = down.detach().transpose(1, 2).contiguous()
    for name, value, source in (("w1", w1, up), ("w2", w2, down), ("w3", w3, up)):
        setattr(experts, name, nn.Parameter(value, requires_grad=source.requires_grad))


def their_weights(name: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of one block under their names.

    Args:
        name: of the block in the model.
        ours: weights of the layer in its place, whole, by their names in that layer (MoELayer).
    """
    (router,) = (ours[f"{place}.weight"] for place in _GATES if f"{place}.weight" in ours)
    return {
        f"{name}.gate.weight": router,
        f"{name}.experts.gate_up_proj": torch.cat((ours["experts.w1"], ours["experts.w3"]), dim=1),
        f"{name}.experts.down_proj": ours["experts.w2"].transpose(1, 2).contiguous(),
    }
