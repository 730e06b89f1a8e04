"""The jobs of one start of a program: one, or those of a sweep."""

import json
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
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
    """How one job ended."""

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
        pass_on_warnings()
        hydra_config = HydraConfig.get()
        sweep = hydra_config.mode is RunMode.MULTIRUN
        if sweep:
            self._sweep.touch()
        number = hydra_config.job.num if sweep else 0
        ended = self._folder / f"{number:06d}.json"
        if ended.exists():
            return
        plain = OmegaConf.to_container(cfg, enum_to_str=True)
        own = own_options()
        lost = Outcome(number, own, swept_options() if sweep else {}, plain, 1, _KILLED)
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
                name_rank(error)
                traceback.print_exc()
                failure = Told(1, f"a bug: {type(error).__name__}: {one_line(error)}", speaks=False)
            code, reason = failure.exit_code, failure.line
            speak(failure)
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
        """128 + the number of the signal that this process got; 0 for none."""
        return int(self._stop.read_text() or 0) if self._stop.exists() else 0


def _check_launcher() -> None:
    name = HydraConfig.get().runtime.choices["hydra/launcher"]
    if name != "basic":
        raise BadOption(f"hydra/launcher={name}: many ranks run a sweep's jobs one by one; leave it out")


def speak(failure: Told) -> None:
    """Say the line of a failure, where this rank is the one to say it."""
    if failure.line is not None and failure.speaks:
        say(failure.line)


def name_rank(bug: BaseException) -> None:
    """Let a traceback say whose it is, where there are many ranks."""
    place = find_place()
    if place.ranks > 1:
        bug.add_note(f"This was rank {place.rank} of {place.ranks}.")


class _Lines(logging.Handler):
    """Writes what is logged as the program's other lines are written."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        say(record.getMessage())


def pass_on_warnings() -> None:
    """Let the engine's warnings reach the user: Hydra switches off every logger that there is when it starts a job."""
    engine = logging.getLogger("foreroute")
    engine.setLevel(logging.WARNING)
    if not engine.handlers:
        engine.addHandler(_Lines())
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "foreroute":
            logging.getLogger(name).disabled = False
