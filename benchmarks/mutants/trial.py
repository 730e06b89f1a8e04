"""Try mutants: each in a worker's tree, with the tests that run its line, until one of them fails.

A mutant is noticed when a test fails or its file cannot be loaded, and when a test hangs: it takes over 20 s more than
five times what it took when it was recorded. When a minute is over, or no test is left, it has survived.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.mutants.choose import Chooser
from benchmarks.mutants.equivalent import Equivalent
from benchmarks.mutants.pool import Worker, over_workers
from benchmarks.mutants.record import ARGUMENTS, record_all
from benchmarks.mutants.rooms import Mutant, draw
from benchmarks.mutants.worker import Job

SECONDS = 60.0  # of a mutant
_START = 3.0  # seconds of a process before its first test
_CHOSEN = 40.0  # seconds that the chosen tests took when they were recorded


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a mutant."""

    mutant: Mutant
    noticed: bool
    by: str  # the test; of a survivor, why
    seconds: float
    said: str  # the mutant in a line


class Trial:
    """Mutants of one tree, which must not change meanwhile; the record of its tests is kept in a folder."""

    def __init__(
        self,
        root: Path,
        kept: Path,
        workers: list[Worker],
        rooms: dict[str, tuple[str, ...]],
        equivalents: list[Equivalent],
    ) -> None:
        self._root, self._workers, self._rooms, self._equivalents = (root, workers, rooms, equivalents)
        packages = sorted({pattern.split("/")[0] for patterns in rooms.values() for pattern in patterns})
        self._chooser = Chooser(root, record_all(root, kept, workers, packages))

    def run(self, count: int, seed: int) -> tuple[list[Verdict], list[Mutant]]:
        """Try so many mutants; return their outcomes, and the equivalent ones that were drawn and left out."""
        left_out: list[Mutant] = []
        mutants = list(islice(self._others(seed, left_out), count))
        return over_workers(self._workers, mutants, self._try), left_out

    def _others(self, seed: int, left_out: list[Mutant]) -> Iterator[Mutant]:
        for mutant in draw(self._root, self._rooms, seed):
            line = self._line(mutant)
            if any(e.covers(mutant.file, line, mutant.place, mutant.new) for e in self._equivalents):
                left_out.append(mutant)
            else:
                yield mutant

    def _line(self, mutant: Mutant) -> str:
        return (self._root / mutant.file).read_text().splitlines()[mutant.place.line - 1]

    def _try(self, worker: Worker, mutant: Mutant) -> Verdict:
        begin = time.monotonic()
        source = (self._root / mutant.file).read_text()
        with worker.changed(mutant.file, mutant.place.apply(source, mutant.new)):
            noticed, by = self._ask(worker, mutant)
        seconds = round(time.monotonic() - begin, 1)
        said = mutant.describe(self._line(mutant))
        verdict = Verdict(mutant, noticed, by, seconds, said)
        print(f"{'noticed' if noticed else 'SURVIVED'} {seconds:5.1f} s  {said}  [{by}]", file=sys.stderr, flush=True)
        return verdict

    def _ask(self, worker: Worker, mutant: Mutant) -> tuple[bool, str]:
        tests = self._chooser.tests_of(mutant.file, mutant.place)
        if not tests:
            return False, "no test runs it"
        deadline, asked = time.monotonic() + SECONDS, 0
        for batch in self._chooser.batches(mutant.file, tests, _CHOSEN):
            left = deadline - time.monotonic()
            if left < _START:
                break
            files = list(dict.fromkeys(test.partition("::")[0] for test in batch.tests))
            job = Job(
                "",
                files,
                "",
                left,
                batch.tests,
                self._chooser.limits(batch.tests),
                {"PYTHONPATH": str(worker.tree)},
                ["-x", *ARGUMENTS],
            )
            answer = worker.run(job, interpreted=batch.interpreted)
            asked += len(batch.tests)
            if answer.end in ("failed", "hung"):
                return True, f"{answer.end}: {answer.test}"
            if answer.end == "cut":
                break
        return False, f"{asked} of {len(tests)} tests asked"
