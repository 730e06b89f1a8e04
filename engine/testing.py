"""Several ranks on one machine, for tests: `run_ranks` starts processes that form a gloo group and gathers what they say,
`run_threads` gives threads of this process a Host each. And `change_certificate`, for tests of runs that shall differ from it.
"""

import importlib.util
import inspect
import multiprocessing
import os
import tempfile
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import distributed as dist

from engine.certificate.record import ARRAYS, read, write
from engine.parallel.host import Host


def run_ranks(
    function: Callable[..., Any], ranks: int, *arguments: Any, seconds: float = 120
) -> list[Any]:
    """Call function(rank, *arguments) in each of `ranks` new processes of one gloo group; return what they return.

    Args:
        function: at the top level of its file, which each process loads again.
        seconds: what all of it may take; collectives give up then, too.

    Raises:
        RuntimeError: a rank raised (its traceback is in the message) or did not answer; no process is left behind.
    """
    context = multiprocessing.get_context("spawn")
    answers: Queue[tuple[int, bool, Any]] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "store"), inspect.getfile(function), function.__name__
        workers = [
            context.Process(target=_work, args=(rank, ranks, seconds, place, arguments, answers))
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        try:
            return _collect(answers, ranks, seconds)
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()


def _collect(answers: "Queue[tuple[int, bool, Any]]", ranks: int, seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    for _ in range(ranks):
        rank, fine, result = answers.get(timeout=seconds)
        if not fine:
            raise RuntimeError(f"rank {rank} of {ranks}:\n{result}")
        results[rank] = result
    return [results[rank] for rank in range(ranks)]


def _work(
    rank: int, ranks: int, seconds: float, place: tuple[str, str, str], arguments: tuple[Any, ...],
    answers: "Queue[tuple[int, bool, Any]]",
) -> None:  # fmt: skip
    store, file, name = place
    try:
        torch.set_num_threads(1)
        os.environ["LOCAL_RANK"] = str(rank)  # as launchers do
        spec = importlib.util.spec_from_file_location("foreroute_ranks", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks,
            timeout=timedelta(seconds=seconds),
        )  # fmt: skip
        answers.put((rank, True, getattr(module, name)(rank, *arguments)))
        dist.barrier()
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))


class _ThreadHost(Host):
    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.ranks, self._board, self._barrier = rank, len(board), board, barrier

    def all_gather(self, values: NDArray[Any]) -> NDArray[Any]:
        self._board[self.rank] = values
        self._barrier.wait()
        found = np.stack(self._board)
        self._barrier.wait()  # nobody writes again before all have read
        return found


def run_threads(function: Callable[[Host], Any], ranks: int, *, seconds: float = 60) -> list[Any]:
    """Call function(host) in `ranks` threads whose hosts know each other; return results, or what was raised, by rank."""
    board: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks, timeout=seconds)

    def call(rank: int) -> Any:
        try:
            return function(_ThreadHost(rank, board, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(call, range(ranks)))


def change_certificate(folder: Path, array: str, place: tuple[int, ...]) -> int:
    """Add 1 to one number of a certificate's arrays, as if it had been written so; gives the number that was there."""
    arrays = load_file(folder / ARRAYS)
    before = int(arrays[array][place])
    arrays[array][place] += 1
    write(folder, read(folder).facts, arrays)
    return before
