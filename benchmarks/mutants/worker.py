"""A process that has the heavy libraries imported, none of ours, and forks a child for each run of tests it is asked
for.

Asked by lines of JSON on its input (a Job), answers by lines of JSON on its output. Our own packages are imported by
the child alone, from the tree it is told.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from benchmarks.mutants import server
from benchmarks.mutants.plugins import Chosen, Fixtures, Teller
from benchmarks.mutants.tracing import sitecustomize


@dataclass(frozen=True, slots=True)
class Job:
    """One run of tests."""

    tree: str
    files: list[str]  # of tests
    scratch: str  # a new folder
    seconds: float  # for all of it
    tests: list[str] | None = None  # None: all of the files
    limits: dict[str, float] = field(default_factory=dict)  # seconds of a test
    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)  # of pytest


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a run."""

    end: str  # passed, failed, hung (in a test, beyond its limit), cut (beyond the time of all)
    test: str  # that failed or hung
    seconds: float


def run(job: Job) -> Answer:
    """Run the tests in a child; its files and processes are removed."""
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _work(job)
    end, test = "", ""
    while not end:
        done, status = os.waitpid(child, os.WNOHANG)
        test, since, failed = _now(Path(job.scratch) / "told")
        if done:
            code = os.waitstatus_to_exitcode(status)
            end = "passed" if code in (0, 5) else "failed"
            test = failed or test if end == "failed" else ""
        elif test and time.monotonic() - since > job.limits.get(test, job.seconds):
            end = "hung"
        elif time.monotonic() - begin > job.seconds:
            end = "cut"
        time.sleep(min(0.02 + (time.monotonic() - begin) / 200, 0.5))
    _end(child, reap=not done)
    return Answer(end, test, round(time.monotonic() - begin, 2))


def _now(told: Path) -> tuple[str, float, str]:
    """Name the test that runs (or ran last), since when, and the one that failed."""
    test, since, failed = "", 0.0, ""
    with contextlib.suppress(FileNotFoundError):
        for line in told.read_text().split("\n")[:-1]:
            event = json.loads(line)
            if "start" in event:
                test, since = event["start"], event["at"]
            elif event.get("failed"):
                failed = event["end"]
    return test, since, failed


def _end(child: int, *, reap: bool) -> None:
    """End the remaining processes of a child: its session is its own."""
    kin = []
    if reap:
        with contextlib.suppress(psutil.Error):
            kin = psutil.Process(child).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    for one in kin:
        with contextlib.suppress(psutil.Error):
            one.kill()
    if reap:
        os.waitpid(child, 0)


def _work(job: Job) -> None:
    code = 1
    try:
        os.setsid()
        log = os.open(f"{job.scratch}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.chdir(job.tree)
        os.environ.update(job.environment)
        for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
            del sys.modules[name]
        sys.path[:] = [job.tree, *sys.path[1:]]  # in place of the root that has this file
        sys.dont_write_bytecode = True
        sys.modules["__main__"] = ModuleType("__main__")  # ranks would import this file
        plugins = _plugins(job)
        server.lend()
        code = int(pytest.main(_arguments(job), plugins=plugins))
    finally:
        os._exit(code)


def _arguments(job: Job) -> list[str]:
    quiet = ["-q", "-p", "no:cacheprovider", "--basetemp", f"{job.scratch}/tmp"]
    return [*quiet, *job.arguments, *job.files]


def _plugins(job: Job) -> list[Any]:
    teller = Teller(Path(job.scratch) / "told")
    plugins: list[Any] = [teller]
    if job.tests is not None:
        plugins.append(Chosen(job.tests))
    if "FOREROUTE_TRACE" in job.environment:
        plugins.append(Fixtures(teller))
        sitecustomize.start(job.environment["FOREROUTE_TRACE"])
    return plugins


def main() -> None:
    """Import what the arguments name, then answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        answer = run(Job(**json.loads(line)))
        answers.write(json.dumps(asdict(answer)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
