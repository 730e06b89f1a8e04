"""Run the jobs of a study in several processes at a time, each with a log; finished jobs are kept, the others are
resumed.

A job is launch.train and then launch.analyse, each in a process of its own. A signal to the study, the end of its time
or its death stops the process after a checkpoint. Results are written when both are done (launch/study/results.py).
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import IO

from foreroute.engine.checkpoint.files import checkpoints
from foreroute.engine.errors import require
from foreroute.engine.metrics.names import JSONL, read_lines
from foreroute.launch.runs.folder import write_json
from foreroute.launch.start.arguments import quote
from foreroute.launch.start.console import clock
from foreroute.launch.study.equal_time import STEPS, equal_time_steps, read_steps, take_steps, waits_for
from foreroute.launch.study.preset import Job, Preset, difference, with_rate
from foreroute.launch.study.results import Result, best_rate, check_alike, collect, own_bpc, read_result

TIME_IS_UP = 124  # exit code of timeout(1)
FAILED = 1
_POLL_S = 0.2
_STATUS_S = 120.0  # between lines that say where the running jobs are
_WORTH_STARTING_S = 30.0  # less than that before the end of the time: a process would hardly reach its first step
_STOP_S = 180.0  # in which a process must have written its checkpoint
_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


@dataclass(slots=True)
class _Running:
    """A job with a process."""

    job: Job
    rate: float | None
    process: subprocess.Popen[bytes]
    program: str  # train or analyse
    started: float  # when the job's first process was started, by the clock of time.monotonic
    whole: bool  # that process started the run, and did not resume it


class Runner:
    """The jobs of one study: waiting, running and done.

    Args:
        out: the study's folder.
        lock: of that folder; processes keep it, so that no second study meets one that outlived the first.
        at_once: processes at a time.
        say: prints a line.
    """

    def __init__(
        self,
        preset: Preset,
        jobs: list[Job],
        out: Path,
        lock: IO[str],
        *,
        at_once: int = 1,
        say: Callable[[str], None] = print,
    ) -> None:
        self._preset, self._out, self._lock = preset, out, lock
        self._steps = read_steps(out)
        self._jobs = take_steps(preset, jobs, self._steps)
        self._at_once, self._say = at_once, say
        self._results = out / "results"
        self._done: dict[str, Result] = {}
        self._failed: dict[str, str] = {}
        self._running: list[_Running] = []
        for folder in (self._results, out / "logs", out / "runs"):
            folder.mkdir(parents=True, exist_ok=True)
        self._read_done()

    def _read_done(self) -> None:
        """Read the results that exist, which must be of this study.

        Raises:
            UserError: a result was made with other options, or an arm's seeds are not alike.
        """
        for job in self._jobs:
            path = self._results / f"{job.name}.json"
            if path.exists():
                found = read_result(path)
                now = with_rate(job, found["learning_rate"]).chosen_options
                differs = difference(now, found["options"])
                require(differs is None, f"{path} is of another study: {differs}; take another out=FOLDER")
                self._done[job.name] = found
        for arm in self._preset.arms:
            if of_arm := self._runs_of(arm):
                check_alike(of_arm)

    def _runs_of(self, arm: str) -> list[Result]:
        """Return the results of an arm's seeds."""
        return [r for r in self._done.values() if r["arm"] == arm and r["tries"] is None]

    def run(self, stop_asked: Callable[[], int], seconds: float | None = None) -> int:
        """Run until all jobs are done or have failed, a stop is asked for, or the time is up; return the exit code.

        Args:
            stop_asked: returns the exit code of a stop, or 0.
            seconds: time until running processes are stopped; None for no limit.
        """
        end = None if seconds is None else time.monotonic() + seconds
        self._say(f"{self._place()} runs are done; {self._at_once} at a time; left {self._left()}")
        told = time.monotonic()
        while not (code := stop_asked()):
            self._look_after()
            left = float("inf") if end is None else end - time.monotonic()
            if left <= 0:
                break
            if left > _WORTH_STARTING_S:
                self._start_ready()
            if not self._running:
                break
            if time.monotonic() - told > _STATUS_S:
                told = time.monotonic()
                at = ", ".join(f"{r.job.name} {self._share(r.job):.0%}" for r in self._running)
                self._say(f"{self._place()} {at}; left {self._left()}")
            time.sleep(_POLL_S)
        self._stop()
        return self._ended(code)

    def _ended(self, code: int) -> int:
        for name, reason in self._failed.items():
            self._say(f"failed: {name}: {reason}")
        open_jobs = [job for job in self._jobs if job.name not in self._done]
        if not open_jobs:
            return 0
        if code == 0 and any(job.name not in self._failed and self._may_run(job) for job in open_jobs):
            code = TIME_IS_UP
        what = "stopped" if code else "ended"
        self._say(f"{what} with {len(open_jobs)} of {len(self._jobs)} runs to do; the same command goes on from here")
        return code or FAILED

    def _start_ready(self) -> None:
        """Start the first jobs that can run, as long as a process is free."""
        self._settle_steps()
        busy = {running.job.name for running in self._running}
        for job in self._jobs:
            if len(self._running) >= self._at_once:
                return
            if job.name in busy or job.name in self._done or job.name in self._failed:
                continue
            if self._may_run(job):
                self._start(job)

    def _may_run(self, job: Job) -> bool:
        """Check that the learning rate is known. If every run that tried one has failed, the job fails as well."""
        if job.tries is not None or not self._preset.learning_rates:
            return True
        for kin in waits_for(self._preset, job.arm):
            trying = [job for job in self._jobs if job.tries is not None and job.arm == kin]
            if any(j.name not in self._done and j.name not in self._failed for j in trying):
                return False
            if all(j.name in self._failed for j in trying):
                self._failed[job.name] = f"no learning rate: every run of {kin} that tried one failed"
                return False
        return True

    def _settle_steps(self) -> None:
        """Compute the steps of arms that train as long as another one, as soon as the runs are done that determine
        them."""
        for arm, chosen in self._preset.arms.items():
            if chosen.same_time_as is None or arm in self._steps:
                continue
            first = next(job for job in self._jobs if job.arm == arm and job.tries is None)
            if first.name in self._failed or not self._may_run(first):
                continue
            tuning = [r for r in self._done.values() if r["tries"] is not None]
            self._steps[arm] = equal_time_steps(self._preset, self._jobs, arm, tuning)
            write_json(self._out / STEPS, self._steps)
            self._jobs = take_steps(self._preset, self._jobs, self._steps)
            self._say(f"{arm}: {self._steps[arm]} steps, as long as {chosen.same_time_as}")

    def _start(self, job: Job) -> None:
        rate = None
        if job.tries is None and self._preset.learning_rates:
            rate = best_rate(list(self._done.values()), self._preset.arms[job.arm].kin)
            earlier = {run["learning_rate"] for run in self._runs_of(job.arm)}
            if earlier - {rate}:
                self._failed[job.name] = (
                    f"the best learning rate is now {rate:g}, but seeds of {job.arm} ran with {earlier.pop():g}; take"
                    " another out=FOLDER"
                )
                return
        whole = not (self._out / "runs" / job.name / JSONL).exists()
        started = time.monotonic()
        process = self._spawn(job, "train", with_rate(job, rate).options)
        self._running.append(_Running(job, rate, process, "train", started, whole))
        self._say(f"{self._place()} {job.name}: {'started' if whole else 'goes on'}")

    def _spawn(self, job: Job, program: str, options: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self._out / "logs" / f"{job.name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"launch.{program}", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[self._lock.fileno()],
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def _look_after(self) -> None:
        """Handle the processes that have ended."""
        for running in list(self._running):
            code = running.process.poll()
            if code is None:
                continue
            self._running.remove(running)
            if code != 0:
                self._fail(running.job, code)
            elif running.program == "train" and running.job.analysed:
                folder = self._out / "runs" / running.job.name
                options = [f"run={quote(str(folder))}", f"symbols={self._preset.analysed_symbols}", "threads=1"]
                process = self._spawn(running.job, "analyse", options)
                self._running.append(replace(running, process=process, program="analyse"))
            else:
                self._finish(running)

    def _finish(self, running: _Running) -> None:
        job, folder = running.job, self._out / "runs" / running.job.name
        wall_seconds = time.monotonic() - running.started if running.whole else None
        found = collect(job, running.rate, folder, wall_seconds)
        write_json(self._results / f"{job.name}.json", found)
        self._done[job.name] = found
        for path in checkpoints(folder / "checkpoints")[1:]:
            shutil.rmtree(path)
        self._say(
            f"{self._place()} {job.name}: {found['split']} bpc {own_bpc(found):.4f} at its own k, "
            f"trained for {clock(found['measured']['training_seconds'])}; left {self._left()}"
        )

    def _fail(self, job: Job, code: int) -> None:
        log = self._out / "logs" / f"{job.name}.log"
        lines = log.read_text(errors="replace").strip().splitlines() or ["(no output)"]
        self._failed[job.name] = f"exit code {code}: {lines[-1]} ({log})"
        self._say(f"{self._place()} {job.name} failed with exit code {code}: {lines[-1]}")

    def _stop(self) -> None:
        """Let every process write its checkpoint and end; results of those that have just finished are kept."""
        for running in self._running:
            running.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        for running in self._running:
            try:
                running.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            if running.process.returncode == 0 and (running.program == "analyse" or not running.job.analysed):
                self._finish(running)
        self._running = []

    def _place(self) -> str:
        return f"[{len(self._done)}/{len(self._jobs)}]"

    def _share(self, job: Job) -> float:
        """Return the share of a run's steps that are logged."""
        try:
            step: int = read_lines(self._out / "runs" / job.name / JSONL, damaged=[])[-1]["step"]
        except (OSError, IndexError):
            return 0.0
        return step / job.config.train.steps

    def _left(self) -> str:
        """Estimate the time that is left from the runs that were not interrupted."""
        known: dict[str, list[float]] = {}
        for job in self._jobs:
            wall = self._done[job.name]["measured"]["wall_seconds"] if job.name in self._done else None
            if wall is not None:
                known.setdefault(job.arm, []).append(wall / _symbols(job))
        if not known:
            return "unknown"
        anyone = fmean([fmean(rates) for rates in known.values()])
        seconds = sum(
            fmean(known.get(job.arm, [anyone])) * _symbols(job) * (1 - self._share(job))
            for job in self._jobs
            if job.name not in self._done and job.name not in self._failed
        )
        return f"about {clock(seconds / self._at_once)}"


def _symbols(job: Job) -> int:
    return job.config.train.steps * job.config.symbols_per_step


def _end_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when the study dies, however it does."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
