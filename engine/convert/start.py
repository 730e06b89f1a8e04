"""The origin of converted layers: the protocol of Copies, Slices and Adapters, and the steps that they share.

engine/plug_in/replace.py puts expert layers in the place of feed-forwards. With a start their weights are not drawn but
made of the dense feed-forward, and a module may be put around the layer, such as the output bias of slices.

Letters: D width, F hidden width of the dense feed-forward, E experts, T tokens, K active experts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from foreroute.engine.config import MoEConfig, RouteWeights
from foreroute.engine.convert.dense import Dense, read_dense
from foreroute.engine.errors import require
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.routing.live_router import LiveRouter
from foreroute.engine.routing.methods import expert_slices, live_method

_PROBES = 64
_CLOSE = 1e-5


@dataclass(frozen=True, slots=True)
class Converted:
    """One converted feed-forward."""

    experts: dict[str, Tensor]
    """Weights of all experts by their names in Experts; biases that are missing are zero and not trained."""
    around: nn.Module | None = None
    """Module that takes the expert layer as its child `experts` and stands in the place of both; None: none."""


class Start(ABC):
    """The origin of the experts' weights."""

    kind: ClassVar[str]
    """Its name in messages, on command lines and on disk."""
    sums_to_1: ClassVar[bool] = True
    """A token's weights must sum to 1 at every k; else each must be 1."""
    freezes: ClassVar[bool] = False
    """The model is frozen but for its expert layers."""

    @abstractmethod
    def section(self, moe: MoEConfig, dense: Dense) -> MoEConfig:
        """Return the options of the layers, with the expert width and the activation that follow.

        Raises:
            UserError: the number of experts does not fit.
        """

    @abstractmethod
    def convert(self, dense: Dense, moe: MoEConfig, module: nn.Module, seed: int) -> Converted:
        """Make the experts of one feed-forward.

        Args:
            dense: the feed-forward that `module` computes.
            moe: options of the layers, as `section` returned them.
            seed: of what is drawn.
        """


@dataclass(frozen=True, slots=True)
class Beginning:
    """The feed-forwards of a model before they are converted, all of one shape."""

    start: Start
    moe: MoEConfig
    dense: dict[str, Dense]
    modules: dict[str, nn.Module]

    def fill(self, name: str, layer: MoELayer, seed: int) -> nn.Module | None:
        """Set a layer's experts to those of a feed-forward; return the module around it.

        Args:
            seed: of what is drawn for the model.
        """
        drawn = number_seed(seed, layer.layer)
        converted = self.start.convert(self.dense[name], self.moe, self.modules[name], drawn)
        experts = layer.experts
        with torch.no_grad():
            for key, value in converted.experts.items():
                experts.get_parameter(key).copy_(value)
        experts.without_biases([key for key in ("b1", "b2") if key not in converted.experts])
        if layer.router is not None:
            width = self.dense[name].weights["w1"].shape[1]
            _check_live(layer.router, self.start, self.moe.router, width)
        return converted.around


def number_seed(seed: int, layer: int) -> int:
    """Return the seed of what is drawn for one layer."""
    return seed * 4096 + layer


def begin(start: Start, model: nn.Module, names: list[str], moe: MoEConfig, width: int) -> Beginning:
    """Read the feed-forwards of a model.

    Raises:
        UserError: one computes something else, they differ in shape, or the options do not preserve their sum.
    """
    modules = {name: model.get_submodule(name) for name in names}
    dense = {name: read_dense(name, module, width) for name, module in modules.items()}
    shapes = {(one.hidden, one.activation.name, tuple(one.names)): name for name, one in dense.items()}
    require(len(shapes) == 1, f"{', '.join(shapes.values())}: differ in shape; convert each kind with its own pattern")
    moe = start.section(moe, dense[names[0]])
    _check_section(moe, start)
    if start.freezes:
        _freeze(model)
    return Beginning(start, moe, dense, modules)


def _freeze(model: nn.Module) -> None:
    """Freeze a model but for the expert layers that it has already."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    kept = {parameter for layer in layers for parameter in layer.parameters()}
    for parameter in set(model.parameters()) - kept:
        parameter.requires_grad_(False)


def put_around(model: nn.Module, name: str, outer: nn.Module) -> None:
    """Put a module in the place of the expert layer of this name, which becomes its child `experts`."""
    layer = model.get_submodule(name)
    outer.add_module("experts", layer)
    model.set_submodule(name, outer.train(layer.training))


def _check_section(moe: MoEConfig, start: Start) -> None:
    kind = start.kind
    require(moe.columns == moe.experts, f"moe: constant, copy and null experts must be 0 with start={kind}")
    require(moe.shared_width == 0, f"moe.shared_width={moe.shared_width}: must be 0 with start={kind}")
    require(set(expert_slices(moe)) == {1}, f"moe.router={moe.router}: must have experts of one width, start={kind}")
    if live_method(moe) is not None:
        return
    whole = moe.gate_normalised and moe.gate_scale == 1.0
    allowed = [RouteWeights.sum]
    if start.sums_to_1:
        allowed = [RouteWeights.table, RouteWeights.uniform, *([RouteWeights.live] if whole else [])]
    require(
        moe.weights in allowed,
        f"moe.weights={moe.weights.name}: must be {', '.join(one.name for one in allowed)} with start={kind}, so that"
        f" {'the weights of a token sum to 1' if start.sums_to_1 else 'each active expert counts 1'}",
    )


@torch.no_grad()
def _check_live(router: LiveRouter, start: Start, name: str, width: int) -> None:
    """Raise UserError unless a live router's weights are what the start needs, for drawn x."""
    kind = start.kind
    generator = torch.Generator().manual_seed(0)
    like = next(iter([*router.parameters(), *router.buffers()]), torch.empty(0))
    x_TD = torch.randn(_PROBES, width, generator=generator).to(like)
    route = router(x_TD, min(2, router.most)).route
    weight_TK = route.weight_TK if route.used_TK is None else route.weight_TK.masked_fill(~route.used_TK, 0.0)
    right = weight_TK.sum(dim=1) if start.sums_to_1 else route.weight_TK
    require(
        bool(((right - 1).abs() < _CLOSE).all()),
        f"moe.router={name}: must have weights that {'sum to 1' if start.sums_to_1 else 'are 1'} with start={kind}",
    )
