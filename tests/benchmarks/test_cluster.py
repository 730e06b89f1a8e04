"""Simulated nodes: what runs in them, what crosses their link, and that nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.machines import cluster
from benchmarks.machines.cluster import one_node, two_nodes, why_not

REASON = why_not()
needs_nodes = [pytest.mark.cluster, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
GROUP = """
import os, sys, torch
from torch import distributed as dist
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
"""
INSIDE = GROUP + "dist.all_reduce(torch.ones(2**20), group=pairs[rank // 2])\n"
ACROSS = (
    GROUP
    + """
got, rows = torch.empty(4, 2**18), torch.full((4, 2**18), float(rank))
dist.all_to_all_single(got, rows)
print(rank, world, os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"], got[:, 0].tolist())
"""
)
END = "dist.barrier(); dist.destroy_process_group()\n"


def namespaces():
    out = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in out.splitlines()}


@pytest.fixture(scope="module")
def nodes():
    with two_nodes("1gbit") as made:
        yield made


class TestTwoNodes:
    pytestmark = needs_nodes

    def test_ranks_meet_and_only_what_crosses_uses_the_link(self, nodes):
        counts = []
        for program in (INSIDE, ACROSS):
            before = nodes.link_bytes()
            done = nodes.run_ranks(["-c", program + END], per_node=2, seconds=60)
            assert [process.code for process in done] == [0] * 4, done
            counts.append(nodes.link_bytes() - before)
        for rank, process in enumerate(done):
            assert process.out == f"{rank} 4 {rank % 2} 2 [0.0, 1.0, 2.0, 3.0]\n"
        across = 8 * 2**20  # 4 ranks send 1 MiB to each of the 2 ranks of the other node
        assert counts[0] < 100_000  # meeting
        assert across < counts[1] < 1.1 * across  # and what TCP adds

    def test_both_directions_are_shaped(self, nodes):
        for node in nodes.nodes:
            command = ["tc", "-n", node.namespace, "-j", "qdisc", "show", "dev", node.interface]
            (found,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            assert found["kind"] == "tbf" and found["options"]["rate"] == 1e9 / 8

    def test_torchrun_on_each_node(self, nodes):
        program = "import os; print(*(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')))"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
        address = nodes.nodes[0].address
        done = nodes.run_nodes(
            lambda node: [
                *torchrun,
                f"--node_rank={node}",
                f"--master_addr={address}",
                "--master_port=29501",
                "--no_python",
                sys.executable,
                "-c",
                program,
            ],
            seconds=60,
        )
        assert [process.code for process in done] == [0, 0], done
        assert [sorted(process.out.splitlines()) for process in done] == [["0 4 0", "1 4 1"], ["2 4 0", "3 4 1"]]

    def test_what_outlives_its_time_is_killed(self, nodes):
        # The first node's program leaves a child behind that has its own session.
        leave = f"{sys.executable} -c 'import time; time.sleep(100)' & disown"
        programs = ["setsid " + leave + "; exit 3", "echo begun; sleep 100"]
        with two_nodes(None) as own:
            begun = time.monotonic()
            done = own.run_nodes(lambda node: ["bash", "-c", programs[node]], seconds=1.5)
            assert time.monotonic() - begun < 30
            assert [(process.code, process.out) for process in done] == [(3, ""), (None, "begun\n")]
            first, second = (processes_in(node.namespace) for node in own.nodes)
            assert first and not second
        assert not any(runs(int(pid)) for pid in first)

    def test_ctrl_c_removes_everything(self):
        program = (
            "from benchmarks.machines.cluster import two_nodes\n"
            "with two_nodes('1gbit') as nodes:\n"
            "    print(nodes.nodes[0].namespace, flush=True)\n"
            "    nodes.run_nodes(lambda _: ['sleep', '9999'], seconds=9999)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=cluster.ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        name = process.stdout.readline().strip()
        while not processes_in(name):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=600)
        assert not {n for n in namespaces() if n.startswith(f"foreroute-{process.pid}-")}

    def test_namespaces_of_a_killed_user_go_and_others_stay(self):
        gone = subprocess.Popen(["true"])
        gone.wait()  # its number is free
        abandoned, strange = f"foreroute-{gone.pid}-0-0", f"foreroute-{os.getpid()}-x"
        for name in (abandoned, strange):
            subprocess.run(["ip", "netns", "add", name], check=True)
        sleeper = subprocess.Popen(["ip", "netns", "exec", abandoned, "sleep", "9999"])
        try:
            while not processes_in(abandoned):
                time.sleep(0.05)
            with two_nodes(None) as first, two_nodes(None) as second:
                assert abandoned not in namespaces() and strange in namespaces()
                assert sleeper.wait(timeout=600) == -signal.SIGKILL
                assert {node.namespace for made in (first, second) for node in made.nodes} < namespaces()
            own = {name for name in namespaces() if name.startswith(f"foreroute-{os.getpid()}-")}
            assert strange in own
        finally:
            subprocess.run(["ip", "netns", "del", strange], check=True)

    def test_a_rate_that_is_none_leaves_nothing_behind(self):
        before = namespaces()
        with pytest.raises(cluster.ClusterError, match="fastest"), two_nodes("fastest"):
            pass
        assert namespaces() == before


def runs(pid):
    """Whether a process lives; a dead one may wait for its parent to notice."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def processes_in(namespace):
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return found.stdout.split()


def test_one_node_is_this_machine():
    program = (
        "import os, sys; print(os.environ['RANK'], os.environ['GLOO_SOCKET_IFNAME'], os.environ['MINE']);"
        " sys.exit(int(os.environ['RANK']))"
    )
    with one_node() as node:
        done = node.run_ranks(["-c", program], per_node=2, seconds=30, env={"MINE": "yes"})
        assert [(process.code, process.out) for process in done] == [(0, "0 lo yes\n"), (1, "1 lo yes\n")]
        late = node.run_ranks(["-c", "import time; time.sleep(100)"], per_node=1, seconds=0.2)
        assert [process.code for process in late] == [None]
        assert node.link_bytes() == 0


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("os.geteuid", lambda: 1000, "need root"),
        ("shutil.which", lambda tool: None if tool == "tc" else tool, "no `tc`"),
    ],
)
def test_why_not(monkeypatch, attribute, value, reason):
    monkeypatch.setattr(cluster.os, "geteuid", lambda: 0)
    monkeypatch.setattr(f"benchmarks.machines.cluster.{attribute}", value)
    assert reason in why_not.__wrapped__()
