"""Routes of live routers under activation checkpointing: made in the forward pass, found again in the recomputation.

A router that ran again might choose other experts, where another rounding decides between two that are nearly equal, or
where it draws. The gradients would then belong to neither choice. So the recomputation gets the plan of the forward
pass, and backward goes through the graph that the forward pass made of router and plan: no router needs to know of it,
and counts and weights are exchanged once. It costs the tensors which that graph keeps, of which the gate's input [T, D]
is the largest.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from foreroute.engine.nested import map_tensors

T = TypeVar("T")


Values = list[tuple[Any, list[Tensor]]]
"""Results of a call, in order, each with the states of the random generators after it, of which it may have drawn."""


@dataclass
class _Pass:
    """A pass through a checkpointed call."""

    values: Values
    found: int | None  # of them, by a recomputation; None: this is the forward pass


_pass: ContextVar[_Pass | None] = ContextVar("pass", default=None)


def contexts() -> tuple["_Within", "_Within"]:
    """Make the contexts of a forward pass and of its recomputation: context_fn of torch.utils.checkpoint."""
    values: Values = []
    return _Within(values, None), _Within(values, 0)


def once(make: Callable[[], T]) -> T:
    """Return make(); in the recomputation of a forward pass, what it returned there.

    The result is a tensor, or tuples and dataclasses of tensors. In the recomputation it has no graph of its own.
    """
    here = _pass.get()
    if here is None:
        return make()
    if here.found is not None:
        value, random = here.values[here.found]
        here.found += 1
        _set_random_states(random)
        return cast(T, _without_graph(value))
    with saved_tensors_hooks(lambda x: x, lambda x: x):  # kept as they are, not made again
        made = make()
    here.values.append((_without_graph(made), _random_states()))
    return made


class _Within(AbstractContextManager[None]):
    """A pass's context; that of a recomputation is entered at each backward pass over a graph that is retained."""

    def __init__(self, values: Values, found: int | None) -> None:
        self._values, self._found = values, found

    def __enter__(self) -> None:
        self._token = _pass.set(_Pass(self._values, self._found))

    def __exit__(self, *error: Any) -> None:
        _pass.reset(self._token)


def _without_graph(value: T) -> T:
    """Return a value whose tensors need gradients as before, but have no history."""
    found: T = map_tensors(lambda x: x.detach().requires_grad_() if x.requires_grad else x, value)
    return found


def _random_states() -> list[Tensor]:
    on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpu]


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
