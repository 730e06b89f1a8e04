"""The text of `python -m launch.PROGRAM --help`: one screen, or all about the groups that are named after it.

It shows the comment at the head of conf/PROGRAM.yaml and of each file of a group, and
the fields of the options' dataclasses with their types, help texts and bounds (engine/config/option.py).
"""

import inspect
import re
import textwrap
from argparse import SUPPRESS, ArgumentParser, HelpFormatter
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

from foreroute.engine.errors import require

CONF = Path(__file__).resolve().parents[2] / "conf"
SCREEN_LINES, SCREEN_COLUMNS = 30, 100
"""The largest size of a help text without a group."""
_OVERVIEW_LINES = 2  # of a group in it
ALL = "all"
OPTIONS = "As they are with the choices made, and in brackets what they may be."
FLAGS = {
    "--help GROUP": "a group, a folder of its choices (experiment/study), an option (optim.lr), or all",
    "-m": "run once for each combination of values, such as moe.spread=1,2",
    "--cfg job": "print the options as they would be, and stop",
    "--version": "print the versions of foreroute and PyTorch",
    "--hydra-help": "what else Hydra can do",
}
_TYPES = {bool: "true | false", int: "whole number", float: "number", str: "text"}
_NEEDED = "???"  # OmegaConf's value of an option that has none
_SENTENCE = re.compile(r"(?<=\.)\s+(?=[A-Z`])")


@dataclass(frozen=True, slots=True)
class _Part:
    """A titled part of the help."""

    name: str  # by which it is asked for
    title: str
    meaning: str
    lines: dict[str, str]  # what is typed, and the text about it

    @property
    def has_choices(self) -> bool:
        return self.title.endswith("=CHOICE")


def help_text(
    conf: Path, program: str, schema: type, values: Mapping[str, Any], *, width: int, topics: Sequence[str] = ()
) -> str:
    """Write the help of a program: all of it where that is one screen, else its groups, each in a line.

    Args:
        conf: folder of the configuration files.
        program: name of the program, and of its file in conf.
        schema: dataclass of its options.
        values: the options as composed, as dicts and lists.
        width: columns; examples in the program's head are never broken.
        topics: groups, folders of a group's choices, and options that are shown whole; "all" is everything.

    Raises:
        UserError: there is no such topic.
    """
    file = conf / f"{program}.yaml"
    parts = [_Part(name, f"{name}=CHOICE", "", choices_of(conf / name)) for name in groups_of(file)]
    for name, meaning, options in sections(schema, values):
        parts.append(_Part(name or "options", name or "options", meaning if name else OPTIONS, options))
    parts = [*(part for part in parts if part.lines), _Part("flags", "flags", "", FLAGS)]
    head = _wrapped(head_comment(file), width)
    if topics and ALL not in topics:
        return _written([part for topic in topics for part in _about(topic, parts)], width)
    own = [part for part in parts if part.name == "options"]
    others = [part for part in parts if part.name != "options"]
    whole = f"{head}\n\n{_written(parts, width)}"
    with_own = f"{head}\n\n{_written(own, width)}\n{_overview(others, width)}"
    fitting = [text for text in (whole, with_own) if topics or len(text.splitlines()) <= SCREEN_LINES]
    return next(iter(fitting), f"{head}\n\n{_overview(parts, width)}")


def _written(parts: Sequence[_Part], width: int) -> str:
    parser = ArgumentParser(
        add_help=False,
        usage=SUPPRESS,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=32, width=width),
    )
    for part in parts:
        group = parser.add_argument_group(part.title, _escaped(part.meaning) or None)
        for label, text in part.lines.items():
            group.add_argument(label.replace("-", "_"), metavar=label, help=_escaped(text))
    return parser.format_help().lstrip()


def _overview(parts: Sequence[_Part], width: int) -> str:
    """List the groups, each in a line with its choices or the first sentence of its meaning."""
    found: dict[str, list[str]] = {}
    for part in parts:
        if part.has_choices:
            folders = Counter(name.rpartition("/")[0] for name in part.lines if "/" in name)
            alone = [name for name in part.lines if "/" not in name]
            text = f"{', '.join([*alone, *(f'{folder}/ ({num})' for folder, num in folders.items())])}."
        elif part.name == "options" or not part.meaning:
            text = ", ".join(label.partition("=")[0] for label in part.lines)
        else:
            text = _SENTENCE.split(part.meaning, maxsplit=1)[0]
        found.setdefault(part.name, []).append(text)
    column = max(map(len, found)) + 4
    lines = [_wrapped("groups: --help GROUP shows one, --help all everything", width)]
    for name, texts in found.items():
        text = re.sub(r"\bNone\b", "null", " ".join(texts))
        wrapped = textwrap.wrap(
            text,
            max(width - column, 12),
            break_long_words=False,
            break_on_hyphens=False,
            max_lines=_OVERVIEW_LINES,
            placeholder=" ...",
        )
        lines += [f"  {name}".ljust(column) + wrapped[0], *(" " * column + line for line in wrapped[1:])]
    return "\n".join([*lines, ""])


