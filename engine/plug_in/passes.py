"""Which forward pass a layer belongs to: of a call, what its thread runs; of recomputation in backward, what its graph
says.

Backward runs in threads of autograd's own on a GPU, so a thread says nothing there. But the nodes of autograd's graph
have a place for notes (Node.metadata). Every pass is noted on the nodes that it made, and lives as long as they do;
recomputation looks it up from the node that is being run. What has no note (the graph inside of nested recomputation, a
model that hides its outputs) is of the one pass that it can be of, or of none.
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
    """A forward pass and its backward: what layers run by."""

    plans: Plans
    dropout_seed: int
    first_node: int  # autograd numbers the nodes of a thread; those of this pass begin here
    over: bool = False  # no layer may run by it any more

    def may_be_of(self, node: Any, layer: int) -> bool:
        """Could this node of the graph, which recomputes the layer, be of this pass?"""
        used = layer in self.plans.used and not self.over
        return used and bool(node._sequence_nr() >= self.first_node)


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
        """Let this thread's layers run by a pass; None: by the one before, as if this call had not been."""
        self._stack().append(new)
        if new is not None:
            with self._lock:
                self._alive.add(new)

    def end(self) -> Pass | None:
        """Go back to what was before the last `begin`, and give what it began."""
        stack = self._stack()
        return stack.pop() if stack else None

    def running(self) -> Pass | None:
        """Give what this thread's layers run by."""
        return next((found for found in reversed(self._stack()) if found is not None), None)

    def of_node(self, node: Any, layer: int) -> Pass | None:
        """Give the pass whose graph has a node that recomputes a layer; None if it cannot be known."""
        noted = self._noted(node)
        if noted is not None:
            return noted
        with self._lock:
            found = [one for one in self._alive if one.may_be_of(node, layer)]
        return found[0] if len(found) == 1 else None

    def note(self, outputs: Any, of: Pass) -> None:
        """Note a pass on the nodes that made these outputs, back to its first."""
        waiting: list[Any] = [t.grad_fn for t in tensors_of(outputs) if t.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            notes: dict[Any, Any] = node.metadata
            older = node._sequence_nr() < of.first_node
            shared = node.name().endswith("AccumulateGrad")  # a parameter's: of all passes
            if older or shared or self in notes:
                continue
            notes[self] = of
            waiting += [before for before, _ in node.next_functions if before is not None]

    def _noted(self, node: Any) -> Pass | None:
        """Give the note on a node, or the next one on the way to what it was made from."""
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
    """Yield the tensors of a model's outputs: in tuples, lists, mappings and dataclasses."""
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
    """The autograd node that is being run, None outside of backward: what runs a layer there is recomputation."""
    return torch._C._current_autograd_node()
