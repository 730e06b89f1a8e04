"""Checks of a configuration, each a line that names the option."""

from dataclasses import fields
from enum import Enum
from typing import Any

from foreroute.engine.errors import require


def at_least(section: str, config: object, **minimum: float) -> None:
    """Require options of a section ("": of a program) to be at least so large."""
    for name, low in minimum.items():
        value = getattr(config, name)
        require(value >= low, f"{_option(section, name)}={value}: must be at least {low}")


def fraction(section: str, config: object, *names: str) -> None:
    """Require options of a section ("": of a program) to be in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"{_option(section, name)}={value}: must be in [0, 1)")


def choices(section: str, config: Any) -> None:
    """Let a choice be given by its name, as in `MoEConfig(router="frozen")`, and require one that there is."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(field.default, Enum) and not isinstance(value, Enum):
            names = type(field.default).__members__
            words = f"{_option(section, field.name)}={value}: must be one of {', '.join(names)}"
            require(isinstance(value, str) and value in names, words)
            setattr(config, field.name, names[value])


def _option(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
