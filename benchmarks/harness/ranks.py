"""A measuring program as the ranks of a cluster."""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.harness.programs import start_module
from benchmarks.machines.cluster import Cluster, Finished
from foreroute.engine.testing.ranks import rank_environments

ENV = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run_measuring(
    cluster: Cluster, name: str, arguments: Sequence[str], *, ranks: int, seconds: float, warmed: bool = False
) -> Any:
    """Run `python -m ARGUMENTS` as ranks with one thread each; return what rank 0 printed last, which is JSON.

    A rank that fails ends this process with one line and its last words.

    Args:
        name: of the benchmark, for that line.
        arguments: the module and its options.
        ranks: of all nodes.
        seconds: after which they are ended.
        warmed: ranks on this machine itself are copies of one process that has imported the module.
    """
    if warmed and all(node.namespace is None for node in cluster.nodes):
        done = _run_warmed(arguments, ranks, seconds)
    else:
        per_node = ranks // len(cluster.nodes)
        done = cluster.run_ranks(["-m", *arguments], per_node=per_node, seconds=seconds, env=ENV)
    for rank, process in enumerate(done):
        if process.code != 0:
            sys.exit(f"{name}: rank {rank} ended with {process.code}:\n{process.err[-2000:]}")
    return json.loads(done[0].out.splitlines()[-1])


def _run_warmed(arguments: Sequence[str], ranks: int, seconds: float) -> list[Finished]:
    module, *options = arguments
    own, until = {**ENV, "GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": str(ranks)}, time.monotonic() + seconds
    os.environ.update(ENV)  # of the process that they are copies of, too
    with ExitStack() as until_end:
        programs = [
            until_end.enter_context(start_module(module, options, {**environ, **own}))
            for environ in rank_environments(ranks)
        ]
        return [Finished(*program.wait(max(0.0, until - time.monotonic()))) for program in programs]
