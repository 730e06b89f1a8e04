"""Which lines of some packages run in which test: Python itself starts this in each process that has this folder on its
path.

FOREROUTE_TRACE is a JSON object: `root` of the tree, its `packages`, and the `folder` where every process writes a file
of its own as it goes, so that one that is killed has told all. The test is PYTEST_CURRENT_TEST, which processes
inherit. Lines that run at import tell nothing about a test and are left out.
"""

import json
import os
import sys
import threading
import time
from types import CodeType, FrameType
from typing import Any

_MOST_LOOKS = 200_000  # at lines of one function, in one test
_FUNCTION = 1  # the flag of code whose names are local: not a module's nor a class's


class _Record:
    def __init__(self, root: str, packages: list[str], folder: str) -> None:
        self._root, self._folder = root.rstrip("/") + "/", folder
        self._prefixes = tuple(f"{self._root}{package}/" for package in packages)
        self._names: dict[str, str] = {}  # of code's file: "" if it is none of ours
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._file, self._unwritten = -1, b""
        self._test: str | None = None
        self._missing: dict[int, tuple[CodeType, set[int]]] = {}
        self._looked: dict[int, int] = {}  # lines that were looked at, by code

    def call(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Take in a call: a global trace function."""
        code = frame.f_code
        name = self._names.get(code.co_filename)
        if name is None:
            name = self._name(code.co_filename)
        if not name or not code.co_flags & _FUNCTION:
            return None
        if not self._missing_of(code):
            return None
        return self.line

    def line(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Take in a line: a local trace function."""
        if event == "line":
            missing = self._missing_of(frame.f_code)
            if frame.f_lineno in missing:
                missing.discard(frame.f_lineno)
                self._write(f"{self._names[frame.f_code.co_filename]}:{frame.f_lineno}")
            code = id(frame.f_code)
            self._looked[code] = looked = 1 + self._looked.get(code, 0)
            if looked > _MOST_LOOKS:  # a long loop: what it has not run by now it does not
                missing.clear()
            if not missing:
                frame.f_trace_lines = False
        return self.line

    def _name(self, filename: str) -> str:
        real = os.path.realpath(filename)  # foreroute/ holds links
        ours = real.startswith(self._prefixes)
        self._names[filename] = real[len(self._root) :] if ours else ""
        return self._names[filename]

    def _missing_of(self, code: CodeType) -> set[int]:
        """Lines of this code that this test has not run yet."""
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        if test != self._test:
            self._missing.clear()
            self._looked.clear()
            self._test = test
            self._write("@" + test)
        found = self._missing.get(id(code))
        if found is None:
            lines = {line for _, _, line in code.co_lines() if line}
            found = self._missing[id(code)] = code, lines - {code.co_firstlineno} or lines
        return found[1]

    def _write(self, line: str) -> None:
        self._unwritten += f"{line}\n".encode()
        try:
            if self._file < 0:
                path = f"{self._folder}/{os.getpid()}-{time.monotonic_ns()}"
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError:  # a test's own doing, such as a limit on the size of files: next time
            return


def start(options: str) -> None:
    """Trace from here on, in this thread and those to come."""
    record = _Record(**json.loads(options))
    threading.settrace(record.call)
    sys.settrace(record.call)


if os.environ.get("FOREROUTE_TRACE"):
    start(os.environ["FOREROUTE_TRACE"])
