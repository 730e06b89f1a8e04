"""Between a person's command line and the engine: Hydra composes, dataclasses validate, errors become one line.

The only file that knows Hydra and OmegaConf. A program is `run_program("NAME", Schema, task)` with conf/NAME.yaml; the
task receives the validated object and returns an exit code. What the user can mend ends with one line and exit code 2.

In a sweep (-m) each job leaves its Outcome in a temporary folder, for jobs may be processes of their own (joblib). One that
fails does not stop the others; a signal does.
"""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from engine.config import Config, require, to_plain
from engine.errors import RunFailed, UserError
from launch.bootstrap import find_place
from launch.console import styled
from launch.help import groups_of, help_text

CONF = Path(__file__).resolve().parents[1] / "conf"
T = TypeVar("T")
_BELOW_NULL = "Unexpected type: None"
"""What OmegaConf asserts when an option lies two levels below null, such as cluster.inside.gb_per_s without a cluster."""


class _BadOption(UserError):
    """What is wrong with a start before the ranks meet; all ranks of a machine see it alike."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one job ended."""

    number: int
    options: dict[str, str]  # its own: what the command line and the sweep gave it
    dirname: str  # the options as job_name has them
    config: Any  # composed, as dicts and lists
    exit_code: int | None  # None: it was not started, for the sweep was stopped


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
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed by Hydra
    ConfigStore.instance().store("schema", schema)

    def compose_and_run() -> int:
        place = find_place()
        if place.ranks > 1 and not many_ranks:
            raise _BadOption(f"launch.{name} runs as one process: started as {place.ranks}")
        if {"-h", "--help"} & set(sys.argv[1:]):
            if place.rank == 0:
                _print_help(name, schema, sys.argv[1:])
            return 0
        _check_flags(sys.argv[1:])
        with tempfile.TemporaryDirectory(prefix="foreroute-jobs-") as folder:
            jobs = _Jobs(Path(folder))

            def job(cfg: DictConfig) -> None:
                jobs.run(cfg, lambda: task(_to_object(cfg, schema)))

            start = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)
            try:
                with jobs.stopped_by_signals():
                    start()
            except BrokenExecutor as error:
                raise RunFailed(f"a process of the sweep was killed: {_one_line(error)}") from error
            finally:
                outcomes = jobs.outcomes()
                if jobs.sweep and report_sweep is not None and place.rank == 0:
                    report_sweep(outcomes)
            return max([jobs.signal_code(), *(o.exit_code or 0 for o in outcomes)])

    sys.exit(_guarded(compose_and_run))


def _check_flags(arguments: Sequence[str]) -> None:
    """Refuse a flag that Hydra does not have in one line; Hydra itself would print all that it has."""
    _, unknown = get_args_parser().parse_known_args(arguments)
    if unknown:
        raise _BadOption(f"{unknown[0]}: no such flag; options are NAME=VALUE, and --help lists them")  # fmt: skip


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

    def run(self, cfg: DictConfig, task: Callable[[], int]) -> None:
        """Run one job and leave its outcome."""
        _pass_on_warnings()
        hydra_config = HydraConfig.get()
        sweep = hydra_config.mode is RunMode.MULTIRUN
        if sweep:
            self._sweep.touch()
        code = None if self._stop.exists() else self._exit_code(task, sweep)
        number = hydra_config.job.num if sweep else 0
        own = [option for option in hydra_config.overrides.task if "=" in option]
        outcome = Outcome(
            number,
            dict(option.split("=", 1) for option in own),
            hydra_config.job.override_dirname,
            OmegaConf.to_container(cfg, enum_to_str=True),
            code,
        )
        (self._folder / f"{number:06d}.json").write_text(json.dumps(asdict(outcome)))

    def _exit_code(self, task: Callable[[], int], sweep: bool) -> int:
        """Run the task; a bug in a sweep is printed and counts as a failed run. Decides whether the sweep goes on."""
        ranks, by_all = find_place().ranks, True
        try:
            if sweep and ranks > 1:
                _check_launcher()
            code = task()
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            told = _told(error)
            if told is None:
                if not sweep:
                    raise
                _name_rank(error)
                traceback.print_exc()
            code = 1 if told is None else told
            by_all = isinstance(error, _BadOption) or getattr(error, "everywhere", False)
        if code >= 128 or (code and ranks > 1 and not by_all):  # a rank that is lost stays lost
            self._stop.touch()
        return code

    def outcomes(self) -> list[Outcome]:
        """Give the outcomes that are there, in the order of the jobs."""
        found = sorted(self._folder.glob("*.json"))
        return [Outcome(**json.loads(path.read_text())) for path in found]

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Start no further job after SIGINT or SIGTERM; a job that gets one itself, in this process or another, stops, too.

        A second one ends the process.
        """

        def handle(number: int, frame: FrameType | None) -> None:
            signal.signal(number, signal.SIG_DFL)
            self._stop.write_text(str(128 + number))
            if not self.sweep:
                sys.exit(128 + number)

        before = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
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
        raise _BadOption(f"hydra/launcher={name}: many ranks run a sweep's jobs one by one; leave it out")  # fmt: skip


def _guarded(run: Callable[[], int]) -> int:
    """Turn expected failures into one line on stderr and an exit code; anything else is a bug and keeps its traceback."""
    try:
        return run()
    except (Exception, KeyboardInterrupt) as error:
        code = _told(error)
        if code is None:
            _name_rank(error)
            raise
        return code


def _name_rank(bug: BaseException) -> None:
    """Let a traceback say whose it is, where there are many ranks."""
    place = find_place()
    if place.ranks > 1:
        bug.add_note(f"This was rank {place.rank} of {place.ranks}.")


def _told(error: BaseException) -> int | None:
    """Say an expected failure in one line and give its exit code; None for a bug."""
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError | _BadOption):
        if find_place().local_rank == 0:  # a machine's ranks share the command line
            _say(_one_line(error))
        return 2
    if isinstance(error, AssertionError) and str(error) == _BELOW_NULL:
        if find_place().local_rank == 0:
            _say("an option is of a section that is null: name that first, such as cluster=NAME")
        return 2
    if isinstance(error, UserError | RunFailed):
        if not error.everywhere or find_place().rank == 0:
            _say(_one_line(error))
        return 2 if isinstance(error, UserError) else 1
    if isinstance(error, torch.OutOfMemoryError):
        _say(f"{_one_line(error).partition('. ')[0]}: needs fewer data.streams, more train.accumulation or train.recompute=true; "
             "launch.certify device_memory_gb=GB says beforehand what fits")  # fmt: skip
        return 1
    if isinstance(error, BrokenPipeError):  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, OSError):
        _say(str(error))
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return None


class _Lines(logging.Handler):
    """Writes what is logged as the program's other lines are written."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        _say(record.getMessage())


