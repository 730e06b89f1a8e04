"""A measuring program as the ranks of a cluster."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.machines.cluster import Cluster


def run_measuring(cluster: Cluster, name: str, arguments: Sequence[str], *, ranks: int, seconds: float) -> Any:
    """Run `python ARGUMENTS` as ranks with one thread each; return what rank 0 printed last, which is JSON.

    A rank that fails ends this process with one line and its last words.

    Args:
        name: of the benchmark, for that line.
        ranks: of all nodes.
        seconds: after which they are ended.
    """
    env = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = cluster.run_ranks(arguments, per_node=ranks // len(cluster.nodes), seconds=seconds, env=env)
    for rank, process in enumerate(done):
        if process.code != 0:
            sys.exit(f"{name}: rank {rank} ended with {process.code}:\n{process.err[-2000:]}")
    return json.loads(done[0].out.splitlines()[-1])
