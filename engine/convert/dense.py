"""Reads a dense feed-forward from the module that computes it, whatever its parameters are called.

    act(x W1^T + b1) W2 + b2,   gated: (act(x W1^T + b1) * (x W3^T + b3)) W2 + b2

Every way to give the module's parameters these roles is tried on random parameters and random x, and the way whose
result is the module's own is taken. So the roles follow from the computation, not from names: matrices may be stored as
[F, D] or [D, F], and a module that computes something else is refused.

Letters: D width, F hidden width, T rows of x.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor, nn

from foreroute.engine.config import Activation
from foreroute.engine.errors import require
from foreroute.kernels.activations import ACTIVATIONS

_PROBES = 8
_CLOSE = 1e-6  # relative, in fp64: the formulas of an activation differ by 1e-9, two activations by 1e-3


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense feed-forward: its weights as ours, and which parameters of its module they are."""

    activation: Activation
    names: dict[str, str]
    """The module's parameter of each role: w1, w2, with a gate w3, and of b1, b2, b3 those that it has."""
    turned: frozenset[str]  # roles whose matrix the module holds as [D, F]
    weights: dict[str, Tensor]  # by role: matrices [F, D], b1 and b3 [F], b2 [D], detached

    @property
    def hidden(self) -> int:
        """The hidden width (F)."""
        return len(self.weights["w1"])


@dataclass(frozen=True, slots=True)
class _Roles:
    """One way to give a module's parameters their roles."""

    activation: Activation
    names: dict[str, str]
    turned: frozenset[str]

    def weights(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {role: _turn(parameters[name], role in self.turned) for role, name in self.names.items()}


def read_dense(name: str, module: nn.Module, width: int) -> Dense:
    """Return the feed-forward that a module computes.

    Args:
        name: for messages.
        width: width of the hidden states (D).

    Raises:
        UserError: the module computes something else, or has what experts have not.
    """
    parameters = {key: p.detach() for key, p in module.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(module).to("cpu", torch.float64).eval()
    with torch.no_grad():
        for parameter in probe.parameters():
            std = 1.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        x_TD = torch.randn(_PROBES, width, generator=generator, dtype=torch.float64)
        want_TD = probe(x_TD)
        drawn = {key: p.detach() for key, p in probe.named_parameters()}
        ways = (way for way in _ways(drawn, width) if _same(compute(x_TD, way.weights(drawn), way.activation), want_TD))
        found = next(ways, None)
    require(
        found is not None,
        f"{name}: must compute act(x W1 + b1) W2 + b2, or with a gate (act(x W1 + b1) * x W3) W2 + b2, with act one of"
        f" {', '.join(ACTIVATIONS)}; {type(module).__name__} computes something else",
    )
    assert found is not None
    weights = found.weights(parameters)
    gate_bias = weights.get("b3")
    require(
        gate_bias is None or not bool(gate_bias.any()),
        f"{name}: {found.names.get('b3')} is not zero: must be, since experts have no bias of the matrix W3",
    )
    return Dense(found.activation, found.names, found.turned, weights)


def as_held(weights: Mapping[str, Tensor], names: Mapping[str, str], turned: Collection[str]) -> dict[str, Tensor]:
    """Return weights by role as their module holds them, by its names; the other arguments are those of Dense."""
    return {name: _turn(weights[role], role in turned) for role, name in names.items()}


def hidden_units(x_TD: Tensor, weights: Mapping[str, Tensor], activation: Activation) -> Tensor:
    """Return the hidden units [T, F] of x."""
    hidden_TF = ACTIVATIONS[activation.function].apply(_linear(x_TD, weights["w1"], weights.get("b1")))
    if activation.gated:
        hidden_TF = hidden_TF * _linear(x_TD, weights["w3"], weights.get("b3"))
    return hidden_TF


def compute(x_TD: Tensor, weights: Mapping[str, Tensor], activation: Activation) -> Tensor:
    """Apply a feed-forward with these weights by role to x."""
    y_TD = hidden_units(x_TD, weights, activation) @ weights["w2"]
    return y_TD if "b2" not in weights else y_TD + weights["b2"]


def _linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    return nn.functional.linear(x_TD, weight_FD, bias_F)


def _turn(value: Tensor, turned: bool) -> Tensor:
    return value.T.contiguous() if turned else value


def _same(got: Tensor, want: object) -> bool:
    if not isinstance(want, Tensor) or want.shape != got.shape:
        return False
    return bool((got - want).norm() <= _CLOSE * want.norm())


def _ways(parameters: Mapping[str, Tensor], width: int) -> Iterator[_Roles]:
    """Yield all ways to give parameters their roles."""
    matrices = [name for name, value in parameters.items() if value.dim() == 2]
    vectors = [name for name, value in parameters.items() if value.dim() == 1]
    roles = ("w1", "w2", "w3")[: len(matrices)]
    biases = ("b1", "b2", "b3")[: len(matrices)]
    sizes = {size for name in matrices for size in parameters[name].shape} - {width}
    whole = len(matrices) in (2, 3) and len(sizes) < 2 and len(matrices) + len(vectors) == len(parameters)
    if not whole or len(vectors) > len(biases):
        return
    hidden = sizes.pop() if sizes else width
    of_bias = {"b1": hidden, "b2": width, "b3": hidden}
    shapes = {False: (hidden, width), True: (width, hidden)}
    kinds = [kind for kind in Activation if kind.gated == (len(matrices) == 3)]
    for order, chosen in product(permutations(matrices), permutations(biases, len(vectors))):
        if any(len(parameters[name]) != of_bias[role] for role, name in zip(chosen, vectors, strict=True)):
            continue
        fits = [[t for t in (False, True) if parameters[name].shape == shapes[t]] for name in order]
        names = {**dict(zip(roles, order, strict=True)), **dict(zip(chosen, vectors, strict=True))}
        for turns, activation in product(product(*fits), kinds):
            turned = frozenset(role for role, is_turned in zip(roles, turns, strict=True) if is_turned)
            yield _Roles(activation, names, turned)
