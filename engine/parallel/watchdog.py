"""A hang is a message: when a rank is lost, fails or falls behind, every other rank ends with a line that says which
and why.

Each rank leaves a sign of life and the place that it has reached in a store (torch.distributed's key-value store), once
a period, and looks whether its right neighbour still does, whether anybody has reported a fault, and whether its own
main thread gets on. A thread of its own does this, so it also ends a process whose main thread waits inside a
collective for ever: the collectives themselves wait without an end (FOR_EVER).

A job that is suspended as a whole (scontrol suspend, a paused virtual machine, a laptop's lid) goes on when it wakes
up: time in which a process did not run at all counts for nobody.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from foreroute.engine.errors import RunFailed, UserError
from foreroute.engine.parallel.cpu_group import named, odd_ones

_FAULT, _DONE = "fault", "done"
FOR_EVER = timedelta(days=23)
"""For the collectives of ranks that are watched; what their clocks, of 32-bit milliseconds, can say. One that gave up
by its own clock would do so after a suspension."""
_LONG_S = 3600.0  # what no place takes, such as a checkpoint, or rank 0 that builds tables
_CLOSE_S = 10.0  # how long `close` waits for a thread, which may wait for the store
_MARKS = ("gloo", "Gloo", "NCCL", "Connection closed", "Connection reset", "MPI_ERR", "TCPStore")


def end_process(line: str) -> None:
    """Print the line and end the process at once; its main thread may wait for ever."""
    sys.stderr.write(f"foreroute: {line}\n")
    sys.stderr.flush()
    os._exit(1)


class _AwakeClock:
    """Seconds in which the process ran, for threads one of which asks often: a gap between two looks is left out."""

    def __init__(self, gap_s: float) -> None:
        self._gap_s, self._looked, self._slept_s = gap_s, time.monotonic(), 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        """Return the seconds until now, from an arbitrary start."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked > self._gap_s:
                self._slept_s += now - self._looked
            self._looked = now
            return now - self._slept_s


_GONE = object()


