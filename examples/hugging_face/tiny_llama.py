"""A small Llama with expert layers, and texts of unequal lengths; nothing is downloaded."""

import argparse
import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from foreroute.engine.config import Activation, Builder, MoEConfig, ParallelConfig
from foreroute.engine.plug_in import replace_feed_forwards

WIDTH, VOCABULARY, PAD = 32, 257, 256


def texts(count: int, longest: int = 24, shortest: int = 12) -> list[dict[str, list[int]]]:
    """Return texts of unequal lengths, as ids."""
    source = list(inspect.getsource(argparse).encode())
    places = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        start = int(torch.randint(len(source) - longest, (), generator=places))
        length = int(torch.randint(shortest, longest + 1, (), generator=places))
        found.append({"input_ids": source[start : start + length]})
    return found


def collate(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad texts to the longest; padding is masked, so it has no expert, and it is no target."""
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.tensor([item["input_ids"] + [PAD] * (longest - len(item["input_ids"])) for item in items])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": ids.masked_fill(ids == PAD, -100)}


def make_model(ranks: int, dropout: float = 0.1, **moe: Any) -> LlamaForCausalLM:
    """Build the model, its experts sharded over the ranks, which have a process group."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        attention_dropout=dropout,
    )
    model = LlamaForCausalLM(config)
    options = {"experts": 4, "expert_width": 32, "rows": 512, "builder": Builder.random, **moe}
    replace_feed_forwards(
        model,
        r"model\.layers\.\d+\.mlp",
        width=WIDTH,
        vocab_size=VOCABULARY,
        moe=MoEConfig(activation=Activation.swiglu, **options),
        k=2,
        dropout=dropout,
        parallel=ParallelConfig(expert_ranks=ranks),
    )
    return model


def shared_folder() -> Path:
    """Return a new folder, the same on all ranks of this machine."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    return Path(made[0])
