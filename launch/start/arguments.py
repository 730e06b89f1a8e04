"""A person's command line, translated for Hydra: each NAME=VALUE is written in Hydra's grammar, by the option's type.

Text needs no quotes: brackets, =, commas, blanks and letters of any alphabet are part of it, and what looks like a
number stays text. One value stands for a list of one. Quotes around a whole value still work. In a sweep commas
separate values, unless they are inside quotes or brackets. What cannot be meant is a UserError that names the option
and what works.

The options come from the program's dataclasses, the groups from its file in conf/. Knows nothing of Hydra but its
grammar.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from foreroute.engine.errors import UserError, require
from foreroute.launch.start.help import allowed, choices_of, groups_of, not_none

_WHOLE_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_SWEPT = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)
_CAST = re.compile(r"(int|float|str|bool)\(.*\)", re.DOTALL)
_PLAIN = re.compile(r"[\w./-]+", re.ASCII)
_BOOLS = dict.fromkeys(("true", "yes", "on", "y", "1"), "true")
_BOOLS |= dict.fromkeys(("false", "no", "off", "n", "0"), "false")
_SHOWN = 80  # characters of a value in a line


@dataclass(frozen=True, slots=True)
class Known:
    """The options and groups of a program."""

    conf: Path
    options: dict[str, Any]  # full name -> type
    sections: list[str]
    groups: list[str]
    needed: list[str]  # options without a default

    def choices(self) -> dict[str, list[str]]:
        """Return the choices of each group that conf/ has."""
        return {group: list(choices_of(self.conf / group)) for group in self.groups}


def known_to(conf: Path, program: str, schema: type) -> Known:
    """Collect the options and groups of `program`."""
    options: dict[str, Any] = {}
    sections: list[str] = []
    for name, kind in _walk(schema, ""):
        if is_dataclass(not_none(kind)):
            sections.append(name)
        else:
            options[name] = kind
    needed = [f.name for f in fields(schema) if f.default is MISSING and f.default_factory is MISSING]
    file = conf / f"{program}.yaml"
    return Known(conf, options, sections, groups_of(file) if file.exists() else [], needed)


def _walk(schema: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(schema)
    for field in fields(schema):
        kind = hints[field.name]
        yield prefix + field.name, kind
        if is_dataclass(not_none(kind)):
            yield from _walk(not_none(kind), f"{prefix}{field.name}.")


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return whether options choose a sweep without -m."""
    chosen = [a.partition("=")[2] for a in arguments if a.startswith("sweep=")]
    return any(value not in ("", "null") for value in chosen) or "hydra.mode=MULTIRUN" in arguments


def ready(arguments: Sequence[str], known: Known, *, sweep: bool = False) -> list[str]:
    """Write options as Hydra reads them.

    Args:
        sweep: commas separate values that are each run.

    Raises:
        UserError: an option that is unknown, has no name or no value, or a value that it does not take.
    """
    following = (*arguments[1:], "VALUE")
    return [_ready(*pair, known, sweep) for pair in zip(arguments, following, strict=False)]


def swept(ready_arguments: Sequence[str]) -> set[str]:
    """Return the names of those options, as `ready` returns them, that have several values."""
    pairs = (argument.lstrip("+").partition("=") for argument in ready_arguments)
    return {name for name, _, value in pairs if _SWEPT.fullmatch(value) or len(_split(value)) > 1}


def _ready(argument: str, following: str, known: Known, sweep: bool) -> str:
    name, equals, value = argument.partition("=")
    name = name.strip().lstrip("+")  # every option there is has a value already: nothing is added
    deleted = name.removeprefix("~")
    if name.startswith(("hydra.", "hydra/")) or "@" in name or deleted.startswith("hydra"):
        return argument  # for those who know Hydra
    if deleted != name:
        require(
            deleted in known.groups, f"{_short(argument)}: only a group's choice can be left out, such as ~experiment"
        )
        return argument
    if not equals:
        raise UserError(_nameless(argument, "VALUE" if "=" in following else following, known))
    if name in known.groups:
        return f"{name}={_choice(name, value, sweep)}"
    if name in known.sections:
        options = ", ".join(o for o in known.options if o.startswith(f"{name}."))
        require(value.startswith("{"), f"{name}={_short(value)}: is a section; its options are {options}")
        return argument
    if get_origin(known.options.get(name.rpartition(".")[0])) is dict:
        return f"++{name}={_of_any_type(name, value, known, sweep)}"  # the router's own; only it knows their names
    if name not in known.options:
        raise UserError(_unknown(name, value, known))
    if _SWEPT.fullmatch(value) and (sweep or not _takes_text(known.options[name])):
        require(sweep, f"{name}={_short(value)}: several values need -m, which runs each")
        return f"{name}={value}"
    adds = "++" if get_origin(known.options[name]) is dict else ""
    return f"{adds}{name}={_value(name, value, known, sweep)}"


