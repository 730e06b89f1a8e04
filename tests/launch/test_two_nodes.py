"""Training on two simulated nodes with torchrun gives the losses of one node."""

import json
import sys

import pytest

from benchmarks.cluster import one_node, two_nodes, why_not

REASON = why_not()
PROGRAM = "-m launch.train experiment=debug parallel.expert_ranks=4 train.threads=1"


def train(cluster, folder, nodes, per_node):
    """Losses and sent bytes of four ranks under torchrun on so many nodes."""

    def command(node):
        agent = f"{sys.executable} -m torch.distributed.run --nnodes={nodes} --nproc_per_node={per_node}"
        where = f"--node_rank={node} --master_addr=$MASTER_ADDR --master_port=$MASTER_PORT"
        return ["bash", "-c", f"exec {agent} {where} {PROGRAM} train.runs_dir={folder}"]

    done = cluster.run_nodes(command, seconds=200, env={"OMP_NUM_THREADS": "1"})
    assert [node.code for node in done] == [0] * nodes, done
    lines = (folder / "debug" / "metrics.jsonl").read_text().splitlines()
    return [(row["loss"], row["wire_bytes"]) for row in map(json.loads, lines)]


@pytest.mark.cluster
@pytest.mark.dist
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_two_nodes_train_like_one(tmp_path):
    with one_node() as cluster:
        alone = train(cluster, tmp_path / "one", 1, 4)
    with two_nodes("1gbit") as cluster:
        found = train(cluster, tmp_path / "two", 2, 2)
        crossed = cluster.link_bytes()
    assert found == alone and len(found) == 4
    assert crossed > 4 * found[-1][1] / 4  # negative control: rows really went over the link
