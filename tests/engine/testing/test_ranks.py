"""Ranks for tests: each call starts from a clean state, and a rank that raises, dies or hangs ends the call with its
name."""

import os
import signal
import time

import psutil
import pytest
import torch
from torch import distributed as dist

from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.tiny_run import Run

pytestmark = pytest.mark.dist


def say(rank, text):
    return rank, dist.get_world_size(), text, os.environ["LOCAL_RANK"], torch.ones(2) * rank


def test_answers_come_in_the_order_of_ranks():
    for rank, (*found, tensor) in enumerate(run_ranks(say, 2, "x")):
        assert found == [rank, 2, "x", str(rank)]
        assert tensor.tolist() == [rank, rank]


def fail(rank):
    if rank == 1:
        raise ArithmeticError("seven")
    dist.barrier()  # in vain


def test_an_error_of_a_rank_is_told():
    with pytest.raises(RuntimeError, match=r"(?s)^rank 1 of 2:\nTraceback.*ArithmeticError: seven"):
        run_ranks(fail, 2)


def die(rank, how):
    if rank == 1:
        os.kill(os.getpid(), how)
    time.sleep(100)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGSEGV, -11)])
def test_a_dead_rank_is_named_long_before_the_time_is_over(how, code):
    with pytest.raises(RuntimeError, match=f"^rank 1 of 2 died, exit code {code}$"):
        run_ranks(die, 2, how, seconds=1e6)


def hang(rank, folder):
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank:
        time.sleep(100)


def test_a_rank_that_hangs_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(RuntimeError, match=r"^no answer of rank 1, 2 of 3 in 15 s$"):
        run_ranks(hang, 3, tmp_path, seconds=15)
    assert not any(psutil.pid_exists(int((tmp_path / str(rank)).read_text())) for rank in range(3))


def soil(rank):
    """Train with DeepSpeed in groups and change whatever a rank can change."""
    run = Run(Mesh(rank, 2, 1), 3, whole=5)
    run.step()
    os.environ["SOILED"] = "yes"
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(rank)
    vars(adapter)["KEPT_WHOLE"] = -1


def state(rank):
    groups = len(dist.distributed_c10d._world.pg_map)
    draw = torch.rand(1).item()
    return os.environ.get("SOILED"), torch.get_default_dtype(), adapter.KEPT_WHOLE, groups, draw


def soiled_state(rank):
    soil(rank)
    return state(rank)


def test_a_call_leaves_no_trace_in_the_next():
    before = run_ranks(state, 2)
    for old, soiled in zip(before, run_ranks(soiled_state, 2), strict=True):
        assert all(a != b for a, b in zip(old, soiled, strict=True))
    assert run_ranks(state, 2) == before
    assert before[0][:4] == (None, torch.float32, adapter.KEPT_WHOLE, 1)


def test_the_environment_of_now_is_handed_on(monkeypatch):
    monkeypatch.setenv("SOILED", "told")
    assert [found[0] for found in run_ranks(state, 2)] == ["told", "told"]


def tasks(rank):
    """Threads of the process that ranks are copies of: a thread would not be copied, its locks would."""
    return len(os.listdir(f"/proc/{os.getppid()}/task"))


def test_what_ranks_are_copied_from_has_one_thread():
    assert run_ranks(tasks, 1) == [1]
