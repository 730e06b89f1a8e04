"""Programs in processes that are copies of one that has imported what they need.

A process starts within a second instead of some, which are imports. What the program does is the same.
"""

import multiprocessing
from collections.abc import Mapping, Sequence

from foreroute.engine.testing.ranks import Program

_TRAIN = (
    "from foreroute.launch.start.process import leaving_at_once; from foreroute.launch.train import main\n"
    "with leaving_at_once(): main()"
)
_MODULE = "from runpy import run_module\nrun_module({!r}, run_name='__main__', alter_sys=True)"
_ENGINE = (
    "foreroute.engine.testing.ranks",
    "foreroute.engine.train.trainer",
    "torch._inductor.compile_fx",
    "torch._dynamo.testing",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.original_muon",
)
_OF_TRAINING = "foreroute.launch.train", "matplotlib.figure", "matplotlib.backends.backend_agg"


def start_training(options: Sequence[str], environ: Mapping[str, str]) -> Program:
    """Start `python -m launch.train OPTIONS` as one rank, whose place among the ranks is in its environment."""
    _preload(*_OF_TRAINING)
    return Program(_TRAIN, options, environ)


def start_module(module: str, arguments: Sequence[str], environ: Mapping[str, str]) -> Program:
    """Start `python -m MODULE ARGUMENTS`."""
    _preload(module)
    return Program(_MODULE.format(module), arguments, environ)


def _preload(*modules: str) -> None:
    """Choose what is imported once for all; it takes effect before the first process."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([*_ENGINE, *modules])
