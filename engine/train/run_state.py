"""A run's state on another layout of ranks than the one that saved it."""

from collections.abc import Mapping
from typing import Any

import torch

from foreroute.engine.config import BalanceOver, Keys, ModelConfig, MoEConfig
from foreroute.engine.model.transformer_xl import Memory
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.methods import live_methods


def not_in_rounding_alone(
    manifest: Mapping[str, Any], mesh: Mesh, model: ModelConfig, moe: MoEConfig, *, accumulation: int
) -> list[str]:
    """List effects beyond rounding when a checkpoint is resumed under another layout of ranks or micro-batches.

    Args:
        accumulation: micro-batches of a step, now.
    """
    before = manifest["config"]["train"]["accumulation"]
    then = manifest.get("ranks", 1), manifest.get("expert_ranks", 1), before
    if then == (mesh.world, mesh.ep_size, accumulation):
        return []
    learned = moe.balance_loss > 0 and any(method.balances for method in live_methods(model, moe))
    regrouped = before != accumulation or moe.balance_over is BalanceOver.micro
    found = {
        "dropout draws new numbers": drops_out(model),
        "keys are shuffled among other tokens": moe.keys is Keys.shuffled,
        "the balance loss counts other tokens": learned and regrouped,
    }
    return [words for words, applies in found.items() if applies]


def drops_out(model: ModelConfig) -> bool:
    """Return whether the model draws from PyTorch's generators; the experts' dropout is hashed."""
    return max(model.dropout, model.attention_dropout) > 0


def join_memory(memory: list[Memory | None]) -> Memory | None:
    """Concatenate the micro-batches' streams: global stream order on one rank."""
    present = [micro for micro in memory if micro is not None]
    if len(present) < len(memory):
        return None
    return tuple(torch.cat(layer) for layer in zip(*present, strict=True))
