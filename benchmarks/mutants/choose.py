"""Which tests to run for a place, and in which order.

Asked are tests that run a line of the place's statement, themselves or in a fixture of theirs, in any of their
processes. A place that runs at import (a constant, a default) has no such line: asked are those that run a line with
the name that it gives, else those that run any line of its file; and all of the file's mirror. Where a file of tests
keeps what one test has made for another, all its tests are asked.

First come the tests of the file's own mirror under tests/, then the others; of each the fast ones first, then the slow
ones in an order by chance. What would go beyond the time of a mutant is left out.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from benchmarks.mutants.places import Place
from benchmarks.mutants.record import INTERPRETED, Record

_FAST = 0.5  # seconds
_TRACED = 6.0  # how much slower Triton's interpreter is when it is recorded (836 s against 140 s for a file)
_Line = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Batch:
    """Tests that run in one process."""

    tests: list[str]
    interpreted: bool
    seconds: float  # that they took when they were recorded


class Chooser:
    """Knows all records of a tree."""

    def __init__(self, root: Path, records: dict[str, Record]) -> None:
        self._root, self._records = root, records
        self._runs: dict[_Line, set[str]] = defaultdict(set)  # tests and fixtures
        self._file_of: dict[str, str] = {}
        users: dict[str, set[str]] = defaultdict(set)
        for file, record in records.items():
            for test, fixtures in record.fixtures.items():
                self._file_of[test] = file
                for name in (test, *fixtures):
                    users[name].add(test)
        self._users = users
        self._took = {
            name: took / (_TRACED if file.startswith(INTERPRETED) else 1)
            for file, record in records.items()
            for name, took in record.seconds.items()
        }
        for record in records.values():
            for name, files in record.lines.items():
                for source, lines in files.items():
                    for line in lines:
                        self._runs[source, line].add(name)

    def tests_of(self, file: str, place: Place) -> set[str]:
        """Find the tests that can notice a change."""
        found = self._tests(self._lines_of(file, place))
        if place.names is not None:
            found = found or self._tests(line for line in self._runs if line[0] == file)
            mirrors = (r.fixtures for own, r in self._records.items() if _is_mirror(own, file))
            found |= set(chain.from_iterable(mirrors))
        for kept in {self._file_of[test] for test in found}:
            if self._records[kept].keeps:
                found |= set(self._records[kept].fixtures)
        return {test for test in found if self._records[self._file_of[test]].passed.get(test)}

    def batches(self, file: str, tests: Iterable[str], seconds: float) -> list[Batch]:
        """Order the tests, as many as take so many seconds, by suite and by speed."""
        groups: dict[tuple[int, bool], list[str]] = defaultdict(list)
        for test in tests:
            own = self._file_of[test]
            near = _is_mirror(own, file)
            fast = self._seconds(test) < _FAST
            groups[
                {(True, True): 0, (True, False): 1, (False, True): 1, (False, False): 2}[near, fast],
                own.startswith(INTERPRETED),
            ].append(test)
        batches, left = [], seconds
        for (_, interpreted), group in sorted(groups.items()):
            chosen, left = self._fill(group, left)
            if chosen:
                took = self._total(chosen)
                batches.append(Batch(chosen, interpreted, took))
        return batches

    def limits(self, tests: Iterable[str]) -> dict[str, float]:
        """Return the seconds after which a test hangs: several times its recorded time, and never few."""
        return {test: 20.0 + 5 * self._seconds(test) for test in tests}

    def _fill(self, group: list[str], left: float) -> tuple[list[str], float]:
        """Take tests, one file's together: the fast ones by speed, a sample of the slow ones."""
        chosen: dict[str, list[str]] = defaultdict(list)
        fixtures: set[str] = set()
        for test in sorted(group, key=self._turn):
            record = self._records[self._file_of[test]]
            new = set(record.fixtures[test]) - fixtures
            cost = sum(self._took[name] for name in (test, *new))
            if cost <= left:
                left -= cost
                fixtures |= new
                chosen[self._file_of[test]].append(test)
        return [test for tests in chosen.values() for test in tests], left

    def _turn(self, test: str) -> tuple[float, str]:
        fast = self._seconds(test) < _FAST
        return (self._seconds(test) if fast else _FAST, hashlib.sha256(test.encode()).hexdigest())

    def _total(self, tests: list[str]) -> float:
        fixtures = (self._records[self._file_of[test]].fixtures[test] for test in tests)
        return sum(self._took[name] for name in {*tests, *chain.from_iterable(fixtures)})

    def _seconds(self, test: str) -> float:
        fixtures = self._records[self._file_of[test]].fixtures[test]
        return sum(self._took[name] for name in (test, *fixtures))

    def _tests(self, lines: Iterable[_Line]) -> set[str]:
        names = set().union(*(self._runs.get(line, ()) for line in lines))
        return set().union(*(self._users.get(name, ()) for name in names))

    def _lines_of(self, file: str, place: Place) -> Iterable[_Line]:
        if place.names is None:
            return [(file, line) for line in range(place.statement[0], place.statement[1] + 1)]
        if not place.names:
            return []
        words = re.compile(rf"\b({'|'.join(map(re.escape, place.names))})\b")
        lines = []
        for source in {source for source, _ in self._runs}:
            for number, text in enumerate((self._root / source).read_text().splitlines(), 1):
                if words.search(text):
                    lines.append((source, number))
        return lines


def _is_mirror(tests: str, file: str) -> bool:
    """Return whether a file of tests is that of a source file by its name."""
    name = re.escape(Path(file).stem.removesuffix("_triton"))
    return re.search(rf"test_{name}(_on_ranks|_ranks)?\.py$", tests) is not None
