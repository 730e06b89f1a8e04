"""multiprocessing's fork server as a fork of a worker: what tests run on ranks starts at once, as the heavy libraries
are imported.

Its own way starts a fresh Python, which imports for seconds, in every run of tests.
"""

import fcntl
import json
import os
import socket
from collections.abc import Sequence
from multiprocessing import util
from typing import Any

_OWN = "multiprocessing.forkserver"
_MOST_FDS = 16
_HIGH = 200  # a file descriptor above those in use


def lend() -> None:
    """Fork a process that waits to become the fork server, should this process want one."""
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        here.close()
        _become(there)
    there.close()
    start = util.spawnv_passfds

    def instead(path: Any, arguments: Sequence[Any], fds: Sequence[int]) -> int:
        if _OWN not in str(arguments[-1]) or here.fileno() < 0:
            return start(path, arguments, fds)
        message = {"code": arguments[-1], "fds": [int(fd) for fd in fds], "environment": dict(os.environ)}
        socket.send_fds(here, [json.dumps(message).encode()], list(fds))
        here.close()
        return child

    util.spawnv_passfds = instead  # type: ignore[assignment]


def _become(asked: socket.socket) -> None:
    code = 1
    try:
        message, fds, _, _ = socket.recv_fds(asked, 1 << 20, _MOST_FDS)
        if message:
            told = json.loads(message)
            for number, fd in enumerate(fds):
                fcntl.fcntl(fd, fcntl.F_DUPFD, _HIGH + number)
                os.close(fd)
            for number, wanted in enumerate(told["fds"]):
                os.dup2(_HIGH + number, wanted)
                os.close(_HIGH + number)
            os.environ.clear()
            os.environ.update(told["environment"])
            exec(told["code"], {"__name__": "__main__"})
        code = 0
    finally:
        os._exit(code)
