"""A routing method's description of itself: its options (`moe.options.NAME`) and its card in docs/routers.md."""

from dataclasses import fields
from enum import Enum
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import check
from foreroute.engine.errors import require

Options = TypeVar("Options")

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "values by name",
    type(None): "null",
}


class Card(NamedTuple):
    """A method's row in docs/routers.md; each a noun phrase or sentence of plain English."""

    what: str  # how it chooses experts and weights
    source: str  # the work, with its arXiv number; "ours" for our own
    cost: str  # in a step, beside `hashed`: what it computes, exchanges, waits for
    when: str  # who would want it


def read_options(moe: MoEConfig, kind: type[Options]) -> Options:
    """Read moe.options as a dataclass whose fields are declared by engine.config.option.option.

    Raises:
        UserError: there is no such option, or it has a value that is not allowed.
    """
    names = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for name in moe.options:
        known = f"it has {', '.join(names)}" if names else "it has none"
        require(name in names, f"moe.options.{name}: no such option of moe.router={moe.router}; {known}")
    hints = get_type_hints(kind)
    for name, value in moe.options.items():
        kinds = _kinds(hints[name])
        words = " or ".join(_WORDS[one] for one in kinds if one in _WORDS)
        require(_is_of(value, kinds), f"moe.options.{name}={value}: must be {words}")
    found = kind(**moe.options)
    check("moe.options", found)
    return found


def _kinds(hint: Any) -> list[type]:
    """List the classes of a type such as int, int | None or list[int]."""
    members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return [get_origin(member) or member for member in members]


def _is_of(value: Any, kinds: list[type]) -> bool:
    """Return whether a value is of one of the classes; choices may be names, and whole numbers are numbers."""
    if any(issubclass(one, Enum) for one in kinds):
        return True  # option.check reads the name
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, tuple(kinds)) or (isinstance(value, int) and float in kinds)
