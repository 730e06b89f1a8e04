"""One rank of benchmarks/bench_hugging_face: makes all systems, compares their losses, times their steps in turn.

Rank 0 prints one JSON object: milliseconds of each system's step, on the slowest rank, fastest of the rounds; and the
bytes that this rank's exchange of token rows, counts and weights sent in a step of ours.
"""

import argparse
import copy
import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Any

import deepspeed
import torch
import transformers
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import cross_entropy

from benchmarks.harness import slowest_seconds
from foreroute.engine.config import ParallelConfig
from foreroute.engine.hugging_face.expert_models import record_routes, replace_experts
from foreroute.engine.plug_in import parameter_groups
from foreroute.launch.start.process import keep_freed_memory, leaving_at_once

SAME_LOSS = 1e-4
PUBLISHED = {"width": 256, "hidden": 512, "experts": 16, "k": 4, "layers": 4, "rows": 2, "length": 256}
QUICK = {"width": 32, "hidden": 32, "experts": 8, "k": 2, "layers": 2, "rows": 2, "length": 16}


def their_model(shape: dict[str, int]) -> Any:
    """Build a Qwen3-MoE, the same on all ranks."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=shape["width"],
        moe_intermediate_size=shape["hidden"],
        num_experts=shape["experts"],
        num_experts_per_tok=shape["k"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=shape["width"] // 4,
        norm_topk_prob=True,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def on_deepspeed(model: Any, rows: int) -> Any:
    """Return an engine at ZeRO-1."""
    optimizer = torch.optim.Adam(parameter_groups(model.parameters()), lr=1e-4)
    config = {"train_micro_batch_size_per_gpu": rows, "zero_optimization": {"stage": 1}, "steps_per_print": 10**9}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def expert_parallel(model: Any) -> Any:
    """Return the model on their FSDP2, with their exchange of tokens between the ranks of experts."""
    ranks = dist.get_world_size()
    config = transformers.distributed.DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="all_to_all")
    found: list[str | None] = [None]
    with TemporaryDirectory() as folder:
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
            found = [folder]
        dist.broadcast_object_list(found)
        parallel = type(model).from_pretrained(found[0], distributed_config=config)
        dist.barrier()
    return parallel.train()


def systems(shape: dict[str, int], names: list[str], ids: Tensor, targets: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the step of each system: forward, backward, Adam; it returns the loss."""
    theirs = their_model(shape)
    routes, parallel = record_routes(theirs, input_ids=ids), ParallelConfig(expert_ranks=dist.get_world_size())
    steps: dict[str, Callable[[], Tensor]] = {}

    def loss_of(model: Any) -> Tensor:
        logits = model(input_ids=ids).logits
        return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    for name in names:
        model = copy.deepcopy(theirs)
        if name == "expert_parallel":
            model = expert_parallel(model)
            adam = torch.optim.Adam(model.parameters(), lr=1e-4)

            def step(model: Any = model, adam: torch.optim.Optimizer = adam) -> Tensor:
                loss = loss_of(model)
                loss.backward()
                adam.step()
                adam.zero_grad()
                return loss.detach()

            steps[name] = step
            continue
        experts = None if name == "own" else replace_experts(model, replayed=name == "replayed", parallel=parallel)
        engine = on_deepspeed(model, len(ids))

        def engine_step(engine: Any = engine, experts: Any = experts, replayed: bool = name == "replayed") -> Tensor:
            with experts.planned(ids, routes=routes) if replayed else nullcontext():
                loss = loss_of(engine)
                engine.backward(loss)
            engine.step()
            return loss.detach()

        engine_step.experts = experts  # type: ignore[attr-defined]
        steps[name] = engine_step
    return steps


def main() -> None:
    """Run as one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--systems", nargs="+", required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    deepspeed.utils.logging.logger.setLevel("ERROR")
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    shape = QUICK if args.quick else PUBLISHED
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(3, 256, (shape["rows"], shape["length"] + 1), generator=generator)
    steps = systems(shape, args.systems, ids[:, :-1], ids[:, 1:])
    losses = {name: step().item() for name, step in steps.items()}
    for name, loss in losses.items():
        want = losses["live"]
        if abs(loss - want) > SAME_LOSS * want:
            raise RuntimeError(f"NOT TIMED: the first loss of {name} is {loss}, that of live {want}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    sent: dict[str, int] = {}
    for number in range(args.rounds):
        for name in random.Random(number).sample(list(steps), len(steps)):
            comm = getattr(getattr(steps[name], "experts", None), "comm", None)
            before = 0 if comm is None else comm.sent_bytes
            times[name].append(1e3 * slowest_seconds(steps[name]))
            if comm is not None:
                sent[name] = comm.sent_bytes - before
    if dist.get_rank() == 0:
        print(json.dumps({name: {"step_ms": min(found), "bytes": sent.get(name)} for name, found in times.items()}))
    dist.barrier()


if __name__ == "__main__":
    with leaving_at_once():
        main()
