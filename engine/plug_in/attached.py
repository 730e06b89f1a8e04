"""The hooks that `attach` registers on the user's model: plans are made before a call and dropped after it."""

import inspect
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foreroute.engine.plug_in.call_arguments import Call, CallArguments

_PREPARE = "prepare_inputs_for_generation"  # of a model of transformers


class CallHandler(Protocol):
    """The interface of PlannedExperts that the hooks of a model call."""

    def begin_call(self, told: "CallArguments", call: "Call") -> None:
        """Plan a call before it runs."""

    def end_call(self, outputs: Any) -> None:
        """End a call."""


class GeneratedIds:
    """Stands in for a model's prepare_inputs_for_generation, and keeps all ids so far for the call that follows.

    transformers' generate calls it before each forward pass with the whole texts, of which the model then gets the ids
    that its cache does not have; also where it has reordered or cropped the cache.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.attached = model, 0
        self.ids: Any = None

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the model's own method, which generate reads."""
        own = inspect.signature(getattr(type(self.model), _PREPARE))
        return own.replace(parameters=list(own.parameters.values())[1:])

    def __call__(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep the ids and call the model's own method."""
        self.ids = input_ids
        return getattr(type(self.model), _PREPARE)(self.model, input_ids, *args, **kwargs)

    def complete(self, told: CallArguments, call: Call) -> CallArguments:
        """Return the arguments with the ids left of the call's, if the ids kept are those of this call."""
        ids, kept = call.find(told.ids), self.ids
        if told.left is not None or not isinstance(ids, Tensor) or not isinstance(kept, Tensor):
            return told
        length = ids.shape[-1]
        if ids.dim() != 2 or kept.dim() != 2 or not torch.equal(kept[:, -length:], ids):
            return told
        caches = [value for value in call.by_name.values() if hasattr(value, "get_seq_length")]
        if any(int(cache.get_seq_length()) != kept.shape[1] - length for cache in caches):
            return told  # a chunk of a prompt, without the ids before it
        return replace(told, left=lambda *_, **__: kept[:, : kept.shape[1] - length])

    def remove(self) -> None:
        """Restore the model's own method when the last attachment is removed."""
        self.attached -= 1
        if not self.attached:
            self.model.__dict__.pop(_PREPARE, None)


def generated_ids(model: nn.Module) -> GeneratedIds | None:
    """Make a model keep its ids in generation; None for a model that does not generate as transformers does."""
    found = model.__dict__.get(_PREPARE)
    if not isinstance(found, GeneratedIds):
        if found is not None or not hasattr(type(model), _PREPARE):
            return None
        found = model.__dict__[_PREPARE] = GeneratedIds(model)
    found.attached += 1
    return found


@dataclass(frozen=True, slots=True)
class Before:
    """The hook before a call; an object, so that in a copy of the model it plans for the copy."""

    experts: CallHandler
    told: CallArguments
    generated: GeneratedIds | None = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan the call."""
        call = Call(model, args, kwargs)
        told = self.told if self.generated is None else self.generated.complete(self.told, call)
        self.experts.begin_call(told, call)


@dataclass(frozen=True, slots=True)
class After:
    """The hook after a call, also after one that raised."""

    experts: CallHandler
    generated: GeneratedIds | None = None

    def __call__(self, _: nn.Module, __: Any, outputs: Any) -> None:
        """End the pass."""
        if self.generated is not None:
            self.generated.ids = None
        self.experts.end_call(outputs)


class Removable(Protocol):
    """Something that attach has changed in a model."""

    def remove(self) -> None:
        """Undo it."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """The hooks that attach has registered on a model."""

    hooks: tuple[Removable, ...]

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()
