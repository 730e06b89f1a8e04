"""A loop with Accelerate and expert layers in a small Llama: train, save, resume, compare with never stopping.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m examples.hugging_face.accelerate_loop

On one rank without DeepSpeed unless --zero is given; on several ranks the experts are sharded over all of them.
"""

import argparse
import gc
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from torch import distributed as dist

from examples.hugging_face.tiny_llama import collate, make_model, shared_folder, texts
from foreroute.engine.hugging_face.accelerator import planned_batches, use_experts
from foreroute.engine.plug_in import experts_of, parameter_groups
from foreroute.launch.start.process import leaving_at_once

STEPS, SAVED_AT = 6, 3
ACCUMULATION = 2


def make_accelerator(zero: int | None) -> Accelerator:
    """Build the accelerator of a run."""
    if not torch.cuda.is_available():
        PartialState(cpu=True)  # Accelerator(cpu=True) would leave DeepSpeed out
    plugin = DeepSpeedPlugin(zero_stage=zero, gradient_accumulation_steps=ACCUMULATION, gradient_clipping=0.5)
    return Accelerator(gradient_accumulation_steps=ACCUMULATION, deepspeed_plugin=None if zero is None else plugin)


def train(accelerator: Accelerator, folder: Path, *, resume: bool) -> list[float]:
    """Train an epoch, from its start or from the checkpoint; return the loss of each optimizer step on this rank."""
    ranks, size = dist.get_world_size(), 8 // dist.get_world_size()
    accelerator.free_memory()
    model = make_model(ranks)
    experts = experts_of(model)
    use_experts(accelerator, experts)
    optimizer = torch.optim.AdamW(parameter_groups(model.parameters()), lr=0.003)
    data: Any = texts(8 * ACCUMULATION * STEPS)
    # A loader with a generator of its own leaves PyTorch's, which draws dropout, as the checkpoint has it.
    loader: Any = torch.utils.data.DataLoader(
        data, size, shuffle=True, collate_fn=collate, drop_last=True, generator=torch.Generator().manual_seed(0)
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if resume:
        accelerator.load_state(str(folder))
        loader = accelerator.skip_first_batches(loader, SAVED_AT * ACCUMULATION)
    losses, total = [], 0.0
    for plans, batch in planned_batches(accelerator, experts, loader, model=model):
        with accelerator.accumulate(model), experts.planned(plans):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item() / ACCUMULATION
        if accelerator.sync_gradients:
            losses.append(total)
            total = 0.0
            if not resume and len(losses) == SAVED_AT:
                accelerator.save_state(str(folder))
    return losses


def main() -> None:
    """Train without a break, then from the checkpoint in the middle, and print both."""
    parser = argparse.ArgumentParser(description="Accelerate with expert layers")
    parser.add_argument("--zero", type=int, help="ZeRO stage; by default 1 on several ranks, no DeepSpeed on one")
    options = parser.parse_args()
    gc.freeze()  # exempts imports from the collections of ZeRO-3
    dist.init_process_group()
    zero = options.zero if options.zero is not None else (1 if dist.get_world_size() > 1 else None)
    folder = shared_folder()
    accelerator = make_accelerator(zero)
    whole = train(accelerator, folder, resume=False)
    dist.barrier()
    resumed = train(accelerator, folder, resume=True)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        print("never stopped:", *whole)
        print("resumed:      ", *[" " * len(str(loss)) for loss in whole[:SAVED_AT]], *resumed)
        print("equal:", whole[SAVED_AT:] == resumed)


if __name__ == "__main__":
    with leaving_at_once():
        main()
