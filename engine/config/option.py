"""An option's default, help text and bounds, declared once; the check at start-up and `--help` read the same field.

They are metadata of the dataclass field, under "help" as in other command lines made of dataclasses, because a string
below a field exists in the source alone.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from math import isfinite
from typing import Any, TypeVar

from foreroute.engine.errors import require

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The values that a number may have; None: no such bound."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        """Return whether a number is within the bounds and finite."""
        return (
            isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Return the bounds as the end of "must be ..."."""
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        if low is None or high is None:
            return self.words
        if self.at_least is not None and self.at_most is not None:
            return f"in {low} .. {high}"
        return f"in {'(' if self.at_least is None else '['}{low}, {high}{')' if self.at_most is None else ']'}"

    @property
    def words(self) -> str:
        """Return each bound in words."""
        named = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return ", ".join(f"{word} {value}" for word, value in named.items() if value is not None)


def option(default: T, text: str, **bounds: float) -> T:
    """Return a dataclass field.

    Args:
        default: a list or dict is copied for each object.
        text: what the option means, with its unit and the effect of a larger value.
        bounds: fields of Bounds, for a number or one that may be None.
    """
    metadata = {"help": text, "bounds": Bounds(**bounds) if bounds else None}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(text: str) -> Any:
    """Return a dataclass field without a default."""
    return field(default=MISSING, metadata={"help": text})


def option_names(**names_by_section: Sequence[str]) -> tuple[str, ...]:
    """Return the full names of options: data=("start",) gives "data.start"."""
    return tuple(f"{section}.{name}" for section, names in names_by_section.items() for name in names)


def by_full_name(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return options by their full names: {"data": {"start": 0.5}} gives {"data.start": 0.5}."""
    return {f"{section}.{name}": value for section, options in sections.items() for name, value in options.items()}


def check(section: str, config: Any) -> None:
    """Turn names into choices, as in `MoEConfig(router="frozen")`, and check choices and bounds.

    Args:
        section: name of the section; "" for a program's own options.

    Raises:
        UserError: the first option with a value that is not allowed.
    """
    for item in fields(config):
        name, value = f"{section}.{item.name}" if section else item.name, getattr(config, item.name)
        if isinstance(item.default, Enum) and not isinstance(value, Enum):
            choices = type(item.default).__members__
            words = f"{name}={value}: must be one of {', '.join(choices)}"
            require(isinstance(value, str) and value in choices, words)
            setattr(config, item.name, choices[value])
        bounds = item.metadata.get("bounds")
        require(bounds is None or value is None or value in bounds, f"{name}={value}: must be {bounds}")