def _choice(name: str, value: str, sweep: bool) -> str:
    if _SWEPT.fullmatch(value):
        return value
    parts = _split(value)
    require(value != "", f"{name}=: has no value; --help lists the choices")
    given = unquoted(value)
    is_path = name == "corpus" and Path(given).is_absolute() | Path(given).exists()
    require(not is_path, f"corpus={_short(given)}: takes a choice; write corpus=file corpus.path={given}")
    is_class = name == "router" and ":" in given
    require(not is_class, f"router={_short(given)}: takes a choice; write moe.router={given}")
    require(not value.startswith("["), f"{name}={_short(value)}: takes one choice, without brackets")
    require(sweep or len(parts) == 1, f"{name}={_short(value)}: takes one choice; -m runs each")
    return ",".join(p if _PLAIN.fullmatch(p) or _WHOLE_QUOTED.fullmatch(p) else quote(p) for p in parts)


def _value(name: str, value: str, known: Known, sweep: bool) -> str:
    kind = known.options[name]
    inner = not_none(kind)
    is_list = get_origin(inner) is list
    item = get_args(inner)[0] if is_list else kind

    def one(part: str) -> str:
        if inner is not kind and _is_null(part):
            return "null"
        inside = part.strip()
        bare = not (inside.startswith("[") and inside.endswith("]"))
        if bare or not (is_list or inner is Any):
            return f"[{scalar(part)}]" if is_list else scalar(part)
        parts = _split(inside[1:-1]) if inside[1:-1].strip() else []
        return f"[{','.join(map(scalar, parts))}]"

    def scalar(part: str) -> str:
        return _text(part, known) if _takes_text(item) else _scalar(name, value, part, item)

    if is_list and value.count("[") != value.count("]"):
        raise UserError(f"{name}={_short(value)}: a bracket is missing; must be a {allowed(kind)}, such as [1,2]")
    if is_list and not sweep and not value.strip().startswith("["):
        value_parts = [value] if _is_null(value) else [f"[{value}]"]
    elif sweep or not _takes_text(kind):
        value_parts = _split(value)
    else:
        value_parts = [value]
    if len(value_parts) > 1 and not sweep:
        raise UserError(f"{name}={_short(value)}: must be {_words(kind)}; several values need -m, which runs each")
    return ",".join(map(one, value_parts))


def _of_any_type(name: str, value: str, known: Known, sweep: bool) -> str:
    """Write a value whose type is not known here: a number, true, false, null or a list as that, all else as text."""
    if _SWEPT.fullmatch(value) and sweep:
        return value
    parts = _split(value)
    require(
        sweep or len(parts) == 1, f"{name}={_short(value)}: takes one value; several values need -m, which runs each"
    )
    return ",".join(part if _is_typed(part) else _text(part, known) for part in parts)


def _is_typed(value: str) -> bool:
    text = value.strip()
    is_list = text.startswith("[") and text.endswith("]")
    return is_list or text.lower() in ("true", "false", "null") or _number(text) is not None


def _takes_text(kind: Any) -> bool:
    return not_none(kind) in (str, Any)


def _is_null(value: str) -> bool:
    return value.strip().lower() == "null"


def _scalar(name: str, whole: str, value: str, kind: Any) -> str:
    """Check a number, a truth value or a choice."""
    plain, inner = unquoted(value.strip()), not_none(kind)
    if "${" in plain or _CAST.fullmatch(plain):
        return value
    listed = re.fullmatch(r"\[([^,\[\]]*)\]", plain)
    if listed:
        raise UserError(f"{name}={_short(whole)}: takes one value, no list: {name}={listed[1]}")
    hint = ""
    if inner is int:
        found, hint = _whole_number(plain)
    elif inner is float:
        found = _number(plain)
    elif inner is bool:
        found = _BOOLS.get(plain.lower())
    elif isinstance(inner, type) and issubclass(inner, Enum):
        found = plain if plain in inner.__members__ else None
        close = get_close_matches(plain.lower(), inner.__members__, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
    else:
        return value
    if found is None:
        given = _short(value.strip()) + (f" in {_short(whole)}" if whole != value else "")
        raise UserError(f"{name}={given}: must be {_words(kind)}{hint}")
    return found


def _words(kind: Any) -> str:
    """Describe the values that an option takes, as the end of a sentence."""
    article = "a " if not_none(kind) is int else "a finite " if not_none(kind) is float else ""
    return article + allowed(kind)


def _whole_number(text: str) -> tuple[str | None, str]:
    try:
        return str(int(text)), ""
    except ValueError:
        number = _number(text)
    if number is None or float(number) != int(float(number)):
        return None, ""
    return None, f", written {int(float(number))}" if abs(float(number)) < 1e18 else ""


def _number(text: str) -> str | None:
    """Return the text if it is a finite number."""
    try:
        return text if math.isfinite(float(text)) else None
    except ValueError:
        return None


def _text(value: str, known: Known) -> str:
    if _WHOLE_QUOTED.fullmatch(value.strip()):
        return value.strip()
    return quote(_without_interpolation(value, known))


def _without_interpolation(text: str, known: Known) -> str:
    """Escape ${X}, unless X is an option or one of OmegaConf's resolvers."""

    def literal(found: re.Match[str]) -> str:
        name = found["name"]
        if name is not None and (name in known.options or name.startswith(("oc.", "hydra:"))):
            return found[0]
        return found["slashes"] * 2 + "\\${"

    return re.sub(r"(?P<slashes>\\*)\$\{(?=(?P<name>[\w.]+(?::[\w.,/ -]*)?)\})?", literal, text)


def quote(text: str) -> str:
    """Quote a text so that Hydra reads it as one value, whatever is in it."""
    inside = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + (r"\'" if m[2] else ""), text)
    return f"'{inside}'"


