"""Trainings whose ranks are copies of one process that has imported what a training imports.

A rank starts within a second instead of some, which are imports. What a training does is the same.
"""

import multiprocessing
from collections.abc import Mapping, Sequence

from foreroute.engine.testing.ranks import Program

_TRAIN = (
    "from foreroute.launch.start.process import leaving_at_once; from foreroute.launch.train import main\n"
    "with leaving_at_once(): main()"
)
multiprocessing.get_context("forkserver").set_forkserver_preload(
    [  # instead of that of engine/testing/ranks.py
        "foreroute.engine.testing.ranks",
        "foreroute.launch.train",
        "torch._inductor.compile_fx",
        "torch._dynamo.testing",
        "deepspeed.ops.op_builder.all_ops",
        "deepspeed.runtime.superoffload.superoffload_stage3",
        "deepspeed.runtime.zero.muon.original_muon",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
    ]
)


def start_training(options: Sequence[str], environ: Mapping[str, str]) -> Program:
    """Start `python -m launch.train OPTIONS` as one rank, whose place among the ranks is in its environment."""
    return Program(_TRAIN, options, environ)
