"""A run's state on another layout of ranks than the one that saved it."""

from collections.abc import Mapping
from typing import Any

import torch

from foreroute.engine.config import BalanceOver, Config, Keys, ModelConfig, Router
from foreroute.engine.model.transformer_xl import Memory
from foreroute.engine.parallel.mesh import Mesh


def not_in_rounding_alone(manifest: Mapping[str, Any], config: Config, mesh: Mesh) -> list[str]:
    """List effects beyond rounding when a checkpoint is resumed under another layout of ranks or micro-batches."""
    accumulation = manifest["config"]["train"]["accumulation"]
    then = manifest.get("ranks", 1), manifest.get("expert_ranks", 1), accumulation
    if then == (mesh.world, mesh.ep_size, config.train.accumulation):
        return []
    learned = config.moe.router is Router.learned and config.moe.balance_loss > 0
    regrouped = accumulation != config.train.accumulation or config.moe.balance_over is BalanceOver.micro
    found = {
        "dropout draws new numbers": drops_out(config.model),
        "keys are shuffled among other tokens": config.moe.keys is Keys.shuffled,
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
