"""A hang is a message: when a rank is lost, fails or stays behind, every other rank ends with a line that says which and why.

Each rank leaves a sign of life and the place that it has reached in a store (torch.distributed's key-value store), once a
period, and looks whether its right neighbour still does and whether anybody has reported a fault. A thread of its own does
this, so it also ends a process whose main thread waits inside a collective for ever.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed as dist

from engine.errors import RunFailed, UserError

_FAULT, _DONE = "fault", "done"
_CLOSE_S = 10.0  # how long `close` waits for the thread, which may wait for the store
_MARKS = ("gloo", "Gloo", "NCCL", "Connection closed", "Connection reset", "MPI_ERR", "TCPStore")


def end_process(line: str) -> None:
    """Print the line and end the process at once; its main thread may wait for ever."""
    sys.stderr.write(f"foreroute: {line}\n")
    sys.stderr.flush()
    os._exit(1)


class Watch:
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
            store: used by this object's threads only; a clone, so that a wait of another user does not block it.
            timeout_s: seconds from the last sign of life of a rank to the end of the others.
            end: what ends the process.
        """
        self._store, self._rank, self._ranks, self._end = store, rank, ranks, end
        self._lost_after_s = timeout_s / 2  # half to notice, half to end
        self._period_s = min(1.0, timeout_s / 10)
        self._place = "the start"
        self._beats = 0
        self._lock = threading.Lock()  # one use of the store at a time
        self._closed = threading.Event()
        self._spoken = False  # the main thread is ending with a line of its own
        self._thread = threading.Thread(target=self._run, name="foreroute-watch", daemon=True)
        if store is not None and ranks > 1:
            self._thread.start()

    def at(self, place: str) -> None:
        """Note what the main thread is doing, such as "step 12": told when this rank keeps others waiting."""
        self._place = place

    def close(self) -> None:
        """Say that this rank has come to its end; nobody waits for its signs any more."""
        self._closed.set()
        if self._thread.is_alive():
            # a daemon thread inside the store would make the interpreter's end abort the process
            self._thread.join(_CLOSE_S)
        if self._store is not None:
            self._try(lambda store: store.set(f"alive/{self._rank}", _DONE))

    def report(self, message: str) -> None:
        """Tell the other ranks why this one ends; the first report of all counts."""
        self._spoken = True
        self._post(message)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Report what ends the block by an exception; one that only follows from another rank's end becomes RunFailed."""
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
            rank
            for rank, sign in enumerate(last)
            if rank != self._rank and sign == first[rank] and sign != _DONE
        ]
        if silent:
            message = (
                f"{_named(silent)} lost: no sign of life, last seen at {_place(last[silent[0]])}"
            )
            self.report(message)
            return message
        places = [_place(sign) for sign in last]
        behind = [rank for rank, place in enumerate(places) if place != places[self._rank]]
        reason = str(error).splitlines()[0]
        if behind:
            return f"rank {behind[0]} is at {places[behind[0]]}, this rank at {places[self._rank]}: {reason}"
        return f"all ranks are alive and at {places[0]}: {reason}"

    def _run(self) -> None:
        neighbour = (self._rank + 1) % self._ranks
        sign, since = "", time.monotonic()
        while not self._closed.wait(self._period_s):
            self._beats += 1
            beat = f"{self._beats} {self._place}"
            self._try(lambda store: store.set(f"alive/{self._rank}", beat))  # noqa: B023
            fault = self._fault()
            if fault is not None:
                self._leave(fault)
                return
            now = self._sign(neighbour)
            if now != sign or now == _DONE:
                sign, since = now, time.monotonic()
            elif time.monotonic() - since > self._lost_after_s:
                silence = (
                    f"no sign of life for {self._lost_after_s:.0f} s, last seen at {_place(sign)}"
                )
                self._post(f"{_named([neighbour])} lost: {silence}")

    def _leave(self, fault: str) -> None:
        """Give the main thread time to end by itself, which failed collectives make it do."""
        self._closed.wait(self._lost_after_s / 2)
        if not self._closed.is_set() and not self._spoken:
            self._end(fault)

    def _post(self, message: str) -> None:
        if self._store is not None:
            self._try(lambda store: store.compare_set(_FAULT, "", f"{self._rank} {message}"))

    def _fault(self) -> str | None:
        """What was reported; None if nothing was."""
        present = self._try(lambda store: store.check([_FAULT]))
        if present is False:
            return None
        found = _GONE if present is _GONE else self._try(lambda store: store.get(_FAULT))
        if found is _GONE:
            return "rank 0 is lost: its store does not answer"
        rank, message = found.decode().split(" ", 1)
        return message if message.startswith("rank ") else f"rank {rank} ended: {message}"

    def _signs(self) -> list[str]:
        return [self._sign(rank) for rank in range(self._ranks)]

    def _sign(self, rank: int) -> str:
        key = f"alive/{rank}"
        if self._try(lambda store: store.check([key])) is not True:
            return ""
        found = self._try(lambda store: store.get(key))
        return "" if found is _GONE else found.decode()

    def _try(self, use: Callable[[Any], Any]) -> Any:
        """Use the store; _GONE if whoever holds it has ended."""
        try:
            with self._lock:
                return use(self._store)
        except RuntimeError:  # torch.distributed's errors are
            return _GONE


_GONE = object()


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"


def _place(sign: str) -> str:
    return sign.partition(" ")[2] or "the start"
