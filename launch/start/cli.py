"""The entry of all programs: Hydra composes, dataclasses validate, errors become one line.

Only this folder uses Hydra and OmegaConf. A program is `run_program("NAME", Schema, task)` with conf/NAME.yaml; its
task receives the validated object and returns an exit code. A mistake of the user ends with one line and exit code 2.

In a sweep (-m) each job leaves its Outcome in a temporary folder, for jobs may be processes of their own (joblib). One
that fails does not stop the others; a signal does.
"""

import codecs
import io
import locale
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import foreroute
from foreroute.engine.errors import UserError
from foreroute.launch.start.arguments import Known, for_flag, is_sweep, known_to, ready, swept
from foreroute.launch.start.config_files import T, to_object
from foreroute.launch.start.console import styled
from foreroute.launch.start.help import CONF, SCREEN_COLUMNS, groups_of, help_text
from foreroute.launch.start.jobs import Jobs, Outcome, one_line_errors
from foreroute.launch.start.one_line import BadOption
from foreroute.launch.start.rank_variables import find_place

_FIXED = "hydra.job.config.override_dirname.exclude_keys"


def run_program(
    name: str,
    schema: type[T],
    task: Callable[[T], int],
    *,
    many_ranks: bool = False,
    report_sweep: Callable[[list[Outcome]], None] | None = None,
) -> NoReturn:
    """Compose conf/`name`.yaml with the command line into a `schema` object, run the task and exit with its code.

    A sweep exits with the largest code of its jobs.

    Args:
        many_ranks: the task can be one rank of many; otherwise a launcher's second process is refused.
        report_sweep: called by rank 0 at the end of a sweep, also of one that was stopped.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed by Hydra
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter
    ConfigStore.instance().store("schema", schema)

    with one_line_errors():
        place = find_place()
        _check_start(name, place.ranks, many_ranks=many_ranks)
        if {"-h", "--help", "--version"} & set(sys.argv[1:]):
            if place.rank == 0:
                _print_help(name, schema, sys.argv[1:])
            sys.exit(0)
        sys.argv = [sys.argv[0], *_arguments(name, schema, sys.argv[1:])]
        with tempfile.TemporaryDirectory(prefix="foreroute-jobs-") as folder:
            jobs = Jobs(Path(folder))

            @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
            def start(cfg: DictConfig) -> None:
                job = jobs.begin(cfg)
                if job is not None:
                    with job.recorded():
                        job.exit_code = task(to_object(cfg, schema))

            try:
                with jobs.stopped_by_signals():
                    while not jobs.started:
                        with jobs.attempt():
                            start()
            finally:
                outcomes = jobs.outcomes()
                if jobs.sweep and report_sweep is not None and place.rank == 0:
                    report_sweep(outcomes)
        code = max([jobs.signal_code(), *(o.exit_code or 0 for o in outcomes)])
    sys.exit(code)


def _check_start(name: str, ranks: int, *, many_ranks: bool) -> None:
    """Refuse an encoding that cannot read the files, and several ranks where the program is one process."""
    encoding = "utf-8" if sys.flags.utf8_mode else locale.getencoding()
    if codecs.lookup(encoding).name != "utf-8":  # DeepSpeed, for one, could not read its files
        raise BadOption(
            f"the locale's encoding is {encoding}, and must be UTF-8: start with PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        )
    if ranks > 1 and not many_ranks:
        raise BadOption(f"launch.{name} runs as one process: started as {ranks}")


def _arguments(name: str, schema: type, arguments: Sequence[str]) -> list[str]:
    """Return the command line as Hydra takes it: options first, in its grammar, then flags."""
    known = known_to(CONF, name, schema)
    parser = get_args_parser()
    parser.allow_abbrev = False
    parser.error = _refuse_flag  # type: ignore[method-assign]
    found, unknown = parser.parse_known_intermixed_args(arguments)
    if found.experimental_rerun is not None:
        unknown = ["--experimental-rerun"]
    if unknown:
        after = arguments[arguments.index(unknown[0]) + 1 :] if unknown[0] in arguments else []
        raise BadOption(for_flag(unknown[0], after[0] if after else None, known))
    if sum((found.run, found.multirun, found.cfg is not None, found.shell_completion, found.info is not None)) > 1:
        raise BadOption("--run, --multirun, --cfg, --info and --shell-completion: only one at a time")
    if found.resolve and found.cfg is None:
        raise BadOption("--resolve: goes with --cfg job")
    _check_files(found.config_dir, known)
    flags = list(arguments)
    for option in found.overrides:
        flags.remove(option)
    sweep = found.multirun or is_sweep(found.overrides)
    if found.shell_completion:
        return list(arguments)
    try:
        options = ready(found.overrides, known, sweep=sweep)
    except UserError as error:
        raise BadOption(str(error)) from error
    if found.multirun and not swept(options) and find_place().rank == 0:
        print("-m: no option has several values, as moe.spread=1,2 has", flush=True)
    return [*options, *(_fixed(options) if sweep else []), *flags]


def _refuse_flag(message: str) -> NoReturn:
    raise BadOption(f"{message.removeprefix('argument ')}; --help lists what there is")


def _fixed(options: Sequence[str]) -> list[str]:
    """Pass to each job of a sweep, in whatever process, which of its options do not vary: see job_name."""
    names = [option.lstrip("+").partition("=")[0] for option in options]
    names = [name for name in names if name not in swept(options) and re.fullmatch(r"[\w./]+", name, re.ASCII)]
    return [f"{_FIXED}=[{','.join(names)}]"]


def _check_files(folder: str | None, known: Known) -> None:
    """Refuse files of options that Hydra would stumble over: not UTF-8, or with a mark at the beginning that hides
    their head."""
    if folder is None:
        return
    folders = [Path(folder) / group for group in known.groups]
    files = [*Path(folder).glob("*.yaml"), *(file for inner in folders for file in inner.rglob("*.yaml"))]
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadOption(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
        if text.startswith("\ufeff"):
            raise BadOption(f"{path}: begins with a byte-order mark; save it as UTF-8 without one")


def _print_help(name: str, schema: type, arguments: Sequence[str]) -> None:
    """Print the versions, or the program's help, or that of the topics after --help, with the options' values under the
    groups' choices of the command line."""
    if "--version" in arguments:
        print(f"foreroute {foreroute.__version__} (PyTorch {version('torch')})")
        return
    groups = groups_of(CONF / f"{name}.yaml")
    chosen = [text for text in arguments if "=" in text and text.split("=")[0] in groups and "," not in text]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        values: Any = OmegaConf.to_container(hydra.compose(name, chosen), enum_to_str=True)
    asked = next(place for place, text in enumerate(arguments) if text in ("-h", "--help"))
    topics = list(takewhile(lambda text: not text.startswith("-") and "=" not in text, arguments[asked + 1 :]))
    width = min(shutil.get_terminal_size().columns, SCREEN_COLUMNS)
    for line in help_text(CONF, name, schema, values, width=width, topics=topics).splitlines():
        title = line.endswith(":") and not line.startswith(" ")
        print(styled(line, "bold", sys.stdout) if title else line)
