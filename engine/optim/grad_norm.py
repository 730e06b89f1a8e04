"""The global gradient norm of DeepSpeed's steps: checked on the device, with parameters that ZeRO does not see in it.

DeepSpeed's optimizers compute the norm, read it back to the host and clip by it, in three files. Inside
`norm_checked_by` their functions of these names (engine/optim/deepspeed_contract.py) are replaced.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from foreroute.engine.optim.deepspeed_contract import (
    BF16_NORM_NAME,
    NORM_CHECK_NAME,
    NORM_CHECKERS,
    NORM_MASK_NAME,
    NORMS_NAME,
    ZERO_STEPS,
    bf16_optimizer,
    stage_1_and_2,
)


@contextlib.contextmanager
def norm_checked_by(check: Callable[[Tensor | float], bool], others: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block, make DeepSpeed's optimizers check the norm with `check`, keep the norm on the device, and join
    the norms of other parameters to it."""
    replaced: list[tuple[Any, str, Any]] = [(module, NORM_CHECK_NAME, check) for module in NORM_CHECKERS]
    replaced.append((stage_1_and_2, NORM_MASK_NAME, mask_norm))
    for module, name in (*((module, NORMS_NAME) for module in ZERO_STEPS), (bf16_optimizer, BF16_NORM_NAME)):
        replaced.append((module, name, _joined(getattr(module, name), others)))
    theirs = [getattr(module, name) for module, name, _ in replaced]
    try:
        for module, name, ours in replaced:
            setattr(module, name, ours)
        yield
    finally:
        for (module, name, _), function in zip(replaced, theirs, strict=True):
            setattr(module, name, function)


def _joined(norm_of: Callable[..., Tensor], others: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Return a function of DeepSpeed that computes a norm, to which the others are joined."""
    return lambda *args, **kwargs: joint_norm(norm_of(*args, **kwargs), others)


def joint_norm(norm: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Join norms of other parameters to one that is negative (DeepSpeed's -1) or inf where it is not finite."""
    for other in others:
        norm = torch.where(norm < 0, norm, torch.hypot(norm, other.to(norm)))
    return norm


def mask_norm(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """Replace DeepSpeed's function of the same purpose, without its copy from the host."""
    norm.masked_fill_(~norm.isfinite(), val)


def clip_factor(norm: Tensor, clip: float) -> Tensor:
    """Return the factor by which DeepSpeed multiplies gradients of this norm.

    Args:
        clip: largest norm; 0 for none.
    """
    if not clip:
        return torch.ones_like(norm)
    factor: Tensor = clip / (norm + 1e-6)
    return factor.clamp(max=1.0)
