"""Processes and threads for tests.

`run_ranks` starts processes in one gloo group and collects their results. `Program` starts a program. Both take a
fraction of a second. `run_threads` runs threads of this process, each with a CpuGroup. `change_certificate` is for
tests of runs that differ from their certificate.
"""

import contextlib
import gc
import importlib.util
import inspect
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numba.core.registry import cpu_target
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import distributed as dist

from foreroute.engine.certificate.record import ARRAYS, read, write
from foreroute.engine.parallel.cpu_group import CpuGroup

_SERVER = multiprocessing.get_context("forkserver")
_PRELOADED = [  # modules that ranks import, some at their first step; none of them starts a thread
    "pytest",
    "foreroute.engine.testing.ranks",
    "foreroute.engine.testing.tiny_run",
    "foreroute.engine.testing.tensor_bytes",
    "foreroute.engine.train.trainer",
    "foreroute.engine.plug_in",
    "torch._inductor.compile_fx",
    "torch._dynamo.testing",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.original_muon",
    "transformers.trainer",  # where it is installed
    "transformers.models.llama.modeling_llama",
    "accelerate",
]
_SERVER.set_forkserver_preload(_PRELOADED)
# What numba imports at the first call of a compiled loop: 0.4 s, in the server instead of in each rank.
cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, seconds: float = 600) -> list[Any]:
    """Call function(rank, *arguments) in each of `ranks` new processes of one gloo group; return their results.

    The processes are forks of one that has only imported modules (tests/README.md), so each call
    starts from a clean state within a fraction of a second. They inherit the present environment of this process.

    Args:
        function: a function at the top level of its file, which each process loads again.
        seconds: the timeout of the call and of its collectives.

    Raises:
        RuntimeError: a rank raised (its traceback is in the message), died or did not answer; no process remains.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        waiting = {}
        for rank in range(ranks):
            task = _Task(
                function=(inspect.getfile(function), function.__name__),
                arguments=arguments,
                rank=rank,
                ranks=ranks,
                store=str(Path(folder) / "store"),
                seconds=seconds,
                environ={**os.environ, "LOCAL_RANK": str(rank)},  # as launchers do
            )
            here, there = _SERVER.Pipe(duplex=False)
            process = _SERVER.Process(target=_work, args=(task, there))
            process.start()
            there.close()  # so that the pipe ends with the process
            for end in (here.close, process.join, process.kill):
                stack.callback(end)
            waiting[here] = rank, process
        return _collect(waiting, seconds)


@dataclass(frozen=True)
class _Task:
    function: tuple[str, str]  # file, name
    arguments: tuple[Any, ...]
    rank: int
    ranks: int
    store: str
    seconds: float
    environ: dict[str, str]


def _collect(waiting: dict[Any, tuple[int, ForkServerProcess]], seconds: float) -> list[Any]:
    """Return the results that ranks send through their pipes, in the order of the ranks."""
    end, ranks = time.monotonic() + seconds, len(waiting)
    results: dict[int, Any] = {}
    while waiting:
        found = connection.wait(list(waiting), timeout=max(0, end - time.monotonic()))
        if not found:
            missing = ", ".join(str(rank) for rank, _ in waiting.values())
            raise RuntimeError(f"no answer of rank {missing} of {ranks} in {seconds} s")
        for pipe in found:
            rank, process = waiting.pop(pipe)
            try:
                fine, results[rank] = cast("Connection[Any, Any]", pipe).recv()
            except EOFError:
                process.join()
                raise RuntimeError(f"rank {rank} of {ranks} died, exit code {process.exitcode}") from None
            if not fine:
                raise RuntimeError(f"rank {rank} of {ranks}:\n{results[rank]}")
    return [results[rank] for rank in range(ranks)]


def _work(task: _Task, answer: "Connection[Any, Any]") -> None:
    try:
        found = True, _call(task)
    except BaseException:
        found = False, traceback.format_exc()
    answer.send(found)
    time.sleep(task.seconds)  # others may still communicate with this rank: it is killed when all have answered


def _call(task: _Task) -> Any:
    _begin(task.environ)
    torch.set_num_threads(1)
    file, name = task.function
    spec = importlib.util.spec_from_file_location("foreroute_ranks", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(task.store, task.ranks),
        rank=task.rank,
        world_size=task.ranks,
        timeout=timedelta(seconds=task.seconds),
    )
    return getattr(module, name)(task.rank, *task.arguments)


def _begin(environ: dict[str, str]) -> None:
    gc.freeze()  # exempts imports from the full collections of ZeRO-3, 0.3 s each
    os.environ.clear()
    os.environ.update(environ)


class Program:
    """A Python program in a process like those of run_ranks, with modules already imported; it ends with the block."""

    def __init__(self, code: str, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        """Start the program.

        Args:
            code: the source, as for `python -c`.
            arguments: its sys.argv[1:].
        """
        self._folder = tempfile.TemporaryDirectory()
        self._texts = [Path(self._folder.name) / name for name in ("out", "err")]
        for path in self._texts:
            path.touch()  # it may be killed before it opens them
        arguments = ["-c", *arguments]
        self._process = _SERVER.Process(target=_run, args=(code, arguments, dict(environ), self._texts))
        self._process.start()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._folder.cleanup()

    @property
    def runs(self) -> bool:
        """Whether the program is still running."""
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        """Send a signal to the program."""
        pid = self._process.pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, seconds: float = 600) -> tuple[int, str, str]:
        """Wait for the program's end; return its exit code, stdout and stderr.

        Raises:
            TimeoutError: it still runs.
        """
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            raise TimeoutError(f"no end within {seconds:.0f} s")
        out, err = (path.read_text() for path in self._texts)
        return code, out, err


def _run(code: str, arguments: list[str], environ: dict[str, str], texts: list[Path]) -> None:
    _begin(environ)
    for number, path in enumerate(texts, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = arguments
    exec(code, {"__name__": "__main__"})


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """Return each rank's environment as set by torchrun, with a free rendezvous port on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**os.environ, **world, "RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"} for r in range(ranks)]


class _ThreadGroup(CpuGroup):
    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.ranks, self._board, self._barrier = rank, len(board), board, barrier

    def all_gather(self, values: NDArray[Any]) -> NDArray[Any]:
        self._board[self.rank] = values
        self._barrier.wait()
        found = np.stack(self._board)
        self._barrier.wait()  # no rank writes again before all have read
        return found


def run_threads(function: Callable[[CpuGroup], Any], ranks: int, *, seconds: float = 60) -> list[Any]:
    """Call function(cpu_group) in `ranks` threads of one group; return each rank's result or exception."""
    board: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks, timeout=seconds)

    def call(rank: int) -> Any:
        try:
            return function(_ThreadGroup(rank, board, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(call, range(ranks)))


def change_certificate(folder: Path, array: str, place: tuple[int, ...]) -> int:
    """Add 1 to one number of a certificate's arrays and seal it again; return the number before."""
    arrays = load_file(folder / ARRAYS)
    before = int(arrays[array][place])
    arrays[array][place] += 1
    write(folder, read(folder).facts, arrays)
    return before