def _pass_on_warnings() -> None:
    """Let the engine's warnings reach the user: Hydra switches off every logger that there is when it starts a job."""
    engine = logging.getLogger("engine")
    engine.setLevel(logging.WARNING)
    if not engine.handlers:
        engine.addHandler(_Lines())
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "engine":
            logging.getLogger(name).disabled = False


def _say(line: str) -> None:
    """Write in one piece: other ranks write to the same terminal."""
    sys.stderr.write(styled(f"foreroute: {line}", "red", sys.stderr) + "\n")


def _to_object(cfg: DictConfig, schema: type[T]) -> T:
    try:
        found = OmegaConf.to_object(cfg)
    except UserError as error:
        raise _BadOption(str(error)) from error
    if not isinstance(found, schema):
        raise UserError(f"the configuration is no {schema.__name__}")
    return found


_NOISE = (
    "full_key:",
    "object_type=",
    "reference_type=",
    "Set the environment",
    "See https",
    "Config search path",
    "provider=",
)


def _one_line(error: BaseException) -> str:
    """The message in one line: what Hydra and OmegaConf spread over lines and causes, joined, without their advice."""
    parts = _lines(error)
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        parts += _lines(cause)
    text = ": ".join(part.rstrip(".") for part in dict.fromkeys(parts)) or type(error).__name__
    text = text.split(" To append to your config")[0]
    return text + _allowed_keys(text)


def _lines(error: BaseException) -> list[str]:
    text = str(error).replace(":\n\t", ": ").replace("\n\t", ", ")  # a list of choices
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(_NOISE)]


def _allowed_keys(text: str) -> str:
    """For an unknown option: the names that its section has."""
    found = re.match(r"Could not override '([\w.]+)'", text)
    if not found:
        return ""
    node: Any = ConfigStore.instance().load("schema.yaml").node
    for part in found[1].split(".")[:-1]:
        inner = OmegaConf.select(node, part)
        if not OmegaConf.is_dict(inner):
            break
        node = inner
    return f" no such option; allowed: {', '.join(str(name) for name in node)}"


def job_name(name: str) -> str:
    """The run's name; in a sweep (-m) with the job's own options, so that every job has its own folder."""
    return swept_name(name, HydraConfig.get().job.override_dirname) if in_sweep() else name


def in_sweep() -> bool:
    """Whether this is a job of a sweep (-m)."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def given_options() -> list[str]:
    """Full names of the options that this job was given on its command line, a sweep's own ones among them."""
    return [option.partition("=")[0].lstrip("+") for option in HydraConfig.get().overrides.task]


def swept_name(name: str, dirname: str) -> str:
    """The name of a sweep's job: the sweep's name and its own options."""
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", f"{name}-{dirname}")


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
        raise UserError(f"{path}: {_one_line(error)}") from error


def read_plain(path: Path) -> dict[str, Any]:
    """Read a run's resolved configuration as dicts, lists, numbers and text, whatever version wrote it.

    Raises:
        UserError: the file is missing or is no configuration.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from error
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
        raise UserError(f"{path}: {_one_line(error)}") from error


def compose_run(options: list[str]) -> Config:
    """Give the configuration of `launch.train` with these options, from inside another program.

    Raises:
        HydraException, OmegaConfBaseException, UserError: an option is wrong; each becomes one line at the end of a program.
    """
    store = ConfigStore.instance()
    own = store.load("schema.yaml").node
    store.store("schema", Config)
    try:
        return _to_object(hydra.compose("train", overrides=options), Config)
    finally:
        store.store("schema", own)


def quoted(value: str) -> str:
    """Write a text so that Hydra reads it as one value, whatever is in it."""
    escaped = value.replace('"', '\\"')
    return f'"{escaped}"'


def config_of(plain: Any) -> Config:
    """Build a configuration from dicts, lists, numbers and text (the inverse of to_plain)."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
    config: Any = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config
