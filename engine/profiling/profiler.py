"""Profile a few steps: a trace for Perfetto on every rank, and a summary of the most expensive ranges.

The run's folder then holds, here for profile.steps=[5,8]:

    trace/step5-8.rank0.json.gz  one for every rank, written by that rank (rank 0 writes all other files of a run)
    trace/step5-8.json.gz        the merged traces of 2 to 8 ranks that share the folder
    trace/step5-8.txt            the summary, which rank 0 also prints

Our ranges (engine/tracing.py) and PyTorch's profiler use different clocks; all times are converted to rank 0's time of
day. If a file cannot be written, rank 0 reports it, and training continues.
"""

import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreroute.engine.config import ProfileConfig
from foreroute.engine.metrics.timers import StepTimes
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.world import World
from foreroute.engine.profiling.trace_events import Clock, Event, Process, collective_events, range_events, torch_events
from foreroute.engine.profiling.trace_summary import Nested, costs, nest, overlap_ms, summary
from foreroute.engine.sealed_files import replacing
from foreroute.engine.tracing import InFlight, Range, Recorder, record_into, span

MERGED_RANKS = 8
"""The largest number of ranks whose traces are merged into one file."""
_CLOCK_ROUNDS = 8
QUIET = "6"
"""Above the log level at which PyTorch's profiler reports its start and stop on stderr."""