def unquoted(value: str) -> str:
    """Return the text that a value stands for; the value may be quoted."""
    if not _WHOLE_QUOTED.fullmatch(value):
        return value
    return re.sub(rf"(\\*)({value[0]}|\Z)", lambda m: m[1][: len(m[1]) // 2] + m[2], value[1:-1])


def _split(value: str) -> list[str]:
    """Split at the commas that are not inside quotes or brackets; a bracket that is never closed counts as a letter."""
    found, part, depth, place = [], "", 0, 0
    closes = sum(value.count(c) for c in ")]}")
    while place < len(value):
        whole = None if part.strip() else _WHOLE_QUOTED.match(value, place)
        if whole and re.match(r"\s*(,|[\])}]|\Z)", value[whole.end() :]):
            part, place = part + whole[0], whole.end()
            continue
        letter = value[place]
        depth = max(0, depth + (letter in "([{" and closes > 0) - (letter in ")]}"))
        if letter == "," and depth == 0:
            found.append(part.strip())
            part = ""
        else:
            part += letter
        place += 1
    return [*found, part.strip() if found else part]


def _nameless(argument: str, following: str, known: Known) -> str:
    """Explain the error of an argument that has no `=`."""
    shown = _short(argument)
    for group, choices in known.choices().items():
        if argument in choices:
            return f"{shown}: has no name; write {group}={argument}"
    close = _close(argument, known)
    if argument in known.options or argument in known.groups:
        return f"{shown}: has no value; write {argument}={following}, without blanks"
    run = "run" if "run" in known.options else next(iter(known.needed), None)
    if run is not None:
        return f"{shown}: has no name; write {run}={argument}"
    if Path(argument).is_file() and "corpus.path" in known.options:
        return f"{shown}: has no name; write corpus=file corpus.path={argument}"
    for group, choices in known.choices().items():
        for choice in get_close_matches(argument, choices, n=1):
            return f"{shown}: has no name; did you mean {group}={choice}?"
    hint = f"; did you mean {close[0]}=VALUE?" if close else ""
    return f"{shown}: options are NAME=VALUE, and --help lists them{hint}"


def _unknown(name: str, value: str, known: Known) -> str:
    """Explain the error of an option that does not exist."""
    close = _close(name, known)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    section = name.rpartition(".")[0]
    start = f"{section}." if section in known.sections else ""
    inside = [o.removeprefix(start) for o in (*known.groups, *known.sections, *known.options) if o.startswith(start)]
    own = dict.fromkeys(o for o in inside if "." not in o)
    return f"{name}={_short(value)}: no such option; {hint}allowed: {', '.join(own)}"


def _close(name: str, known: Known) -> list[str]:
    """Return names of options and groups like this one: those that end with it, or the nearest by spelling."""
    names = [*known.groups, *known.options]
    name = name.replace("-", "_")
    last = name.rpartition(".")[2]
    same = [option for option in names if option.rpartition(".")[2] == last]
    if same:
        return same
    found = get_close_matches(name, names, n=1, cutoff=0.75)
    lasts = get_close_matches(last, {n.rpartition(".")[2] for n in names}, n=1, cutoff=0.75)
    return found or [n for n in names if n.rpartition(".")[2] in lasts]


def for_flag(flag: str, following: str | None, known: Known) -> str:
    """Explain the error of a flag that does not exist, such as --experiment or --lr=0.1."""
    name, _, value = flag.lstrip("-").partition("=")
    value = value or (following if following and not following.startswith("-") and "=" not in following else "")
    close = _close(name, known)
    hint = f"; did you mean {close[0]}={value or 'VALUE'}?" if close else ""
    return f"{flag}: no such flag; options are NAME=VALUE, and --help lists them{hint}"


def choice_hint(conf: Path, group: str, choice: str) -> str:
    """Suggest the choice of a group that was perhaps meant; "" if none is like it."""
    names = list(choices_of(conf / group)) if (conf / group).is_dir() else []
    stem = Path(choice).stem
    ends = [n for n in names if n.rpartition("/")[2] in (choice, stem)]
    close = ends or get_close_matches(choice, names, n=2)
    return f"; did you mean {group}={f' or {group}='.join(close)}?" if close else ""


def _short(text: str) -> str:
    """Return a value as a line shows it."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
