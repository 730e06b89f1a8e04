"""Errors as a person sees them: one line, and the exit code.

Hydra's and OmegaConf's errors spread over several lines and causes; they are joined here.
"""

import os
import re
import signal
import sys
from dataclasses import dataclass, fields

import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from foreroute.engine.errors import RunFailed, UserError
from foreroute.launch.start.arguments import choice_hint, quote
from foreroute.launch.start.console import styled
from foreroute.launch.start.help import CONF
from foreroute.launch.start.rank_variables import find_place

_BELOW_NULL = "Unexpected type: None"
"""The assertion of OmegaConf when an option lies two levels below null, such as cluster.inside.gb_per_s without a
cluster."""
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|alloc_cpu|Storage size calculation overflowed|Cannot allocate memory|Unable to allocate|"
    r"could not allocate"
)
_NOISE = (
    "full_key:",
    "object_type=",
    "reference_type=",
    "Set the environment",
    "See https",
    "Config search path",
    "provider=",
)


class BadOption(UserError):
    """An error of the start before the ranks meet; all ranks of a machine see the same."""


@dataclass(frozen=True, slots=True)
class Told:
    """An expected failure."""

    exit_code: int
    line: str | None = None  # None: the sender of the signal knows the reason
    speaks: bool = True  # this rank is the one to print it


def told(error: BaseException) -> Told | None:
    """Judge an error; None for a bug."""
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError | BadOption):
        return Told(2, one_line(error), find_place().local_rank == 0)  # one command line a machine
    if isinstance(error, AssertionError) and str(error) == _BELOW_NULL:
        line = "an option is of a section that is null: name that first, such as cluster=NAME"
        return Told(2, line, find_place().local_rank == 0)
    if isinstance(error, UserError | RunFailed):
        code = 2 if isinstance(error, UserError) else 1
        return Told(code, one_line(error), not error.everywhere or find_place().rank == 0)
    if isinstance(error, torch.OutOfMemoryError):
        line = (
            f"{one_line(error).partition('. ')[0]}: needs fewer data.streams, more train.accumulation or"
            " train.recompute=true; launch.certify device_memory_gb=GB says beforehand what fits"
        )
        return Told(1, line)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        line = (
            f"this machine's memory does not hold it ({_asked_bytes(error)}): needs a smaller model, fewer data.streams"
            " or a shorter data.segment; launch.certify says beforehand what a run takes"
        )
        return Told(1, line)
    if isinstance(error, BrokenPipeError):  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Told(128 + signal.SIGPIPE)
    if isinstance(error, OSError):
        return Told(2, os_line(error))
    if isinstance(error, KeyboardInterrupt):
        return Told(128 + signal.SIGINT)
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return Told(error.code)
    return None


def say(line: str) -> None:
    """Write a line in one piece, since other ranks write to the same terminal."""
    sys.stderr.write(styled(f"foreroute: {line}", "red", sys.stderr) + "\n")


def one_line(error: BaseException) -> str:
    """Return the message in one line; those of Hydra and OmegaConf are joined, without their advice."""
    if isinstance(error, OverrideParseException):
        name, _, value = error.override.partition("=")
        return f'{error.override}: Hydra\'s grammar does not take it; write "{name}={quote(value)}"'
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start}); save it as UTF-8"
    parts = _lines(error)
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        parts += _lines(cause)
    text = ": ".join(part.rstrip(".") for part in dict.fromkeys(parts)) or type(error).__name__
    return _with_hint(text.split(" To append to your config")[0])


def os_line(error: OSError) -> str:
    """Return the path and the reason, without the number."""
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def _lines(error: BaseException) -> list[str]:
    text = str(error).replace(":\n\t", ": ").replace("\n\t", ", ")  # a list of choices
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(_NOISE)]


def _with_hint(text: str) -> str:
    """Add what to type instead, where Hydra does not."""
    if found := re.search(r"missing mandatory value: (\w+)", text):
        schema = OmegaConf.get_type(ConfigStore.instance().load("schema.yaml").node)
        texts = {f.name: f.metadata.get("help") for f in fields(schema)} if schema is not None else {}
        return f"{found[1]}=VALUE is missing" + (f": {texts[found[1]]}" if texts.get(found[1]) else "")
    if found := re.search(r"Could not find '(\w+)/([^']*)'", text):
        return text + choice_hint(CONF, found[1], found[2])
    if re.search(
        r"mismatched input|no viable alternative|missing EQUAL|extraneous input|token recognition"
        r" error|LexerNoViableAlt",
        text,
    ):
        return "an option is not in Hydra's grammar: put its value in quotes inside quotes, \"NAME='VALUE'\""
    return text


def _asked_bytes(error: BaseException) -> str:
    found = re.search(r"tried to allocate (\d+) bytes|Unable to allocate ([\d.]+ \w+)", str(error))
    if found is None:
        return "an allocation failed"
    return f"{int(found[1]) / 1e9:,.1f} GB at once" if found[1] else f"{found[2]} at once"
