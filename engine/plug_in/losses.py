"""Losses that are means over tokens of all ranks, of which ranks have unequal numbers."""

import torch
from torch import Tensor
from torch import distributed as dist

from foreroute.engine.parallel.collectives import all_reduce_sum


def mean_over_ranks(loss_sum: Tensor, count: Tensor | int | float) -> Tensor:
    """Return a rank's loss of which the average over all ranks is the mean over the tokens of all: its gradient, too.

    It is loss_sum / (number of all ranks' tokens / ranks). A mean of each rank's own tokens would weigh a token more on
    a rank that has fewer. All ranks must call it; they add up one number. Without tokens the loss is 0.

    Args:
        loss_sum: sum of the losses of this rank's tokens, a scalar.
        count: how many these are. With gradient accumulation those of the whole step / micro-batches.

    Example: ranks with the sums 6 and 2 of 3 and 1 tokens have the losses 6 / (4 / 2) = 3 and 1, on average 2 = 8 / 4.
    """
    total = torch.as_tensor(count, dtype=torch.float64, device=loss_sum.device)
    ranks = 1
    if dist.is_initialized():
        ranks, total = dist.get_world_size(), all_reduce_sum(total)
    return loss_sum * (ranks / total.where(total > 0, 1.0)).to(loss_sum.dtype)
