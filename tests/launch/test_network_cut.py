"""The network between two nodes is cut in the middle of a run: all ranks end with a line, and a restart goes on."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.machines.cluster import LINK, two_nodes, why_not

REASON = why_not()
TIMEOUT_S = 20
OPTIONS = [
    "-m",
    "launch.train",
    "experiment=debug",
    "parallel.expert_ranks=2",
    f"parallel.timeout_s={TIMEOUT_S}",
    "train.threads=1",
    "train.log_every=1",
    "train.save_every=5",
    "train.resume=true",
    "train.steps=2000",
    "eval.k=[1]",
    "eval.max_symbols=256",
]


def link(node, state):
    subprocess.run(["ip", "-n", node.namespace, "link", "set", LINK, state], check=True)


@pytest.mark.cluster
@pytest.mark.dist
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_cut_network_ends_all_ranks(tmp_path, text):
    options = [
        *OPTIONS,
        "corpus=file",
        f"corpus.path={text}",
        f"corpus.cache_dir={tmp_path}",
        f"train.runs_dir={tmp_path}",
    ]
    metrics = tmp_path / "debug/metrics.jsonl"

    def steps():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    with two_nodes(None) as cluster, ThreadPoolExecutor(1) as pool:

        def run_until(ready, then):
            """Start the run; when ready() says so, do `then`; give the ranks' ends and the seconds since."""
            run = pool.submit(cluster.run_ranks, options, per_node=1, seconds=300, env={"OMP_NUM_THREADS": "1"})
            while not ready():
                assert not run.done(), run.result()
                time.sleep(0.05)
            begun = time.monotonic()
            then()
            return run.result(), time.monotonic() - begun

        ended, took_s = run_until(lambda: steps() > 12, lambda: link(cluster.nodes[1], "down"))
        assert [rank.code for rank in ended] == [1, 1], ended
        lines = [[line for line in rank.err.splitlines() if line.startswith("foreroute:")] for rank in ended]
        assert len(lines[0]) == 1 and lines[0][0].startswith("foreroute: rank 1 is lost: no sign of life")
        assert lines[1] == ["foreroute: rank 0 is lost: its store does not answer"]
        assert took_s < 3 * TIMEOUT_S  # itself, and two ends of Python on a busy machine
        link(cluster.nodes[1], "up")
        before = steps()
        ended, _ = run_until(lambda: steps() > before + 10, lambda: link(cluster.nodes[0], "down"))
        assert "resumed at step" in ended[0].out and [rank.code for rank in ended] == [1, 1], ended