def _about(topic: str, parts: Sequence[_Part]) -> list[_Part]:
    """Return the parts of a topic; choices that lie in a folder become one line."""
    found = []
    for part in parts:
        folders = Counter(f"{part.name}/{name.rpartition('/')[0]}" for name in part.lines if "/" in name)
        if part.name == topic and part.has_choices:
            lines = {name: text for name, text in part.lines.items() if "/" not in name}
            for folder, num in folders.items():
                lines[f"{folder.removeprefix(f'{topic}/')}/NAME"] = f"{num} choices: --help {folder}"
            found.append(replace(part, lines=lines))
        elif part.name == topic:
            found.append(part)
        elif part.has_choices and topic in folders:
            start = topic.removeprefix(f"{part.name}/") + "/"
            found.append(replace(part, lines={n: text for n, text in part.lines.items() if n.startswith(start)}))
        elif not part.has_choices:
            lines = {label: text for label, text in part.lines.items() if label.partition("=")[0] == topic}
            found += [replace(part, lines=lines)] if lines else []
    names = [*dict.fromkeys(part.name for part in parts), ALL]
    options = [label.partition("=")[0] for part in parts for label in part.lines if not part.has_choices]
    close = get_close_matches(topic, [*names, *options], n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    require(bool(found), f"--help {topic}: no such group; {hint}allowed: {', '.join(names)}, or an option")
    return found


def groups_of(file: Path) -> list[str]:
    """Names of the configuration groups that a program's defaults list has."""
    defaults = yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]
    found = [next(iter(item)) for item in defaults if isinstance(item, dict)]
    return [name for name in found if not name.startswith("override ")]


def choices_of(folder: Path) -> dict[str, str]:
    """Each choice of a group and the first sentence of its file's comment."""
    found = {}
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path)):
        text = " ".join(head_comment(path).split())
        found[path.relative_to(folder).with_suffix("").as_posix()] = _SENTENCE.split(text, maxsplit=1)[0]
    return found


def head_comment(file: Path) -> str:
    """Return the comment at the head of a YAML file, without its marks and without Hydra's `@package`."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def sections(schema: type, values: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield each section of the options: its name ("" for the program's own), its meaning, and OPTION=VALUE with their
    texts."""
    hints = get_type_hints(schema)
    own, inner = {}, []
    for field in fields(schema):
        kind, value = hints[field.name], values[field.name]
        if isinstance(kind, type) and is_dataclass(kind):
            inner.append((field.name, kind, value))
            continue
        bounds = field.metadata.get("bounds")
        notes = [allowed(kind), bounds.words if bounds else "", "needed" if value == _NEEDED else ""]
        plain = not_none(kind)
        meaning = field.metadata.get("help") or (_is_enum(plain) and inspect.getdoc(plain)) or ""
        prefix = f"{name}." if name else ""
        own[f"{prefix}{field.name}={value_text(value)}"] = f"{meaning} [{', '.join(filter(None, notes))}]".strip()
    yield name, inspect.getdoc(schema) or "", own
    for section, kind, value in inner:
        yield from sections(kind, value, section)


def _escaped(text: str) -> str:
    """Escape text for argparse, which formats it; on a command line None is null."""
    return re.sub(r"\bNone\b", "null", text).replace("%", "%%")


def _wrapped(text: str, width: int) -> str:
    """Wrap lines at the terminal's width, but for the indented ones, which are examples."""
    lines = (line if line.startswith(" ") else textwrap.fill(line, width) for line in text.splitlines())
    return "\n".join(lines)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def not_none(kind: Any) -> Any:
    """Return the type that an option has when it is not null."""
    if not isinstance(kind, UnionType):
        return kind
    (found,) = (arg for arg in get_args(kind) if arg is not NoneType)
    return found


def allowed(kind: Any) -> str:
    """Return the values of a type, in words."""
    if isinstance(kind, UnionType):
        text = allowed(not_none(kind))
        return f"{text} | null" if " | " in text else f"{text} or null"
    if get_origin(kind) is list:
        return f"list of {allowed(get_args(kind)[0])}s"
    if get_origin(kind) is dict:
        return "values by name"
    if _is_enum(kind):
        return " | ".join(kind.__members__)
    return "a choice of the group" if is_dataclass(kind) else _TYPES.get(kind, "any value")


def value_text(value: Any) -> str:
    """Write an option's value as a command line has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(value_text(item) for item in value)}]"
    if isinstance(value, dict):
        inside = ", ".join(f"{name}: {value_text(inner)}" for name, inner in value.items())
        return str(value.get("name", f"{{{inside}}}"))
    return "" if value == _NEEDED else str(value) or "''"
