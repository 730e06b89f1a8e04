"""Reads ids and their context from the arguments of a call of the user's model, and refuses incomplete calls.

A plan needs every id's n-gram. It therefore needs the ids left of a continued text, the start of each text, and the
padding. A call is refused if its arguments show such context and `attach` does not name them: its plan would be wrong.

Letters: B sequences, Q ids of each, C = ngram - 1 ids left of them.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foreroute.engine.errors import require
from foreroute.engine.plug_in.plans import Sequences

Place = int | str
"""An argument of a call: its position among the positional arguments, or its keyword."""
Layout = Literal["BQ", "QB", "BQ->QB"]

_LAYOUTS = ("BQ", "QB", "BQ->QB")
_POSITIONS = ("position_ids", "positions", "cache_position", "input_pos")
_DOCUMENTS = ("documents", "document_ids", "doc_ids", "seq_idx")


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The arguments of a model's call that hold ids and context; see PlannedExperts.attach."""

    ids: Place = 0
    left: Place | Callable[..., Tensor | None] | None = None
    mask: Place | None = None
    positions: Place | None = None
    documents: Place | None = None
    layout: Layout | None = None
    routes: Place | None = None
    route_weights: Place | None = None
    places: Place | None = None

    def __post_init__(self) -> None:
        require(self.layout in (None, *_LAYOUTS), f"layout={self.layout!r}: must be one of {', '.join(_LAYOUTS)}")

    def read(self, call: "Call", context: int, side: str = "", *, parts: bool = False) -> Sequences:
        """Return the ids of a call and their context.

        Args:
            context: number of ids left of each sequence (C).
            side: "encoder" or "decoder" if the layers are in one.
            parts: the sequences are parts, of which other ranks know the ids left of them.

        Raises:
            RuntimeError: the call lacks a named argument.
            UserError: an argument has a wrong type or shape, or the call does not determine every n-gram.
        """
        ids = self._turned(call, "ids", self.ids)
        require(ids.dim() >= 2, f"{call.name(self.ids)} of shape {list(ids.shape)}: must be [sequences, length]")
        length = ids.shape[-1]
        sizes = tuple(ids.shape[-2:])
        require(
            self.layout is not None or sizes[0] != sizes[1] or length == 1,
            f"{call.name(self.ids)} is {list(sizes)}: equal sizes do not show which dimension has the sequences; use"
            " attach(model, layout='BQ'), or 'QB' for [length, sequences]",
        )
        mask = self._beside(call, "mask", self.mask, ids)
        positions = self._beside(call, "positions", self.positions, ids)
        documents = self._beside(call, "documents", self.documents, ids)
        left = self._left(call, ids, context)
        _refuse_other_side(self, call, side)
        real = None if mask is None else mask[..., -length:] != 0
        known = self.left is not None or parts
        _refuse_undeclared(self, call, torch.ones_like(ids) > 0 if real is None else real, left=known)
        require(
            not parts or positions is None,
            f"{call.name(self.positions)} of parts of sequences: attach(model, documents=..) must name their documents",
        )
        if mask is not None:
            left = self._under_mask(call, mask, left, length, context)
        if positions is not None:
            left, runs = _by_positions(call.name(self.positions), positions, left, real, context)
            documents = runs if documents is None else documents
        # Undeclared positions, already checked, show the start of a text.
        at_start = positions is not None or (real is None and any(call.named(_POSITIONS)))
        require(
            left is not None or length > context or at_start or parts,
            f"{call.name(self.ids)} has {length} ids per sequence, fewer than an n-gram of {context + 1}: if they"
            " continue a text, attach(model, left=..) must name the ids left of them; if not, pass positions or a left"
            " context of 0",
        )
        first = self.layout in ("QB", "BQ->QB")
        routes, weights = (
            None if place is None else self._routes(call, name, place)
            for name, place in (("routes", self.routes), ("route_weights", self.route_weights))
        )
        places = None if self.places is None else call.tensor(self.places, "places")
        return Sequences(ids, left, real, documents, first, routes, weights, places)

    def _routes(self, call: "Call", name: str, place: Place) -> Tensor:
        value = call.tensor(place, name)
        return value.transpose(0, 1) if self.layout == "QB" and value.dim() >= 2 else value

    def _under_mask(self, call: "Call", mask: Tensor, left: Tensor | None, length: int, context: int) -> Tensor | None:
        """Return the left context with its padding set to 0; the mask may be [B, M + Q] and cover it."""
        older = mask[..., :-length] != 0
        require(
            left is not None or not bool(older.any()),
            f"{call.name(self.mask)} is longer than ids, so ids continue a text: attach(model, left=..) must name the"
            " ids left of them",
        )
        return left if left is None or not older.shape[-1] else left * _last(older, context)

    def _turned(self, call: "Call", name: str, place: Place) -> Tensor:
        value = call.tensor(place, name)
        return value.transpose(-1, -2) if self.layout == "QB" and value.dim() >= 2 else value

    def _beside(self, call: "Call", name: str, place: Place | None, ids: Tensor) -> Tensor | None:
        """Return a declared argument as [B, Q], a mask that covers a cache as [B, M + Q]; None if not declared."""
        if place is None or (name == "mask" and call.find(place) is None):  # a call without a mask has no padding
            return None
        value = self._turned(call, name, place)
        if value.dim() == 1 or (value.dim() == 2 and value.shape[0] == 1):
            value = value.expand(ids.shape[-2], -1)
        longer = name == "mask" and value.shape[-1:] > ids.shape[-1:]
        fits = value.shape[:-1] == ids.shape[:-1] and (longer or value.shape == ids.shape)
        require(fits, f"{call.name(place)} of shape {list(value.shape)}: must be {list(ids.shape)} as ids, for {name}")
        return value

    def _left(self, call: "Call", ids: Tensor, context: int) -> Tensor | None:
        """Return the left context [B, C]: the last C given ids, after zeros if there are fewer."""
        if self.left is None:
            return None
        if callable(self.left):
            name, value = "the result of left(..)", self.left(*call.args, **call.kwargs)
        else:
            name, value = call.name(self.left), call.value(self.left, "left")
        if value is None:
            return ids.new_zeros((*ids.shape[:-1], context))
        require(
            isinstance(value, Tensor) and value.shape[:-1] == ids.shape[:-1],
            f"{name} is {kind_of(value)}: must be the ids [{', '.join(map(str, ids.shape[:-1]))}, any number] of the"
            " left context",
        )
        return _last(value.to(ids.device), context)


