"""Finds the modules of the user's model that an expert layer may replace; engine/plug_in/replace.py replaces them.

A replaced module is removed, so it must hold the parameters of one feed-forward and nothing else. The check uses the
shapes of parameters and the types of modules, not the computation.

Letters: D width, F hidden width of a feed-forward.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreroute.engine.errors import require
from foreroute.engine.moe.layer import MoELayer

_FORMATS = torch.float64, torch.float32, torch.bfloat16, torch.float16
_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d


@dataclass(frozen=True, slots=True)
class Replaced:
    """A module that an expert layer has replaced."""

    name: str  # its name in the model
    kind: str  # its class
    shapes: dict[str, tuple[int, ...]]  # shapes of its parameters, which are removed


def find_feed_forwards(model: nn.Module, pattern: str, width: int) -> list[str]:
    """Return the names of the modules to replace, in the model's order.

    Args:
        pattern: regular expression for whole names, as in named_modules.
        width: width of the hidden states (D).

    Raises:
        UserError: no module matches, or one that may not be replaced.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name in modules if re.fullmatch(pattern, name)]
    known = ", ".join(name for name in list(modules)[:9] if name)
    require(len(names) > 0, f"pattern {pattern!r}: matches no module; the model's names begin with {known}")
    for name in names:
        faults = {**_place_faults(name, names, modules), **_content_faults(modules[name], width)}
        fault = next((fault for fault, found in faults.items() if found), None)
        require(
            fault is None,
            f"pattern {pattern!r}: {name or 'the empty name'} {fault}; match feed-forwards only"
            f"{_hint(name, modules[name], width)}",
        )
    sides = {side_of(name): name for name in names if side_of(name)}
    require(
        len(sides) < 2,
        f"pattern {pattern!r}: matches feed-forwards of an encoder and a decoder ({', '.join(sides.values())}), which"
        " run for different ids: call replace_feed_forwards for each, with another seed",
    )
    return names


def side_of(name: str) -> str:
    """Return "encoder" or "decoder" by the last component of a module's name that ends so, else ""."""
    for part in reversed(name.lower().split(".")):
        for side in ("encoder", "decoder"):
            if part.endswith(side):
                return side
    return ""


def _place_faults(name: str, names: list[str], modules: dict[str, nn.Module]) -> dict[str, bool]:
    """Map each possible fault of a module's place in the model to whether it has it."""
    module = modules[name]
    others = [other for other, same in modules.items() if same is module and other != name]
    around = [other for other in names if other != name and name.startswith(f"{other}.")]
    return {
        "is the model itself": not name,
        "is a list of modules": isinstance(module, nn.ModuleList | nn.ModuleDict),
        f"is the same module as {', '.join(others)}": bool(others),
        f"lies inside {', '.join(around)}, which matches too": bool(around),
    }


def _content_faults(module: nn.Module, width: int) -> dict[str, bool]:
    """Map each possible fault of a module's content to whether it has it."""
    parameters = list(module.parameters())
    formats = {p.dtype for p in parameters}
    names = ", ".join(str(dtype) for dtype in sorted(formats - set(_FORMATS), key=str))
    quantized = any(hasattr(m, "_packed_params") for m in module.modules())
    matrices = [p for p in parameters if p.dim() >= 2 and width in p.shape]
    meta = any(p.is_meta for p in parameters)
    return {
        "holds an expert layer": any(isinstance(m, MoELayer) for m in module.modules()),
        "was built inside deepspeed.zero.Init": any(hasattr(p, "ds_id") for p in parameters),
        "is quantized: must have parameters of floating-point numbers": quantized,
        f"has weights of {names}: must be float64, float32, bfloat16 or float16": bool(names),
        "is on the meta device, where first weights are never drawn: give the model its device and weights first": meta,
        f"has fewer than two matrices with {width} rows or columns": len(matrices) < 2,
        f"holds more than one feed-forward: {_listed(_shapes(module))}": not _fits(module, width),
    }


def _hint(name: str, module: nn.Module, width: int) -> str:
    """Return a hint with the names of modules inside that may be replaced."""
    fitting: list[str] = []
    for inner, part in module.named_modules(prefix=name):
        inside = any(inner.startswith(f"{outer}.") for outer in fitting)
        if part is not module and not inside and _fits(part, width):
            fitting.append(inner)
    return f" (inside, {_some(fitting)} would fit)" if fitting else ""


def _fits(module: nn.Module, width: int) -> bool:
    """Return whether a module holds all parameters of one feed-forward and no others.

    These are two or three matrices [F, D] or [D, F], one of which may be two fused matrices ([2F, D]) and one a middle
    matrix ([F, F]); a bias for each; and the parameters of learned activations.
    """
    if any(_other_kind(m) for m in module.modules()):
        return False
    parameters = {p for m in module.modules() for p in m.parameters(recurse=False)}
    active = {p for m in module.modules() if isinstance(m, nn.PReLU) for p in m.parameters()}
    sides = [_sides(p, module) for p in parameters - active]
    matrices, biases = (sorted(s for s in sides if len(s) == dim) for dim in (2, 1))
    if not 2 <= len(matrices) <= 3 or len(biases) > len(matrices) or len(sides) != len(matrices) + len(biases):
        return False
    hidden = _hidden(matrices, width)
    if hidden is None or any(bias not in {(width,), (hidden,), (2 * hidden,)} for bias in biases):
        return False
    return not any(
        _fits(part, width) and set(part.parameters()) != set(module.parameters())
        for part in module.modules()
        if part is not module
    )


def _hidden(matrices: list[tuple[int, ...]], width: int) -> int | None:
    """Return F, or None if these are not the matrices of a feed-forward.

    Example, width 8: [(8, 32), (32, 8)], [(8, 32), (32, 32), (32, 8)] and [(64, 8), (8, 32)] all have F = 32.
    """
    outer = [s for s in matrices if width in s]
    found = {s[0] if s[1] == width else s[1] for s in outer}
    hidden = min(found, default=0)
    between = all(s == (hidden, hidden) for s in matrices if width not in s)
    whole = found == {hidden} or (found == {hidden, 2 * hidden} and len(matrices) == 2)
    return hidden if len(outer) >= 2 and whole and between else None


def _sides(parameter: Tensor, module: nn.Module) -> tuple[int, ...]:
    """Return the sizes of a parameter: the channels of a convolution, otherwise all sizes but those of 1."""
    convolutions = (m for m in module.modules() if isinstance(m, _CONVOLUTIONS))
    if parameter.dim() > 2 and any(m.weight is parameter for m in convolutions):
        return tuple(parameter.shape[:2])
    return tuple(parameter.shape) if parameter.dim() <= 2 else tuple(parameter.squeeze().shape)


def _other_kind(module: nn.Module) -> bool:
    """Return whether a module is of a type that does not occur in a feed-forward."""
    kind = type(module).__name__.lower()
    return isinstance(module, nn.RNNBase | nn.Embedding) or "attention" in kind or "norm" in kind


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    numbers = sum(math.prod(shape) for shape in shapes.values())
    return f"{_some(f'{name} {list(shape)}' for name, shape in shapes.items())}, {numbers} numbers"


def _some(names: Iterable[str]) -> str:
    """Return the first few names as text."""
    listed = list(names)
    return ", ".join(listed[:9]) + (f" and {len(listed) - 9} more" if len(listed) > 9 else "")


def replaced(name: str, module: nn.Module) -> Replaced:
    """Describe a module before it is replaced."""
    return Replaced(name, type(module).__name__, _shapes(module))
