"""A replay in a process of its own: DeepSpeed keeps a process's groups, so a process stands for one rank only."""

import multiprocessing
import os
import resource
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.data.corpus import prepare
from foreroute.engine.errors import RunFailed, UserError
from foreroute.engine.replay.rank import ReplayedRank, StepPlan, replay_rank
from foreroute.launch.start.process import set_up

_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "6"}  # of what PyTorch says of its own profiler


@dataclass(frozen=True, slots=True)
class Apart:
    """A replay, and what its process needed."""

    rank: ReplayedRank
    process_bytes: int  # of the host's memory, at its peak
    seconds: float  # the start of the process included


class DoesNotFit(Exception):
    """The device has too little memory."""


def replay_apart(layout: Layout, rank: int, plan: StepPlan) -> Apart:
    """Replay in a new process; arguments as for replay_rank.

    Raises:
        UserError, RunFailed: of that process.
        DoesNotFit: the device's memory was not enough.
    """
    begin = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, layout, rank, plan), daemon=True)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    process.start()
    there.close()
    try:
        kind, found = here.recv()
    except EOFError:
        process.join()
        raise DoesNotFit(f"the process of rank {rank} ended with code {process.exitcode}") from None
    finally:
        here.close()
    process.join()
    if kind == "fits not":
        raise DoesNotFit(found)
    if kind != "done":
        raise UserError(found) if kind == "user" else RunFailed(found)
    done, process_bytes = found
    return Apart(done, process_bytes, time.perf_counter() - begin)


def _work(answer: "Connection[Any, Any]", layout: Layout, rank: int, plan: StepPlan) -> None:
    import torch

    found: tuple[str, Any]
    try:
        set_up(layout.config.train.threads)
        done = replay_rank(layout, prepare(layout.config.corpus, lambda _: None), rank, plan)
        found = "done", (done, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    except (torch.OutOfMemoryError, MemoryError) as error:
        found = "fits not", str(error).splitlines()[0] if str(error) else "out of memory"
    except UserError as error:
        found = "user", str(error)
    except RunFailed as error:
        found = "failed", str(error)
    answer.send(found)
    answer.close()
    os._exit(0)  # the groups' threads need no interpreter's end