class Call:
    """The arguments of one call of a model."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.by_name = {**dict(zip(_argument_names(model), args, strict=False)), **kwargs}
        self._given: dict[Place, Any] = dict(enumerate(args))
        self._given.update(self.by_name)

    def name(self, place: Place | None) -> str:
        """Return an argument's name for messages."""
        return f"argument {place!r} of the model's call"

    def find(self, place: Place) -> Any:
        """Return an argument's value; None if it is not given."""
        return self._given.get(place)

    def value(self, place: Place, what: str) -> Any:
        """Return an argument's value."""
        if place not in self._given:
            raise RuntimeError(
                f"the model was called without argument {place!r}, which must hold the {what}: see attach"
            )
        return self._given[place]

    def tensor(self, place: Place, what: str) -> Tensor:
        """Return an argument that must be a tensor."""
        value = self.value(place, what)
        require(
            isinstance(value, Tensor),
            f"{self.name(place)} is {kind_of(value)}: must be a tensor of {what} [sequences, length]; name the right"
            f" argument with attach(model, {what}=..)",
        )
        assert isinstance(value, Tensor)
        return value

    def named(self, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        """Yield the arguments of these names that are integer tensors."""
        for name in names:
            value = self.by_name.get(name)
            if isinstance(value, Tensor) and not value.is_floating_point() and value.numel():
                yield name, value


def _argument_names(model: nn.Module) -> list[str]:
    """Return the names of the positional arguments, also for a model wrapped by DeepSpeed or PyTorch."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    inner = getattr(model, "module", None)
    return _argument_names(inner) if not names and isinstance(inner, nn.Module) else names


def _refuse_other_side(told: CallArguments, call: Call, side: str) -> None:
    """Refuse the encoder's ids for layers in a decoder, and the decoder's ids for layers in an encoder."""
    theirs = call.by_name.get("decoder_input_ids")
    is_theirs = theirs is call.value(told.ids, "ids")
    require(
        theirs is None or not side or is_theirs == (side == "decoder"),
        f"{call.name(told.ids)} holds the ids of the {'decoder' if is_theirs else 'encoder'}, but the layers are in the"
        f" {side}: attach(model, ids=..) must name the ids of the {side}",
    )


def _refuse_undeclared(told: CallArguments, call: Call, real: Tensor, *, left: bool) -> None:
    """Refuse a call with arguments that change n-grams and that attach does not name.

    Args:
        real: bool [B, Q], False for padding.
        left: the ids left of the sequences are known.
    """
    for name, value in call.by_name.items():
        cache = ("past" in name or "cache" in name) and not isinstance(value, Tensor | bool | int | str)
        require(
            not cache or left or _is_empty(value),
            f"argument {name!r} of the model's call holds a cache of earlier ids, so ids continue a text: "
            "attach(model, left=..) must name the ids left of them",
        )
        masks = name == "attention_mask" or name.endswith("padding_mask")
        require(
            not masks
            or told.mask is not None
            or not isinstance(value, Tensor)
            or value.numel() == 0
            or (value.dim() <= 2 and bool((value == value.flatten()[0]).all())),
            f"argument {name!r} of the model's call masks some ids: use attach(model, mask={name!r}) if it is"
            " [sequences, length] and 0 for padding",
        )
    known = told.documents is not None or told.positions is not None
    for name, value in call.named(_DOCUMENTS):
        constant = bool((value == value[..., :1]).all())
        require(
            constant or known,
            f"argument {name!r} of the model's call has several documents in a sequence: use attach(model,"
            f" documents={name!r})",
        )
    for name, value in () if known else call.named(_POSITIONS):
        rows = value.T if told.layout == "QB" and value.dim() == 2 else value
        if rows.shape[-1] == real.shape[-1] and rows.dim() <= real.dim():
            _refuse_positions(name, rows.expand_as(real), real, left=left)


def _refuse_positions(name: str, positions: Tensor, real: Tensor, *, left: bool) -> None:
    """Refuse undeclared positions [B, Q] that restart within a sequence, or that continue an unknown text."""
    steps = (positions[..., 1:] - positions[..., :-1] == 1) | ~real[..., 1:] | ~real[..., :-1]
    require(
        bool(steps.all()),
        f"argument {name!r} of the model's call restarts within a sequence: use attach(model, positions={name!r})",
    )
    first = positions.gather(-1, real.int().argmax(-1, keepdim=True)) * real.any(-1, keepdim=True)
    require(
        left or not bool(first.any()),
        f"argument {name!r} of the model's call does not begin with 0, so ids continue a text: "
        "attach(model, left=..) must name the ids left of them",
    )


def _by_positions(
    name: str, positions: Tensor, left: Tensor | None, real: Tensor | None, context: int
) -> tuple[Tensor | None, Tensor]:
    """Return the left context of each sequence's first text, and a number for each text in it [B, Q].

    Raises:
        UserError: a sequence continues a text, and its left context is unknown.
    """
    real = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    first = positions.gather(-1, real.int().argmax(-1, keepdim=True))
    first = first * real.any(-1, keepdim=True)  # 0 for a sequence of padding alone
    require(
        left is not None or not bool(first.any()),
        f"{name} begins with {int(first.max())}, so ids continue a text: attach(model, left=..) must name the ids left"
        " of them",
    )
    breaks = torch.zeros_like(positions)
    breaks[..., 1:] = (positions[..., 1:] != positions[..., :-1] + 1) & real[..., 1:]
    if left is not None:
        places = torch.arange(context, 0, -1, device=left.device)  # distance to the left
        left = left * (places <= first.to(left.device))
    return left, breaks.cumsum(-1)


def _last(value: Tensor, size: int) -> Tensor:
    """Return the last `size` columns, after zeros if there are fewer."""
    missing = value.new_zeros((*value.shape[:-1], max(0, size - value.shape[-1])))
    both = torch.cat((missing, value), dim=-1)
    return both[..., both.shape[-1] - size :]


def _is_empty(cache: Any) -> bool:
    if cache is None:
        return True
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length()) == 0
    return hasattr(cache, "__len__") and len(cache) == 0


def kind_of(value: Any) -> str:
    """Describe a value for the message that a tensor was expected."""
    if isinstance(value, Tensor):
        return f"of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(str, list(value)[:9]))}"
    return "None" if value is None else f"a {type(value).__name__}"
