"""Between a person's command line and the engine: Hydra composes, dataclasses validate, errors become one line.

The only file that knows Hydra and OmegaConf. A program is `run_program("NAME", Schema, task)` with conf/NAME.yaml; the
task receives the validated object and returns an exit code. What the user can mend ends with one line and exit code 2.

In a sweep (-m) each job leaves its Outcome in a temporary folder, for jobs may be processes of their own (joblib). One that
fails does not stop the others; a signal does.
"""

import codecs
import hashlib
import io
import json
import locale
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from engine.config import Config, require, to_plain
from engine.errors import RunFailed, UserError
from launch.arguments import Known, for_flag, is_sweep, known_to, ready, swept, unquoted
from launch.bootstrap import find_place
from launch.console import styled
from launch.failures import BadOption, Told, one_line, say, told
from launch.help import CONF, groups_of, help_text
from launch.process import catchable_stops

T = TypeVar("T")
_FIXED = "hydra.job.config.override_dirname.exclude_keys"
_KILLED = "a process of the sweep was killed, and this run with it; train.resume=true goes on"
_LONGEST_NAME = (
    180  # bytes of a run's name; a file system takes 255, and files in the folder have longer ones
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one job ended."""

    number: int
    options: dict[str, str]  # its own: what the command line and the sweep gave it
    swept: dict[str, str]  # those of them that the sweep varies
    config: Any  # composed, as dicts and lists
    exit_code: int | None  # None: it was not started, for the sweep was stopped
    reason: str | None = None  # the line that it failed with


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
        many_ranks: the task knows how to be one rank of many; otherwise a launcher's second process is refused.
        report_sweep: called by rank 0 at the end of a sweep, also of one that was stopped.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed by Hydra
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter
    ConfigStore.instance().store("schema", schema)

    def compose_and_run() -> int:
        place = find_place()
        encoding = "utf-8" if sys.flags.utf8_mode else locale.getencoding()
        if codecs.lookup(encoding).name != "utf-8":  # DeepSpeed, for one, could not read its files
            raise BadOption(f"the locale's encoding is {encoding}, and must be UTF-8: start with PYTHONUTF8=1, or LC_ALL=C.UTF-8")  # fmt: skip
        if place.ranks > 1 and not many_ranks:
            raise BadOption(f"launch.{name} runs as one process: started as {place.ranks}")
        if {"-h", "--help"} & set(sys.argv[1:]):
            if place.rank == 0:
                _print_help(name, schema, sys.argv[1:])
            return 0
        sys.argv = [sys.argv[0], *_arguments(name, schema, sys.argv[1:])]
        with tempfile.TemporaryDirectory(prefix="foreroute-jobs-") as folder:
            jobs = _Jobs(Path(folder))

            def job(cfg: DictConfig) -> None:
                jobs.run(cfg, lambda: task(_to_object(cfg, schema)))

            start = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)
            try:
                with jobs.stopped_by_signals():
                    jobs.start_all(start)
            finally:
                outcomes = jobs.outcomes()
                if jobs.sweep and report_sweep is not None and place.rank == 0:
                    report_sweep(outcomes)
            return max([jobs.signal_code(), *(o.exit_code or 0 for o in outcomes)])

    sys.exit(_guarded(compose_and_run))


def _arguments(name: str, schema: type, arguments: Sequence[str]) -> list[str]:
    """The command line as Hydra takes it: options first, in its grammar, then flags."""
    known = known_to(CONF, name, schema)
    parser = get_args_parser()
    parser.allow_abbrev = False
    parser.error = _refuse_flag  # type: ignore[assignment]
    found, unknown = parser.parse_known_intermixed_args(arguments)
    if found.experimental_rerun is not None:
        unknown = ["--experimental-rerun"]
    if unknown:
        after = arguments[arguments.index(unknown[0]) + 1 :] if unknown[0] in arguments else []
        raise BadOption(for_flag(unknown[0], after[0] if after else None, known))
    if sum((found.run, found.multirun, found.cfg is not None, found.shell_completion, found.info is not None)) > 1:  # fmt: skip
        raise BadOption("--run, --multirun, --cfg, --info and --shell-completion: only one at a time")  # fmt: skip
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
    """Tell each job of a sweep, in whatever process, which of its options do not vary: see job_name."""
    names = [option.partition("=")[0] for option in options if option.partition("=")[0] not in swept(options)]  # fmt: skip
    names = [name for name in names if re.fullmatch(r"[\w./]+", name, re.ASCII)]
    return [f"{_FIXED}=[{','.join(names)}]"]


def _check_files(folder: str | None, known: Known) -> None:
    """Refuse files of options that Hydra would stumble over: not UTF-8, or with a mark at the beginning that hides their head."""
    if folder is None:
        return
    files = [*Path(folder).glob("*.yaml"), *(f for group in known.groups for f in (Path(folder) / group).rglob("*.yaml"))]  # fmt: skip
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadOption(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error  # fmt: skip
        if text.startswith("\ufeff"):
            raise BadOption(f"{path}: begins with a byte-order mark; save it as UTF-8 without one")


def _print_help(name: str, schema: type, arguments: Sequence[str]) -> None:
    """Print the program's help, with the options' values under the groups' choices of the command line."""
    groups = groups_of(CONF / f"{name}.yaml")
    chosen = [text for text in arguments if text.split("=")[0] in groups and "," not in text]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        values: Any = OmegaConf.to_container(hydra.compose(name, chosen), enum_to_str=True)
    width = min(shutil.get_terminal_size().columns, 100)
    for line in help_text(CONF, name, schema, values, width=width).splitlines():
        title = line.endswith(":") and not line.startswith(" ")
        print(styled(line, "bold", sys.stdout) if title else line)


class _Jobs:
    """The jobs of one start of a program, known to each other through a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stop, self._sweep = folder / "stop", folder / "sweep"

    @property
    def sweep(self) -> bool:
        """There are jobs of a sweep."""
        return self._sweep.exists()

    def start_all(self, start: Callable[[], None]) -> None:
        """Start the jobs; where one of a sweep's processes is killed its jobs are lost, and the rest are started again.

        Raises:
            RunFailed: they are killed before they begin.
        """
        while True:
            try:
                return start()
            except BrokenExecutor as error:
                lost = list(self._folder.glob("*.begun"))
                if not lost:
                    line = f"the sweep's processes are killed: {one_line(error)}"
                    raise RunFailed(line) from error
                for begun in lost:
                    begun.rename(begun.with_suffix(".json"))

    def run(self, cfg: DictConfig, task: Callable[[], int]) -> None:
        """Run one job and leave its outcome; one that has an outcome is not run again."""
        _pass_on_warnings()
        hydra_config = HydraConfig.get()
        sweep = hydra_config.mode is RunMode.MULTIRUN
        if sweep:
            self._sweep.touch()
        number = hydra_config.job.num if sweep else 0
        ended = self._folder / f"{number:06d}.json"
        if ended.exists():
            return
        plain = OmegaConf.to_container(cfg, enum_to_str=True)
        own = _own_options()
        lost = Outcome(number, own, _swept_options() if sweep else {}, plain, 1, _KILLED)
        begun = ended.with_suffix(".begun")
        begun.write_text(json.dumps(asdict(lost)))
        code, reason = (None, None) if self._stop.exists() else self._exit_code(task, sweep)
        ended.write_text(json.dumps(asdict(replace(lost, exit_code=code, reason=reason))))
        begun.unlink()

    def _exit_code(self, task: Callable[[], int], sweep: bool) -> tuple[int, str | None]:
        """Run the task; gives its exit code, and the reason of a failure. Decides whether the sweep goes on.

        A bug in a sweep is printed and counts as a failed run.
        """
        ranks, by_all, reason = find_place().ranks, True, None
        try:
            if sweep and ranks > 1:
                _check_launcher()
            code = task()
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            failure = told(error)
            if failure is None:
                if not sweep:
                    raise
                _name_rank(error)
                traceback.print_exc()
                failure = Told(1, f"a bug: {type(error).__name__}: {one_line(error)}", speaks=False)
            code, reason = failure.exit_code, failure.line
            _speak(failure)
            by_all = isinstance(error, BadOption) or getattr(error, "everywhere", False)
        if code >= 128 or (code and ranks > 1 and not by_all):  # a rank that is lost stays lost
            self._stop.touch()
        return code, reason

    def outcomes(self) -> list[Outcome]:
        """Give the outcomes that are there, in the order of the jobs."""
        found = sorted(self._folder.glob("*.json"))
        return [Outcome(**json.loads(path.read_text())) for path in found]

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Start no further job after a signal that would end the process; a job that gets one itself, in this process or another, stops, too.

        A second one ends the process.
        """

        def handle(number: int, frame: FrameType | None) -> None:
            signal.signal(number, signal.SIG_DFL)
            self._stop.write_text(str(128 + number))
            if not self.sweep:
                sys.exit(128 + number)

        before = {number: signal.signal(number, handle) for number in catchable_stops()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def signal_code(self) -> int:
        """128 + the number of the signal that this process got; 0 for none."""
        return int(self._stop.read_text() or 0) if self._stop.exists() else 0


def _check_launcher() -> None:
    name = HydraConfig.get().runtime.choices["hydra/launcher"]
    if name != "basic":
        raise BadOption(f"hydra/launcher={name}: many ranks run a sweep's jobs one by one; leave it out")  # fmt: skip


def _guarded(run: Callable[[], int]) -> int:
    """Turn expected failures into one line on stderr and an exit code; anything else is a bug and keeps its traceback."""
    try:
        return run()
    except (Exception, KeyboardInterrupt) as error:
        failure = told(error)
        if failure is None:
            _name_rank(error)
            raise
        _speak(failure)
        return failure.exit_code


def _speak(failure: Told) -> None:
    if failure.line is not None and failure.speaks:
        say(failure.line)


def _name_rank(bug: BaseException) -> None:
    """Let a traceback say whose it is, where there are many ranks."""
    place = find_place()
    if place.ranks > 1:
        bug.add_note(f"This was rank {place.rank} of {place.ranks}.")


class _Lines(logging.Handler):
    """Writes what is logged as the program's other lines are written."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        say(record.getMessage())


def _pass_on_warnings() -> None:
    """Let the engine's warnings reach the user: Hydra switches off every logger that there is when it starts a job."""
    engine = logging.getLogger("engine")
    engine.setLevel(logging.WARNING)
    if not engine.handlers:
        engine.addHandler(_Lines())
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "engine":
            logging.getLogger(name).disabled = False


def _to_object(cfg: DictConfig, schema: type[T]) -> T:
    try:
        found = OmegaConf.to_object(cfg)
        _check_numbers(found, "")
    except UserError as error:
        raise BadOption(str(error)) from error
    if not isinstance(found, schema):
        raise UserError(f"the configuration is no {schema.__name__}")
    return found


def _check_numbers(config: object, prefix: str) -> None:
    """Refuse numbers that are not finite, and whole ones beyond 64 bits, wherever they come from."""
    for field in fields(config) if is_dataclass(config) else ():
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        if is_dataclass(value):
            _check_numbers(value, f"{name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float):
                require(math.isfinite(number), f"{name}={value}: must be a finite number")
            elif isinstance(number, int):
                require(abs(number) < 2**63, f"{name}={value}: must be below 2**63")


def job_name(name: str) -> str:
    """The run's name; in a sweep (-m) with the options that it varies, so that every job has its own folder."""
    return swept_name(name, _swept_options()) if in_sweep() else name


def _own_options() -> dict[str, str]:
    """What the command line and the sweep gave this job, as a person writes it."""
    own = [option for option in HydraConfig.get().overrides.task if "=" in option]
    pairs = (option.split("=", 1) for option in own)
    return {name: unquoted(value) for name, value in pairs}


def _swept_options() -> dict[str, str]:
    fixed = HydraConfig.get().job.config.override_dirname.exclude_keys
    return {name: value for name, value in _own_options().items() if name not in fixed}


def in_sweep() -> bool:
    """Whether this is a job of a sweep (-m)."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def given_options() -> list[str]:
    """Full names of the options that this job was given on its command line, a sweep's own ones among them."""
    return [option.partition("=")[0].lstrip("+") for option in HydraConfig.get().overrides.task]


def swept_name(name: str, options: Mapping[str, str]) -> str:
    """The name of a sweep's job: the sweep's name and what is varied. Different values give different names.

    Signs that a folder's name is better without become _, and then, or where the name would be too long, its digest ends it.
    """
    if not options:
        return name
    exact = ",".join(f"{option}={value}" for option, value in sorted(options.items()))
    shown = re.sub(r"[^\w.=,+-]+", "_", exact)
    short = shown.encode()[: _LONGEST_NAME - len(name.encode())].decode(errors="ignore")
    if short == exact:
        return f"{name}-{short}"
    return f"{name}-{short}-{hashlib.sha256(exact.encode(errors='surrogateescape')).hexdigest()[:8]}"  # fmt: skip


def command_option(name: str, value: str | Path) -> str:
    """Write an option as a person would type it: quoted for Hydra and the shell where it must be, as with an = in a folder's name."""
    if re.fullmatch(r"[\w./-]+", str(value), re.ASCII):
        return f"{name}={value}"
    quoted = "{}='{}'".format(name, str(value).replace("'", r"\'"))
    return shlex.quote(quoted) if re.search(r'["$`\\!]', quoted) else f'"{quoted}"'


def write_config(config: object, path: Path) -> None:
    """Write a configuration object as YAML."""
    OmegaConf.save(OmegaConf.create(to_plain(config)), path)


def read_config(path: Path) -> Config:
    """Read a run's resolved configuration.

    Raises:
        UserError: the file is missing or does not fit this version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run folder holds a config.yaml")
    try:
        return config_of(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def read_plain(path: Path) -> dict[str, Any]:
    """Read a run's resolved configuration as dicts, lists, numbers and text, whatever version wrote it.

    Raises:
        UserError: the file is missing or is no configuration.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no options")
    return {str(name): value for name, value in found.items()}


def read_options(path: Path, schema: type[T]) -> T:
    """Read a YAML file of options that `schema` describes.

    Raises:
        UserError: the file is missing, or has options or values that the schema does not allow.
    """
    require(path.is_file(), f"{path}: no such file")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
        return _to_object(cast(DictConfig, merged), schema)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def compose_run(options: list[str]) -> Config:
    """Give the configuration of `launch.train` with these options, from inside another program.

    Raises:
        HydraException, OmegaConfBaseException, UserError: an option is wrong; each becomes one line at the end of a program.
    """
    store = ConfigStore.instance()
    own = store.load("schema.yaml").node
    store.store("schema", Config)
    try:
        options = ready(options, known_to(CONF, "train", Config))
        return _to_object(hydra.compose("train", overrides=options), Config)
    finally:
        store.store("schema", own)


def config_of(plain: Any) -> Config:
    """Build a configuration from dicts, lists, numbers and text (the inverse of to_plain)."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
    config: Any = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config
