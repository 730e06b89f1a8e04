"""The setting of a part of the check, and cases shared out over processes.

Compiling its kernels takes longer than anything else that a part does on a GPU; several processes do it side by side.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

J = TypeVar("J")
R = TypeVar("R")
_MOST_PROCESSES = 12


@dataclass(frozen=True, slots=True)
class Setting:
    """The setting of a part."""

    dry_run: bool
    seconds: float  # that it may take
    wheels: Path = Path(".cache/gpu-wheels")  # what the second stage needs
    work: Path = Path()  # a temporary folder
    found: Mapping[str, Any] = field(default_factory=dict)  # results of parts before it

    @property
    def device(self) -> str:
        """Where kernels run."""
        return "cpu" if self.dry_run else "cuda"


def in_processes(
    function: Callable[[J], R], jobs: Sequence[J], seconds: float, *, least: int = 1
) -> dict[int, R | Exception]:
    """Call a function for each job in processes that see the GPU; return results, or errors, by the job's number.

    Jobs that are not done after so many seconds are ended, and have no result.

    Args:
        least: processes that are started even on fewer cores.
    """
    until = time.monotonic() + seconds
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu_check.stage_1"])
    done: dict[int, R | Exception] = {}
    processes = min(len(jobs), max(least, min(os.cpu_count() or 1, _MOST_PROCESSES)))
    with context.Pool(processes, _one_thread) as pool:
        promised = [pool.apply_async(function, (job,)) for job in jobs]
        for number, one in enumerate(promised):
            try:
                done[number] = one.get(max(0.0, until - time.monotonic()))
            except multiprocessing.TimeoutError:
                continue
            except Exception as error:
                done[number] = error
    return done


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
