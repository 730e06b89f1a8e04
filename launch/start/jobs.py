"""The jobs of one start of a program: one, or those of a sweep."""

import json
import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from foreroute.engine.errors import RunFailed
from foreroute.launch.start.one_line import BadOption, Told, one_line, say, told
from foreroute.launch.start.options import own_options, swept_options
from foreroute.launch.start.process import catchable_stops
from foreroute.launch.start.rank_variables import find_place

_KILLED = "a process of the sweep was killed, and this run with it; train.resume=true goes on"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one job."""

    number: int
    options: dict[str, str]  # its own: what the command line and the sweep gave it
    swept: dict[str, str]  # those of them that the sweep varies
    config: Any  # composed, as dicts and lists
    exit_code: int | None  # None: it was not started, for the sweep was stopped
    reason: str | None = None  # the line that it failed with


class Jobs:
    """The jobs of one start of a program, known to each other through a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stop, self._sweep = folder / "stop", folder / "sweep"
        self.started = False

    @property
    def sweep(self) -> bool:
        """There are jobs of a sweep."""
        return self._sweep.exists()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Start the jobs in the block; repeat until `started`, since jobs after a killed process need another attempt.

        Raises:
            RunFailed: a process of the sweep was killed before it began a job.
        """
        try:
            yield
            self.started = True
        except BrokenExecutor as error:
            lost = list(self._folder.glob("*.begun"))
            if not lost:
                raise RunFailed(f"the sweep's processes are killed: {one_line(error)}") from error
            for begun in lost:
                begun.rename(begun.with_suffix(".json"))

    def begin(self, cfg: DictConfig) -> "Job | None":
        """Begin a job; None if it has an outcome already or the sweep was stopped."""
        pass_on_warnings()
        hydra_config = HydraConfig.get()
        sweep = hydra_config.mode is RunMode.MULTIRUN
        if sweep:
            self._sweep.touch()
        number = hydra_config.job.num if sweep else 0
        plain = OmegaConf.to_container(cfg, enum_to_str=True)
        lost = Outcome(number, own_options(), swept_options() if sweep else {}, plain, 1, _KILLED)
        job = Job(self._folder / f"{number:06d}.json", self._stop, lost, in_sweep=sweep)
        if job.ended:
            return None
        if self._stop.exists():
            job.end(None)
            return None
        return job

    def outcomes(self) -> list[Outcome]:
        """Return the outcomes so far, in the order of the jobs."""
        found = sorted(self._folder.glob("*.json"))
        return [Outcome(**json.loads(path.read_text())) for path in found]

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Start no further job after a signal that would end the process; a job that gets one itself, in this process
        or another, stops, too.

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
        """Return 128 + the number of the signal that this process received; 0 for none."""
        return int(self._stop.read_text() or 0) if self._stop.exists() else 0


class Job:
    """One job under way; its outcome is in a file."""

    def __init__(self, file: Path, stop: Path, lost: Outcome, *, in_sweep: bool) -> None:
        """Use the outcome's file, the file that stops the sweep, and the outcome in case the job is killed."""
        self._file, self._stop, self._lost, self._in_sweep = file, stop, lost, in_sweep
        self.exit_code = 0

    @property
    def ended(self) -> bool:
        """There is an outcome."""
        return self._file.exists()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Run the job in the block, which sets exit_code; record the outcome, and decide whether the sweep goes on.

        An expected failure becomes one line and an exit code. A bug in a sweep is printed and counts as a failed run.
        """
        begun = self._file.with_suffix(".begun")
        begun.write_text(json.dumps(asdict(self._lost)))
        ranks, by_all, reason = find_place().ranks, True, None
        try:
            choices = HydraConfig.get().runtime.choices
            if self._in_sweep and ranks > 1 and (launcher := choices["hydra/launcher"]) != "basic":
                raise BadOption(f"hydra/launcher={launcher}: many ranks run a sweep's jobs one by one; leave it out")
            yield
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            failure = told(error)
            if failure is None:
                if not self._in_sweep:
                    raise
                name_rank(error)
                traceback.print_exc()
                failure = Told(1, f"a bug: {type(error).__name__}: {one_line(error)}", speaks=False)
            self.exit_code, reason = failure.exit_code, failure.line
            speak(failure)
            by_all = isinstance(error, BadOption) or getattr(error, "everywhere", False)
        if self.exit_code >= 128 or (self.exit_code and ranks > 1 and not by_all):  # a rank that is lost stays lost
            self._stop.touch()
        self.end(self.exit_code, reason)
        begun.unlink()

    def end(self, exit_code: int | None, reason: str | None = None) -> None:
        """Write the outcome; an exit code of None means that the job was not started."""
        self._file.write_text(json.dumps(asdict(replace(self._lost, exit_code=exit_code, reason=reason))))


def speak(failure: Told) -> None:
    """Print the line of a failure if this rank is the one to print it."""
    if failure.line is not None and failure.speaks:
        say(failure.line)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an expected failure in the block into one line on stderr and an exit code; a bug keeps its traceback."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        failure = told(error)
        if failure is None:
            name_rank(error)
            raise
        speak(failure)
        sys.exit(failure.exit_code)


def name_rank(bug: BaseException) -> None:
    """Note the rank in a traceback, where there are many ranks."""
    place = find_place()
    if place.ranks > 1:
        bug.add_note(f"This was rank {place.rank} of {place.ranks}.")


class _Lines(logging.Handler):
    """Writes log records like the program's other lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        say(record.getMessage())


def pass_on_warnings() -> None:
    """Enable the engine's loggers, since Hydra disables every existing logger when it starts a job."""
    engine = logging.getLogger("foreroute")
    engine.setLevel(logging.WARNING)
    if not engine.handlers:
        engine.addHandler(_Lines())
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "foreroute":
            logging.getLogger(name).disabled = False
