"""The choices at a run's start: the backend by its device, and by a measurement the k from which layers run masked.

The measurement is made once and written into the run's resolved configuration, so that a resumed run computes exactly
as before: numerics must not depend on timing. Nothing else in the engine reads a clock to decide.
"""

import time
from dataclasses import replace

import torch
from torch import Tensor

from foreroute.engine.config import Backend, Config, KernelsConfig, MoEConfig
from foreroute.engine.errors import require
from foreroute.engine.parallel.world import World, together
from foreroute.kernels import ExpertWeights, expert_rows, moe_ffn
from foreroute.kernels.launching import is_interpreted

_TOKENS = 1024  # enough for stable products; a step of a small run has as many
_ROUNDS = 3


def resolve(config: Config, world: World, earlier: KernelsConfig | None = None) -> Config:
    """Fill in what the configuration leaves to the device and to measurement; returns a copy, equal on all ranks.

    Rank 0 chooses, and tells the other ranks.

    Args:
        earlier: of the run that is resumed, whose choices are kept.

    Raises:
        UserError: the Triton kernels are asked for where they cannot run.
    """
    kernels = config.kernels
    with together(world.cpu_group, rank_0_first=True):
        if world.first:
            kernels = choose_backend(kernels, world.device, earlier)
            if kernels.masked_from_k is None:
                first = config.moe.experts + 1
                if not config.moe.dense and kernels.backend is Backend.cpu:
                    first = measure_masked_from_k(config.moe, config.model.width, config.symbols_per_step)
                kernels = replace(kernels, masked_from_k=first)
    backend, masked_from_k = world.cpu_group.broadcast([kernels.backend.value, kernels.masked_from_k])
    return replace(config, kernels=replace(kernels, backend=Backend(backend), masked_from_k=masked_from_k))


def choose_backend(kernels: KernelsConfig, device: torch.device, earlier: KernelsConfig | None) -> KernelsConfig:
    """Choose the backend by the device, unless it is given; a resumed run keeps its choices.

    Raises:
        UserError: the Triton kernels are asked for where they cannot run.
    """
    if earlier is not None and kernels.masked_from_k is None:
        kernels = replace(kernels, masked_from_k=earlier.masked_from_k)
    if earlier is not None and kernels.backend is Backend.auto:
        kernels = replace(kernels, backend=earlier.backend)
    if kernels.backend is Backend.auto:
        kernels = replace(kernels, backend=Backend.triton if device.type == "cuda" else Backend.cpu)
    require(
        kernels.backend is not Backend.triton or device.type == "cuda" or is_interpreted(),
        f"kernels.backend=triton: the model is on {device}; needs a GPU, or TRITON_INTERPRET=1 for tests",
    )
    return kernels


def measure_masked_from_k(moe: MoEConfig, width: int, tokens: int) -> int:
    """Find the smallest k at which the masked form is faster, forward and backward; experts + 1 if there is none.

    The grouped form's time grows with k and the masked one's does not, so the crossing is found by bisection.
    """
    low, high = 1, moe.experts + 1  # masked loses below low, wins from high on
    while low < high:
        k = (low + high) // 2
        grouped, masked = _seconds(moe, width, min(_TOKENS, tokens), k)
        low, high = (low, k) if masked < grouped else (k + 1, high)
    return low


def _seconds(moe: MoEConfig, width: int, tokens: int, k: int) -> tuple[float, float]:
    """Return the fastest of a few interleaved rounds of (grouped, masked)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    shape = (moe.experts, moe.expert_width, width)
    gate_LFD = normal(*shape) if moe.activation.gated else None
    weights = ExpertWeights(normal(*shape), normal(*shape[:2]), normal(*shape), normal(shape[0], width), gate_LFD)
    x_TD = normal(tokens, width)
    expert_TK = torch.rand(tokens, moe.experts, generator=generator).topk(k, dim=1).indices
    rows, _ = expert_rows(expert_TK, moe.experts)
    weight_N = torch.full((tokens * k,), 1.0 / k)
    cotangent_TD = torch.ones_like(x_TD)

    def run(masked: bool) -> float:
        start = time.perf_counter()
        y_TD = moe_ffn(x_TD, weight_N, weights, rows, activation=moe.activation.function, masked=masked)
        y_TD.backward(cotangent_TD)
        return time.perf_counter() - start

    rounds = [(run(False), run(True)) for _ in range(_ROUNDS)]
    return min(grouped for grouped, _ in rounds), min(masked for _, masked in rounds)
