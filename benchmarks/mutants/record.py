"""Which test runs which lines: one run of each file of tests under tracing, kept by what it depends on.

A record is kept (in .cache/mutants) by a digest of the packages, of that file of tests and of what all tests share: a
test that is added makes one file run again.
"""

import hashlib
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.mutants import worker
from benchmarks.mutants.pool import Worker, over_workers

INTERPRETED = "tests/kernels/on_triton/"
LEFT_OUT = ("tests/benchmarks/", "tests/launch/", "tests/kernels/test_static_gate.py", "tests/test_dockerfile.py")
"""Tests that are not asked: of the benchmarks; of programs, which start for seconds, and most in a browser; and the
compilation for GPUs, which says no result."""
ARGUMENTS = ["-m", "not slow and not gpu and not cluster"]
_SECONDS = 1800.0  # of one file's recording
_TRACING = Path(__file__).resolve().parent / "tracing"
_KEEPS = re.compile(r"lru_cache|functools\.cache|^@cache", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Record:
    """The lines that a file of tests runs, by test or by a fixture that several tests share."""

    seconds: dict[str, float]  # of tests and fixtures
    passed: dict[str, bool]  # by test
    fixtures: dict[str, list[str]]  # by test: those it uses
    lines: dict[str, dict[str, list[int]]]  # by test or fixture, by source file
    keeps: bool  # what one test has made, another may use: a cached function


def record_all(root: Path, kept: Path, workers: list[Worker], packages: list[str]) -> dict[str, Record]:
    """Record every file of a tree's tests, or read what is kept in a folder; by file."""
    files = [
        file
        for file in sorted(str(path.relative_to(root)) for path in root.glob("tests/**/test_*.py"))
        if not file.startswith(LEFT_OUT)
    ]
    shared = _digest(root, _shared(root, packages))
    kept.mkdir(parents=True, exist_ok=True)

    def one(own: Worker, file: str) -> Record:
        path = kept / f"{_digest(root, [file], shared)}.json"
        if not path.exists():
            path.write_text(json.dumps(asdict(_record(own, root, file, packages))))
        return Record(**json.loads(path.read_text()))

    return dict(zip(files, over_workers(workers, files, one), strict=True))


def _shared(root: Path, packages: list[str]) -> list[str]:
    """Return the packages' sources, and the files of tests/ that are no tests."""
    found = [path for package in packages for path in root.glob(f"{package}/**/*.py")]
    found += [path for path in root.glob("tests/**/*.py") if not path.name.startswith("test_")]
    return sorted(str(path.relative_to(root)) for path in found)


def _digest(root: Path, files: Iterable[str], before: str = "") -> str:
    digest = hashlib.sha256(before.encode())
    for file in files:
        digest.update(f"{file}\n".encode() + (root / file).read_bytes())
    return digest.hexdigest()[:24]


def _record(own: Worker, root: Path, file: str, packages: list[str]) -> Record:
    folder = own.tree.parent / "trace"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    options = {"root": str(own.tree), "packages": packages, "folder": str(folder)}
    environment = {
        "FOREROUTE_TRACE": json.dumps(options),
        "PYTHONPATH": os.pathsep.join([str(_TRACING), str(own.tree)]),
    }
    job = worker.Job("", [file], "", _SECONDS, environment=environment, arguments=ARGUMENTS)
    answer = own.run(job, interpreted=file.startswith(INTERPRETED))
    print(f"recorded {file}: {answer.end}, {answer.seconds:.0f} s", file=sys.stderr, flush=True)
    keeps = bool(_KEEPS.search((root / file).read_text()))
    return Record(*_told(own.told()), _lines(folder), keeps)


def _told(events: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, bool], dict[str, list[str]]]:
    """Return seconds, outcomes and fixtures from the reports of a run."""
    seconds: dict[str, float] = {}
    passed: dict[str, bool] = {}
    fixtures: dict[str, list[str]] = {}
    begun, shared = 0.0, 0.0
    for event in events:
        if "start" in event:
            begun, shared = event["at"], 0.0
        elif "fixture" in event:
            seconds[event["fixture"]] = event["seconds"]
            shared += event["seconds"]
        elif "uses" in event:
            fixtures[event["uses"]] = event["fixtures"]
        elif "end" in event:
            seconds[event["end"]] = max(event["at"] - begun - shared, 0.0)
            passed[event["end"]] = not event["failed"] and event["end"] in fixtures
    return seconds, passed, fixtures


def _lines(folder: Path) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for path in folder.iterdir():
        test = ""
        for line in path.read_text().split("\n")[:-1]:
            if line.startswith("@"):
                test = re.sub(r" \((setup|call|teardown)\)$", "", line[1:])
            else:
                file, _, number = line.rpartition(":")
                found[test][file].add(int(number))
    found.pop("", None)
    return {test: {file: sorted(lines) for file, lines in files.items()} for test, files in found.items()}
