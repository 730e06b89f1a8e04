"""A routing method's description of itself: its options (`moe.options.NAME`) and its card in docs/routers.md."""

from dataclasses import fields
from typing import NamedTuple, TypeVar

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import check
from foreroute.engine.errors import require

Options = TypeVar("Options")


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
    found = kind(**moe.options)
    check("moe.options", found)
    return found
