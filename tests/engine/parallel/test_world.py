"""What ranks tell each other at start-up: threads of this process, and gloo processes for the connections
themselves."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from torch import distributed as dist

from foreroute.engine.errors import RunFailed, UserError
from foreroute.engine.parallel.cpu_group import CpuGroup, GlooGroup, odd_ones
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.watchdog import Watchdog
from foreroute.engine.parallel.world import World, agree, together
from foreroute.engine.testing.ranks import run_ranks, run_threads

MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


def make_together(cpu_group, make, **options):
    with together(cpu_group, **options):
        made = make()
    return made


def gloo(rank):
    host = GlooGroup(dist.group.WORLD)
    array = np.arange(6, dtype=np.int64).reshape(2, 3) + 100 * rank
    answer = {"rank": rank, "text": "ü" * rank, "none": None}
    found = host.all_gather(array), host.gather(answer), host.broadcast([rank], source=1)
    threads = []
    for _ in range(2):
        threads.append(psutil.Process().num_threads())
        other = GlooGroup(dist.new_group(backend="gloo"))
        other.barrier()
        threads.append(psutil.Process().num_threads())
        other.close()
    return *found, threads


@pytest.mark.dist
def test_gloo_host():
    for arrays, values, one, threads in run_ranks(gloo, 2):
        assert arrays.tolist() == [[[0, 1, 2], [3, 4, 5]], [[100, 101, 102], [103, 104, 105]]]
        assert values == [{"rank": r, "text": "ü" * r, "none": None} for r in range(2)]
        assert one == [1]
        before, opened, closed, opened_again = threads
        assert before == closed < opened == opened_again  # `close` leaves no thread behind


def test_one_rank_talks_to_itself():
    host = CpuGroup()
    assert host.gather({"a": 1}) == [{"a": 1}] and host.broadcast("x") == "x"
    assert make_together(host, lambda: 5) == 5
    agree(host, {"a": 1})
    host.barrier()


@pytest.mark.parametrize("rank_0_first", [False, True])
def test_together_gives_each_its_own_result(rank_0_first):
    seen = []

    def make(host):
        seen.append(host.rank)
        return host.rank

    assert run_threads(lambda h: make_together(h, lambda: make(h), rank_0_first=rank_0_first), 3) == [0, 1, 2]
    assert not rank_0_first or seen[0] == 0


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("error", [UserError("no such file"), OSError("no such file"), RunFailed("no such file")])
@pytest.mark.parametrize("rank_0_first", [False, True])
def test_what_fails_on_one_rank_fails_on_all(bad, error, rank_0_first):
    def make(host):
        if host.rank == bad:
            raise error

    found = run_threads(lambda h: make_together(h, lambda: make(h), rank_0_first=rank_0_first), 3)
    kind = RunFailed if isinstance(error, RunFailed) else UserError
    assert [type(problem) for problem in found] == [kind] * 3
    assert {str(problem) for problem in found} == {"rank 2: no such file" if bad else "no such file"}
    assert all(problem.everywhere for problem in found)


def test_ranks_inside_a_collective_learn_of_a_failure():
    """Rank 2 fails before a collective of make(): the others are told through the store, not only behind make()."""
    store, told = dist.HashStore(), threading.Event()

    def make(host):
        if host.rank == 2:
            raise UserError("another version is installed")
        assert told.wait(timeout=20)  # a collective that the others wait in

    def start(host):
        watch = Watchdog(store, host.rank, host.ranks, timeout_s=8.0, end=lambda line: told.set())
        try:
            return make_together(host, lambda: make(host), watchdog=watch)
        finally:
            watch.close()

    found = run_threads(start, 3)
    assert {str(problem) for problem in found} == {"rank 2: another version is installed"}
    assert store.get("fault") == b"2 another version is installed"


def test_a_bug_is_not_caught():
    assert isinstance(run_threads(lambda h: make_together(h, lambda: 1 / 0), 1)[0], ZeroDivisionError)


def test_a_rank_with_other_facts_is_named():
    def compare(host):
        agree(host, {"train.seed": 1, "optim.lr": 0.5 if host.rank == 2 else 0.1})

    for problem in run_threads(compare, 4):
        assert str(problem) == "optim.lr differs between the ranks: rank 2 has 0.5, the other 3 have 0.1"
        assert problem.everywhere


def test_the_odd_ones():
    assert odd_ones([4, 5]) == "rank 0 has 4, rank 1 has 5"
    assert odd_ones([7] * 3 + [1, 2, 3, 4, 5] + [7] * 2) == (
        "rank 3 has 1, rank 4 has 2, rank 5 has 3, rank 6 has 4 and 1 more ranks differ, the other 5 have 7"
    )


def test_which_ranks_share_a_node():
    world = World(Mesh(2, 4, 2), node_P=(0, 0, 1, 0))
    assert world.nodes == 2 and world.near(range(4)) == [False, False, True, False]
    assert World(Mesh(3, 4, 2), node_P=(0, 0, 1, 0)).near([0, 2]) == [True, False]
    assert World().nodes == 1 and World(Mesh(1, 2, 2)).near(range(2)) == [True, True]


MPI = """
import numpy as np
from mpi4py import MPI
from foreroute.engine.parallel.cpu_group import MpiGroup
host = MpiGroup(MPI.COMM_WORLD)
found = host.all_gather(np.arange(3) + 10 * host.rank).tolist()
assert found == [[0, 1, 2], [10, 11, 12]], found
assert host.gather({"rank": host.rank}) == [{"rank": 0}, {"rank": 1}]
assert MPI.Query_thread() == MPI.THREAD_MULTIPLE
print("same", flush=True)
"""


@pytest.mark.dist
@pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun")
def test_mpi_host():
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, "-c", MPI]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same", "same"]
