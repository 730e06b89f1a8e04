"""Checks of a configuration's numbers, each a line that names the option."""

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


def _option(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
