"""transformers' Trainer with expert layers in a small Llama: train, save, resume, compare with never stopping.

    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/hugging_face/trainer.py

On one rank without DeepSpeed unless --zero is given; on several ranks the experts are sharded over all of them. Nothing
is downloaded: the model is drawn at random, and the text is a file of Python's library. Texts have unequal lengths;
padding has no expert.
"""

import argparse
import gc
import inspect
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from foreroute.engine.config import Activation, Builder, MoEConfig, ParallelConfig
from foreroute.engine.hugging_face.trainer import PlannedTrainer
from foreroute.engine.plug_in import replace_feed_forwards
from foreroute.launch.start.process import leaving_at_once

WIDTH, VOCABULARY, PAD = 32, 257, 256
STEPS, SAVED_AT = 8, 4


class ExpertTrainer(PlannedTrainer, Trainer):  # type: ignore[misc]
    """Trainer that plans."""


def texts(count: int, longest: int = 24, shortest: int = 12) -> list[dict[str, Any]]:
    """Return texts of unequal lengths, as ids."""
    source = list(inspect.getsource(argparse).encode())
    places = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        start = int(torch.randint(len(source) - longest, (), generator=places))
        length = int(torch.randint(shortest, longest + 1, (), generator=places))
        found.append({"input_ids": source[start : start + length]})
    return found


def collate(items: list[dict[str, Any]], length: int | None = None) -> dict[str, torch.Tensor]:
    """Pad texts to the longest, or to a length; padding is masked and no target."""
    length = length or max(len(item["input_ids"]) for item in items)
    rows = [item["input_ids"] + [PAD] * (length - len(item["input_ids"])) for item in items]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": ids.masked_fill(ids == PAD, -100)}


def make_model(ranks: int) -> LlamaForCausalLM:
    """Build a small Llama with expert layers, their experts sharded over the ranks."""
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
        attention_dropout=0.1,
    )
    model = LlamaForCausalLM(config)
    moe = MoEConfig(experts=4, expert_width=32, rows=512, builder=Builder.random, activation=Activation.swiglu)
    replace_feed_forwards(
        model,
        r"model\.layers\.\d+\.mlp",
        width=WIDTH,
        vocab_size=VOCABULARY,
        moe=moe,
        k=2,
        dropout=0.1,
        parallel=ParallelConfig(expert_ranks=ranks),
    )
    return model


def make_trainer(folder: Path, ranks: int, options: argparse.Namespace) -> ExpertTrainer:
    """Build a new model and its trainer."""
    zero = options.zero if options.zero is not None else (1 if ranks > 1 else None)
    deepspeed = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": zero},
    }
    args = TrainingArguments(
        output_dir=str(folder),
        deepspeed=None if zero is None else deepspeed,
        max_steps=STEPS,
        per_device_train_batch_size=8 // ranks,
        per_device_eval_batch_size=8 // ranks,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=0.003,
        logging_steps=1,
        save_steps=SAVED_AT,
        eval_strategy="steps",
        eval_steps=SAVED_AT,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=options.workers,
    )
    return ExpertTrainer(
        make_model(ranks),
        args,
        train_dataset=texts(48),
        eval_dataset=texts(16),
        data_collator=collate if ranks == 1 else fixed,
    )


def fixed(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad texts to one length, the same on all ranks."""
    return collate(items, length=24)


def losses(trainer: ExpertTrainer) -> list[float]:
    """Return the logged losses of training and evaluation."""
    return [line[key] for line in trainer.state.log_history for key in ("loss", "eval_loss") if key in line]


def main() -> None:
    """Train without a break, then from the checkpoint in the middle, and print both."""
    parser = argparse.ArgumentParser(description="Trainer with expert layers")
    parser.add_argument("--zero", type=int, help="ZeRO stage; by default 1 on several ranks, no DeepSpeed on one")
    parser.add_argument("--workers", type=int, default=0, help="workers of the data loader")
    options = parser.parse_args()
    gc.freeze()  # exempts imports from the collections of ZeRO-3
    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shared = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(shared)
    folder = Path(str(shared[0]))
    whole = make_trainer(folder / "run", ranks, options)
    whole.train()
    resumed = make_trainer(folder / "run", ranks, options)
    resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{SAVED_AT}"))
    if rank == 0:
        print("never stopped:", *losses(whole))
        print("resumed:      ", *losses(resumed))
        print("equal:", losses(whole) == losses(resumed))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)


if __name__ == "__main__":
    with leaving_at_once():
        main()