class _AskedStore:
    """A store that may not answer, as after a network failure, where some of its calls would wait for ever.

    A thread of its own makes the calls, one at a time. After one without an answer nothing is asked any more.
    """

    def __init__(self, store: Any, answer_s: float) -> None:
        self._store, self._answer_s, self._gone = store, answer_s, False
        self._calls: queue.SimpleQueue[tuple[Callable[[Any], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="foreroute-store", daemon=True)
        self._thread.start()

    def ask(self, use: Callable[[Any], Any]) -> Any:
        """Return use(store); _GONE if the process that holds the store has ended or does not answer."""
        if self._gone:
            return _GONE
        answer: Future[Any] = Future()
        self._calls.put((use, answer))
        for _ in range(2):  # where a process stood still as a whole, the first wait is over at once
            try:
                return answer.result(self._answer_s / 2)
            except TimeoutError:
                continue
        self._gone = True
        return _GONE

    def close(self) -> None:
        """End the thread: the interpreter's end would abort it inside the store."""
        self._calls.put(None)
        self._thread.join(0.0 if self._gone else _CLOSE_S)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            use, answer = call
            try:
                answer.set_result(use(self._store))
            except RuntimeError:  # torch.distributed's errors are
                answer.set_result(_GONE)
            except Exception as bug:
                answer.set_exception(bug)


class Watchdog:
    """Signs of life of one rank; without a store (one rank alone) it does nothing."""

    def __init__(
        self,
        store: "dist.Store | None" = None,
        rank: int = 0,
        ranks: int = 1,
        timeout_s: float = 120.0,
        end: Callable[[str], None] = end_process,
    ) -> None:
        """Start to watch.

        Args:
            store: used by one thread of this object only; a clone, so that a wait of another user does not block it.
            timeout_s: seconds from the last sign of life of a rank to the end of the others.
            end: what ends the process.
        """
        self._rank, self._ranks, self._end = rank, ranks, end
        self._lost_after_s = timeout_s / 2  # half to notice, half to end
        self._period_s = min(1.0, timeout_s / 10)
        self._clock = _AwakeClock(self._period_s + self._lost_after_s / 2)
        self._place, self._since, self._limit_s = "the start", self._clock.now(), _LONG_S
        self._timeout_s, self._beats = timeout_s, 0
        self._store = None if store is None else _AskedStore(store, max(1.0, self._lost_after_s))
        self._closed = threading.Event()
        self._spoken = False  # the main thread is ending with a line of its own
        self._reported = ""  # why this rank ends
        self._thread = threading.Thread(target=self._run, name="foreroute-watch", daemon=True)
        if store is not None and ranks > 1:
            self._thread.start()

    def at(self, place: str, *, timeouts: float | None = None) -> None:
        """Note the main thread's work, such as "step 12"; it is named when this rank keeps others waiting.

        Args:
            timeouts: it takes less than so many timeout_s, without it less than an hour; otherwise the ranks end, for
                some wait for ever.
        """
        self._limit_s = _LONG_S if timeouts is None else timeouts * self._timeout_s
        self._place, self._since = place, self._clock.now()

    def gets_on(self) -> None:
        """Note that a part of what the main thread is doing is done, and that the next one takes less than
        timeout_s."""
        self.at(self._place, timeouts=1)

    def close(self) -> None:
        """Note that this rank has come to its end, so that the others stop waiting for its signs."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)
        self._try(lambda store: store.set(f"alive/{self._rank}", _DONE))
        if self._store is not None:
            self._store.close()
        if self._reported and self._rank == 0 and self._ranks > 1:
            time.sleep(2 * self._period_s)  # its store may end with it: let the others read why

    def report(self, message: str) -> None:
        """Report to the other ranks why this one ends; the first report of all counts."""
        self._spoken, self._reported = True, message
        self._post(message)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Report what ends the block by an exception; one that only follows from another rank's end becomes
        RunFailed."""
        try:
            yield
        except (UserError, RunFailed) as error:
            if not error.everywhere:
                self.report(str(error))
            raise
        except RuntimeError as error:
            if self._ranks > 1 and any(mark in str(error) for mark in _MARKS):
                raise RunFailed(self.explain(error)) from error
            self.report(f"{type(error).__name__}: {error}")
            raise
        except BaseException as error:
            self.report(f"{type(error).__name__} {error}".strip())
            raise

    def explain(self, error: Exception) -> str:
        """Find out which rank a failed collective is to be blamed on; takes a few periods."""
        if self._reported:  # the others ended because this one did
            return self._reported
        self._spoken = True
        first = self._signs()
        deadline = time.monotonic() + 5 * self._period_s
        while time.monotonic() < deadline:
            fault = self._fault()
            if fault is not None:
                return fault
            time.sleep(self._period_s / 4)
        last = self._signs()
        silent = [
            rank for rank, sign in enumerate(last) if rank != self._rank and sign == first[rank] and sign != _DONE
        ]
        if silent:
            message = f"{named(silent, 'is', 'are')} lost: no sign of life, last seen at {_place(last[silent[0]])}"
            self.report(message)
            return message
        places = [_place(sign) for sign in last]
        behind = [rank for rank, place in enumerate(places) if place != places[self._rank]]
        message = f"all ranks are alive and at {places[0]}: {str(error).splitlines()[0]}"
        if behind:
            where = f"rank {behind[0]} is at {places[behind[0]]}, rank {self._rank} at {places[self._rank]}"
            message = f"{where}: {str(error).splitlines()[0]}"
        self.report(message)  # a rank that is stuck would go on for ever
        return message

    def _run(self) -> None:
        neighbour = (self._rank + 1) % self._ranks
        sign, since = "", self._clock.now()
        while not self._closed.wait(self._period_s):
            self._clock.now()
            self._beats += 1
            beat = f"{self._beats} {self._place}"
            self._try(lambda store: store.set(f"alive/{self._rank}", beat))  # noqa: B023
            fault = self._fault()
            if fault is not None:
                self._leave(fault)
                return
            now = self._sign(neighbour)
            if now != sign or now == _DONE:
                sign, since = now, self._clock.now()
            elif self._clock.now() - since > self._lost_after_s:
                silence = f"no sign of life for {self._lost_after_s:.0f} s, last seen at {_place(sign)}"
                self._post(f"{named([neighbour], 'is', 'are')} lost: {silence}")
            limit_s = self._limit_s
            if self._clock.now() - self._since > limit_s:
                places = odd_ones([_place(sign) for sign in self._signs()], "is at", "are at")
                self._post(f"no progress for {limit_s:.0f} s: {places}")

    def _leave(self, fault: str) -> None:
        """Leave the main thread time to end by itself, as failed collectives make it do."""
        self._closed.wait(self._lost_after_s / 2)
        if not self._closed.is_set() and not self._spoken:
            self._end(fault)

    def _post(self, message: str) -> None:
        self._try(lambda store: store.compare_set(_FAULT, "", f"{self._rank} {message}"))

    def _fault(self) -> str | None:
        """Return the report of a fault; None if there is none."""
        present = self._try(lambda store: store.check([_FAULT]))
        if present is False:
            return None
        found = _GONE if present is _GONE else self._try(lambda store: store.get(_FAULT))
        if found is _GONE:
            return "rank 0 is lost: its store does not answer"
        rank, message = found.decode().split(" ", 1)
        by_all = message.startswith(("rank ", "ranks ", "no progress "))
        return message if by_all else f"rank {rank} ended: {message}"

    def _signs(self) -> list[str]:
        return [self._sign(rank) for rank in range(self._ranks)]

    def _sign(self, rank: int) -> str:
        key = f"alive/{rank}"
        if self._try(lambda store: store.check([key])) is not True:
            return ""
        found = self._try(lambda store: store.get(key))
        return "" if found is _GONE else found.decode()

    def _try(self, use: Callable[[Any], Any]) -> Any:
        """Use the store; _GONE if there is none any more."""
        return _GONE if self._store is None else self._store.ask(use)


def _place(sign: str) -> str:
    return "its end" if sign == _DONE else sign.partition(" ")[2] or "the start"
