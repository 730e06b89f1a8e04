"""The options of this job as a person wrote them, and the names of a sweep's runs."""

import hashlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from foreroute.launch.start.arguments import unquoted

_LONGEST_NAME = 180  # bytes of a run's name; a file system takes 255, and files in the folder have longer ones


def job_name(name: str) -> str:
    """Return the run's name; in a sweep (-m) with the options that it varies, so that every job has its own folder."""
    return swept_name(name, swept_options()) if in_sweep() else name


def own_options() -> dict[str, str]:
    """Return the options of this job from the command line and the sweep, as a person writes them."""
    own = [option.lstrip("+") for option in HydraConfig.get().overrides.task if "=" in option]
    pairs = (option.split("=", 1) for option in own)
    return {name: unquoted(value) for name, value in pairs}


def swept_options() -> dict[str, str]:
    """Return those of the job's options that the sweep varies."""
    fixed = HydraConfig.get().job.config.override_dirname.exclude_keys
    return {name: value for name, value in own_options().items() if name not in fixed}


def in_sweep() -> bool:
    """Return whether this is a job of a sweep (-m)."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def given_options() -> list[str]:
    """Return the full names of the options on this job's command line, with those of a sweep."""
    return [option.partition("=")[0].lstrip("+") for option in HydraConfig.get().overrides.task]


def swept_name(name: str, options: Mapping[str, str]) -> str:
    """Return the name of a sweep's job: the sweep's name and the varied options. Different values give different names.

    Characters that do not suit a folder's name become _. Such a name, or one that is too long, ends with its digest.
    """
    if not options:
        return name
    exact = ",".join(f"{option}={value}" for option, value in sorted(options.items()))
    shown = re.sub(r"[^\w.=,+-]+", "_", exact)
    short = shown.encode()[: _LONGEST_NAME - len(name.encode())].decode(errors="ignore")
    if short == exact:
        return f"{name}-{short}"
    return f"{name}-{short}-{hashlib.sha256(exact.encode(errors='surrogateescape')).hexdigest()[:8]}"


def command_option(name: str, value: str | Path) -> str:
    """Write an option as a person would type it: quoted for Hydra and the shell where it must be, as with an = in a
    folder's name."""
    if re.fullmatch(r"[\w./-]+", str(value), re.ASCII):
        return f"{name}={value}"
    quoted = "{}='{}'".format(name, str(value).replace("'", r"\'"))
    return shlex.quote(quoted) if re.search(r'["$`\\!]', quoted) else f'"{quoted}"'