class Profiler:
    """Traces some steps of a run, if configured; all ranks make the same calls in every step."""

    def __init__(
        self, config: ProfileConfig, folder: Path, world: World, note: Callable[[str], None], *, done: int = 0
    ) -> None:
        """Set up without tracing.

        Args:
            folder: the folder for the files.
            note: prints a line, on rank 0.
            done: number of steps trained before.
        """
        first, last = config.steps or (1, 0)
        self._steps, self._operators = range(first, last + 1), config.operators
        self._folder, self._world, self._note = folder, world, note
        self._process = Process(world.mesh.rank, world.mesh.world)
        self._recorder: Recorder | None = None
        self._torch: torch.profiler.profile | None = None
        self._step: AbstractContextManager[None] | None = None  # the step's own range
        self._traced: list[int] = []  # steps begun
        self._times: list[StepTimes] = []  # of steps that ended
        if config.steps and done >= first:
            note(f"profile.steps={config.steps}: {done} steps are done, only later ones are traced")

    def begin(self, step: int) -> None:
        """Begin a step, counted from 1; the first traced step starts the recording, which is a collective."""
        if step not in self._steps:
            return
        if self._recorder is None:
            self._start()
        self._traced.append(step)
        self._step = span(f"step {step}")
        self._step.__enter__()

    @property
    def in_step(self) -> bool:
        """Whether a traced step has begun and not ended."""
        return self._step is not None

    def end(self, step: int, times: Sequence[StepTimes]) -> None:
        """End a step; after the last traced step the files are written, which is a collective.

        Args:
            times: times of the steps read so far; the last one is of this step if it is traced.
        """
        if step not in self._traced:
            return
        self._end_step()
        self._times.append(times[-1])
        if step == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write a recording that is not written yet; a collective."""
        if self._recorder is not None:
            self._world.watchdog.at(f"the trace of {self._title}")
            self._report(self._world.cpu_group.gather(self._stop(self._recorder)))

    def leave(self) -> None:
        """Write this rank's recording without the other ranks, which may be lost."""
        if self._recorder is not None:
            own = self._stop(self._recorder)
            if self._world.first:
                self._report([own])

    @property
    def _title(self) -> str:
        first, last = self._traced[0], self._traced[-1]
        return f"step {first}" if first == last else f"steps {first} to {last}"

    def _file(self, ending: str) -> Path:
        return self._folder / f"step{self._traced[0]}-{self._traced[-1]}.{ending}"

    def _start(self) -> None:
        self._clock = agree_on_clock(self._world.cpu_group)
        if self._operators:
            os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
            self._torch = torch.profiler.profile(activities=torch.profiler.supported_activities())
            self._torch.start()
        self._recorder = Recorder(annotate=self._operators)
        record_into(self._recorder)

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _stop(self, recorder: Recorder) -> dict[str, Any]:
        """End the recording and write this rank's file; return this rank's results for the summary."""
        self._end_step()
        record_into(None)
        self._recorder = None
        profiler, self._torch = self._torch, None
        if profiler is not None:
            profiler.stop()
        # Ranges that other threads began earlier may still be added.
        recorded, flights = list(recorder.ranges), list(recorder.collectives)
        issued = [Range("", f.thread, f.issued_ns, f.issued_ns) for f in flights]
        nested = nest([*recorded, *issued])
        ranges, places = nested[: len(recorded)], nested[len(recorded) :]
        issued_in = [place.path.rpartition("/")[0] for place in places]
        events = [
            *range_events(ranges, self._process, self._clock),
            *collective_events(flights, issued_in, self._process, self._clock),
        ]
        return {
            "costs": costs(ranges),
            "overlap_ms": self._overlap_ms(ranges, flights, issued_in),
            "problem": self._attempt(lambda: self._write_own(profiler, events, ranges)),
        }

    def _overlap_ms(self, ranges: list[Nested], flights: list[InFlight], issued_in: list[str]) -> list[float]:
        """Return the exchange's exposed and hidden time per step."""
        steps = len(self._traced)
        if self._world.device.type == "cuda":
            # Flights are the device's, and not recorded; the steps have their times.
            found = [(t.exchange_exposed_ms, t.exchange_hidden_ms) for t in self._times]
            return [sum(column) / steps for column in zip(*found, strict=True)] or [0.0, 0.0]
        in_steps = [f for f, path in zip(flights, issued_in, strict=True) if path.startswith("step ")]
        waits = [part for part in ranges if part.path.startswith("step ")]
        return [value / steps for value in overlap_ms(waits, in_steps)]

    def _write_own(self, profiler: torch.profiler.profile | None, events: list[Event], ranges: list[Nested]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        more: dict[str, Any] = {}
        if profiler is not None:
            more = self._export(profiler)
            names = {part.name for part in ranges}
            events = events + torch_events(more, self._process, self._clock, names)
        more |= {
            "distributedInfo": {"rank": self._process.rank, "world_size": self._process.world},
            "clock_unsure_us": self._clock.unsure_ns / 1e3,
        }
        _write(self._file(f"rank{self._process.rank}.json.gz"), events, self._clock, more)

    def _export(self, profiler: torch.profiler.profile) -> dict[str, Any]:
        """Return the recording of PyTorch's profiler, which is available only through a file."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            path = Path(folder) / "torch.json"
            profiler.export_chrome_trace(str(path))
            try:
                found: dict[str, Any] = json.loads(path.read_text())
            except (FileNotFoundError, json.JSONDecodeError) as error:  # the profiler itself does not report it
                raise OSError(f"PyTorch's profiler could not write into {self._folder}") from error
        return found

    def _report(self, ranks: list[dict[str, Any]]) -> None:
        """On rank 0, merge the ranks' traces, write them and print the summary; `ranks` may hold rank 0 alone."""
        if not self._world.first:
            return
        text = summary(self._title, ranks)
        for line in text.splitlines():
            self._note(line)
        problems = {f"rank {rank}: ": own["problem"] for rank, own in enumerate(ranks)}
        problems[""] = self._attempt(lambda: self._write_together(text, len(ranks)))
        for who, problem in problems.items():
            if problem is not None:
                self._note(f"cannot write the trace of {self._title}: {who}{problem}; the run goes on")
                return
        self._note(f"{self._folder}: the trace of {self._title}, for https://ui.perfetto.dev")

    def _write_together(self, text: str, num_ranks: int) -> None:
        with replacing(self._file("txt")) as path:
            path.write_text(text + "\n")
        files = [self._file(f"rank{rank}.json.gz") for rank in range(num_ranks)]
        if 2 <= num_ranks <= MERGED_RANKS and all(file.exists() for file in files):
            traces = (json.loads(gzip.decompress(file.read_bytes())) for file in files)
            events = (event for trace in traces for event in trace["traceEvents"])
            _write(self._file("json.gz"), events, self._clock, {})

    @staticmethod
    def _attempt(write: Callable[[], None]) -> str | None:
        """Call write; return the message of an OSError, or None."""
        try:
            write()
        except OSError as error:
            return str(error)
        return None


def agree_on_clock(cpu_group: CpuGroup) -> Clock:
    """Estimate the difference between this rank's time of day and rank 0's; a collective.

    No rank leaves a barrier before the others have entered it. So the difference of two ranks' clocks is at least (one
    rank's entry - the other's exit), and at most the reverse. The tightest bounds of a few barriers are used. If they
    include 0, as between ranks of one machine, the estimate is 0, else the middle of the bounds.
    """
    marks = []
    for _ in range(_CLOCK_ROUNDS):
        entry = time.time_ns()
        cpu_group.barrier()
        marks.append((entry, time.time_ns()))
    marks_PR2 = cpu_group.all_gather(np.array(marks))
    (entry_0, exit_0), (entry_own, exit_own) = marks_PR2[0].T, marks_PR2[cpu_group.rank].T
    low, high = int((entry_0 - exit_own).max()), int((exit_0 - entry_own).min())
    apart = not low <= 0 <= high
    return Clock(
        wall_ns=_wall_ns(),
        shift_ns=(low + high) // 2 if apart else 0,
        unsure_ns=(high - low) // 2 if apart else 0,
        origin_ns=int(exit_0[-1]),
    )


def _wall_ns() -> int:
    """Return the offset from time.perf_counter_ns to the time of day, by the shortest of a few readings."""
    found = []
    for _ in range(10):
        before, wall, after = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        found.append((after - before, wall - (before + after) // 2))
    return min(found)[1]


def _write(path: Path, events: Iterable[Event], clock: Clock, more: dict[str, Any]) -> None:
    trace = {**more, "displayTimeUnit": "ms", "baseTimeNanoseconds": clock.origin_ns, "traceEvents": list(events)}
    with replacing(path) as new, gzip.open(new, "wt", compresslevel=3) as file:
        json.dump(trace, file)
