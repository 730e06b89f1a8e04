"""The recipes for many machines, run as they are on simulated ones: they train like one process, and a stop saves."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack

import pytest

from benchmarks.machines.cluster import ROOT, two_nodes, why_not
from foreroute.launch.testing.runs import last_step, processes_of, read_losses, wait_until

REASON = why_not()
RECIPES = ROOT / "launch/recipes"
CASES = [(recipe, count) for recipe in ("torchrun_static", "deepspeed", "mpirun") for count in (1, 2)]
pytestmark = [pytest.mark.cluster, pytest.mark.dist, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


class Machines:
    """Two nodes that reach each other by ssh; a recipe starts two ranks on each of one or both."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        cluster.write_ssh(folder)
        self.names = [node.hostname for node in cluster.nodes]

    def command(self, recipe, count, options, number=0):
        """The command line on node `number`."""
        hosts = self.folder / f"hosts{count}"
        hosts.write_text("".join(f"{name} slots=2\n" for name in self.names[:count]))
        settings = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "MPIRUN": f"{sys.prefix}/bin/mpirun",
            "HOSTFILE": hosts,
        }
        if recipe.startswith("torchrun"):
            first = self.names[0]
            settings |= {
                "NODES": count,
                "RANKS_PER_NODE": 2,
                "NODE_RANK": number,
                "MASTER_ADDR": first,
                "RDZV_HOST": first,
            }
        variables = [f"{name}={value}" for name, value in settings.items()]
        groups = f"parallel.expert_ranks={2 * count}"
        return ["env", *variables, f"{RECIPES}/{recipe}.sh", *options, groups]

    def run(self, recipe, count, options):
        """What came of it on each node on which the recipe has to be started."""
        if count == 2 and recipe.startswith("torchrun"):
            return self.cluster.run_nodes(lambda number: self.command(recipe, 2, options, number), seconds=300)
        return [self.cluster.run_first(self.command(recipe, count, options), seconds=300)]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    with two_nodes("1gbit") as cluster:
        yield Machines(cluster, tmp_path_factory.mktemp("ssh"))


@pytest.mark.parametrize(("recipe", "count"), CASES)
def test_it_trains_like_one_process(machines, small_run, alone, tmp_path, recipe, count):
    if recipe == "deepspeed" and shutil.which("pdsh") is None:
        pytest.skip("there is no `pdsh` here; `make test-cluster` installs it")
    sent = machines.cluster.link_bytes()
    done = machines.run(recipe, count, [*small_run, f"train.runs_dir={tmp_path}"])
    assert [node.code for node in done] == [0] * len(done), done
    assert read_losses(tmp_path) == pytest.approx(alone, rel=1e-6)
    assert (machines.cluster.link_bytes() - sent > 1_000_000) == (count == 2)
    assert json.loads((tmp_path / "debug/facts.json").read_text())["nodes"] == count
    last = json.loads((tmp_path / "debug/metrics.jsonl").read_text().splitlines()[-1])
    assert last["wire_bytes_inside"] > 0 and (last["wire_bytes_between"] > 0) == (count == 2)


def test_a_killed_rank_is_started_again(machines, small_run, tmp_path):
    """torchrun's restarts, on both machines: the run goes on from its newest checkpoint as if nothing had been."""
    options = [*small_run, f"train.runs_dir={tmp_path}", "train.steps=120", "train.log_every=1", "train.save_every=20"]
    commands = [machines.command("torchrun_c10d", 2, options, number) for number in (0, 1)]
    nodes = machines.cluster.nodes
    with ExitStack() as stack:
        logs = [stack.enter_context((tmp_path / f"log{number}").open("w+")) for number in (0, 1)]
        agents = [
            subprocess.Popen(node.inside(command), stdout=log, stderr=log)
            for node, command, log in zip(nodes, commands, logs, strict=True)
        ]
        for agent in agents:
            stack.callback(agent.kill)
        wait_until(lambda: last_step(tmp_path) > 40 and last_step(tmp_path) % 20 > 5)
        (victim,) = (p for p in processes_of(tmp_path) if p.environ().get("RANK") == "3")
        before = read_losses(tmp_path)
        victim.kill()
        assert [agent.wait(timeout=600) for agent in agents] == [0, 0], logs[0].read()
        logs[0].seek(0)
        resumed = int(re.search(r"resumed at step (\d+) ", logs[0].read())[1])
    after = read_losses(tmp_path)
    again = {step: loss for step, loss in before.items() if step > resumed}
    assert again and resumed >= 40
    assert {step: after[step] for step in again} == again
    assert sorted(after) == list(range(1, 121))


def test_restarts_that_could_not_meet_are_refused_at_once(machines, small_run, tmp_path):
    """Of torchrun by hand, without what the recipe sets."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--max-restarts=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={machines.names[0]}:29400",
        "--rdzv-id=by_hand",
    ]
    program = ["-m", "launch.train", *small_run, f"train.runs_dir={tmp_path}"]
    done = machines.cluster.run_nodes(lambda _: [*torchrun, *program], seconds=200)
    said = [line for node in done for line in node.err.splitlines() if line.startswith("foreroute:")]
    assert said and all("foreroute: --max-restarts=1: on several machines" in line for line in said)
    assert not (tmp_path / "debug").exists()
