"""DeepSpeed in one process that stands for a rank of many (engine/replay/)."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn

from foreroute.engine.optim.deepspeed_contract import COMM_NAME, SHARD_NAMES, safe_set_local_fp32_param, zero_utils

_STD = 0.02


class _AsRankZero:
    """DeepSpeed's communication for its checks, in which every rank is the one that the others are compared with."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def get_rank(self) -> int:
        """Return 0."""
        return 0


@contextmanager
def agreeing_with_itself() -> Iterator[None]:
    """Let ZeRO-3's comparisons with rank 0, which does not answer, compare this rank with itself, in the block."""
    theirs = getattr(zero_utils, COMM_NAME)
    setattr(zero_utils, COMM_NAME, _AsRankZero(theirs))
    try:
        yield
    finally:
        setattr(zero_utils, COMM_NAME, theirs)


@torch.no_grad()
def fill_padding(model: nn.Module) -> None:
    """At ZeRO-3, set the numbers of this rank's shards that lie after a parameter's end, which are memory without
    values.

    In a run no rank reads them. Where this rank answers for all, they stand for the others' numbers. Weights of one
    dimension become 1 and biases 0, as norms have them; all others become normal numbers.
    """
    draw: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, SHARD_NAMES[1]):
            continue
        shape, shard, place, _ = (getattr(parameter, part) for part in SHARD_NAMES)
        padding = shard.data[max(0, prod(shape) - place * shard.numel()) :]
        if padding.numel() == 0:
            continue
        if len(shape) > 1:
            generator = draw.setdefault(padding.device, torch.Generator(padding.device).manual_seed(0))
            padding.normal_(std=_STD, generator=generator)
        else:
            padding.fill_(float(name.endswith("weight")))
        safe_set_local_fp32_param(parameter, shard.data.float())
