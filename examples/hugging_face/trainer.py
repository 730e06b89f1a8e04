"""transformers' Trainer with expert layers in a small Llama: train, save, resume, compare with never stopping.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m examples.hugging_face.trainer

On one rank without DeepSpeed unless --zero is given; on several ranks the experts are sharded over all of them.
"""

import argparse
import gc
import shutil
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import Trainer, TrainingArguments

from examples.hugging_face.tiny_llama import collate, make_model, shared_folder, texts
from foreroute.engine.hugging_face.trainer import PlannedTrainer
from foreroute.launch.start.process import leaving_at_once

STEPS, SAVED_AT = 8, 4


class ExpertTrainer(PlannedTrainer, Trainer):  # type: ignore[misc]
    """Trainer that plans."""


def make_trainer(folder: Path, options: argparse.Namespace) -> ExpertTrainer:
    """Build a new model and its trainer."""
    ranks = dist.get_world_size()
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
        make_model(ranks, options.dropout), args, train_dataset=texts(48), eval_dataset=texts(16), data_collator=collate
    )


def losses(trainer: ExpertTrainer) -> list[float]:
    """Return the logged losses of training and evaluation."""
    return [line[key] for line in trainer.state.log_history for key in ("loss", "eval_loss") if key in line]


def main() -> None:
    """Train without a break, then from the checkpoint in the middle, and print both."""
    parser = argparse.ArgumentParser(description="Trainer with expert layers")
    parser.add_argument("--zero", type=int, help="ZeRO stage; by default 1 on several ranks, no DeepSpeed on one")
    parser.add_argument("--workers", type=int, default=0, help="workers of the data loader")
    parser.add_argument("--dropout", type=float, default=0.1, help="rate in attention and experts")
    options = parser.parse_args()
    gc.freeze()  # exempts imports from the collections of ZeRO-3
    dist.init_process_group()
    folder = shared_folder()
    whole = make_trainer(folder, options)
    whole.train()
    resumed = make_trainer(folder, options)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED_AT}"))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        print("never stopped:", *losses(whole))
        print("resumed:      ", *losses(resumed))
        print("equal:", losses(whole) == losses(resumed))


if __name__ == "__main__":
    with leaving_at_once():
        main()
