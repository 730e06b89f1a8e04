"""Finds the forward pass to which the run of a layer belongs: by thread in forward, by autograd graph in backward.

Activation checkpointing runs layers again in backward. On a GPU backward runs in autograd's own threads, so the thread
does not identify the pass there. But the nodes of autograd's graph can carry metadata (Node.metadata). Every pass is
recorded on the nodes that it created and lives as long as they do; a recomputed layer looks it up from the running
node. A node without a record (inside nested checkpointing, or if a model hides its outputs) belongs to the only
possible pass, or to none.
"""

import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from foreroute.engine.plug_in.plans import Plans


@dataclass(eq=False, slots=True, weakref_slot=True)
class Pass:
    """A forward pass and its backward pass, with the plans for its layers."""

    plans: Plans
    dropout_seed: int
    first_node: int  # autograd's sequence number of the first node of this pass
    over: bool = False  # no layer may use it any more


class Passes:
    """The passes of one model."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._alive: weakref.WeakSet[Pass] = weakref.WeakSet()

    def _stack(self) -> list[Pass | None]:
        stack: list[Pass | None] = self._of_thread.__dict__.setdefault("stack", [])
        return stack

    def begin(self, new: Pass | None) -> None:
        """Make a pass the current one of this thread; None keeps the one before."""
        self._stack().append(new)
        if new is not None:
            with self._lock:
                self._alive.add(new)

    def end(self) -> Pass | None:
        """Undo the last `begin` and return its pass."""
        stack = self._stack()
        return stack.pop() if stack else None

    def running(self) -> Pass | None:
        """Return this thread's current pass."""
        return next((found for found in reversed(self._stack()) if found is not None), None)

    def of_node(self, node: Any, layer: int) -> Pass | None:
        """Return the pass of a graph node that recomputes a layer; None if it is unknown."""
        noted = self._noted(node)
        if noted is not None:
            return noted
        with self._lock:
            unfinished = [one for one in self._alive if layer in one.plans.used and not one.over]
        found = [one for one in unfinished if node._sequence_nr() >= one.first_node]
        return found[0] if len(found) == 1 else None

    def note(self, outputs: Any, of: Pass) -> None:
        """Record a pass on the nodes that created these outputs, back to its first node."""
        waiting: list[Any] = [t.grad_fn for t in tensors_of(outputs) if t.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            notes: dict[Any, Any] = node.metadata
            older = node._sequence_nr() < of.first_node
            shared = node.name().endswith("AccumulateGrad")  # a parameter's node, in every pass
            if older or shared or self in notes:
                continue
            notes[self] = of
            waiting += [before for before, _ in node.next_functions if before is not None]

    def _noted(self, node: Any) -> Pass | None:
        """Return the pass recorded on a node, or on the nearest node among its inputs."""
        waiting, seen = [node], {node}
        for node in waiting:
            found: Pass | None = node.metadata.get(self)
            if found is not None:
                return found
            new = {before for before, _ in node.next_functions if before is not None} - seen
            seen |= new
            waiting += new
        return None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a model's outputs, also inside tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def backward_node() -> Any:
    """Return the running autograd node, None outside backward; a layer that runs in backward is recomputed."""
    return torch._C._current_autograd_node()
