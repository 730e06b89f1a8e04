"""Trains tiny Qwen3-MoE, OLMoE and Mixtral models of transformers on foreroute's exchange and kernels.

    .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 examples/hugging_face/train_moe.py

Nothing is downloaded: weights are drawn, and the text is a file of Python's own. Each model runs once with its own
routers and once with the routes that their model recorded. A line shows how far its logits are from theirs, the
collectives of a layer and the bytes that a rank sends in a forward pass, losses, and whether the model that was
exported before training equals the imported one bit for bit.
"""

import argparse
import copy
import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import transformers
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy

from foreroute.engine.config import ParallelConfig
from foreroute.engine.hugging_face.expert_models import export_state_dict, record_routes, replace_experts
from foreroute.engine.plug_in import parameter_groups

LAYERS, STEPS, ROWS, LENGTH = 2, 10, 8, 32
SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "use_cache": False}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OWN: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 64, "head_dim": 16, "norm_topk_prob": True},
    "Olmoe": {"num_experts": 8},
    "Mixtral": {"num_local_experts": 8},
}


def their_model(family: str) -> Any:
    """Build a model of transformers, the same on all ranks."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **OWN[family])
    return getattr(transformers, f"{family}ForCausalLM")(config)


def batches(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and targets of each step."""
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    places = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        ids = text[torch.randint(len(text) - LENGTH, (ROWS, 1), generator=places) + torch.arange(LENGTH + 1)]
        yield ids[:, :-1], ids[:, 1:]


def run(family: str, stage: int, *, replayed: bool) -> tuple[float, float, int, float, float, bool]:
    """Import a model, compare it with theirs, export it, and train it; return the numbers of its line."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    theirs = their_model(family)
    model = copy.deepcopy(theirs)
    experts = replace_experts(model, replayed=replayed, parallel=ParallelConfig(expert_ranks=ranks))
    optimizer = torch.optim.Adam(parameter_groups(model.parameters()), lr=0.003)
    config = {"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": {"stage": stage}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    theirs = theirs.to(engine.device)

    exported, imported = export_state_dict(model), theirs.state_dict()
    same = all(torch.equal(value, imported[name].cpu()) for name, value in exported.items())

    losses: list[float] = []
    for ids, targets in batches(rank):
        ids, targets = ids.to(engine.device), targets.to(engine.device)
        routes = record_routes(theirs, input_ids=ids)
        before = (experts.comm.collectives, experts.comm.sent_bytes) if experts.comm else (0, 0)
        with experts.planned(ids, routes=routes) if replayed else nullcontext():
            logits = engine(input_ids=ids).logits
            if not losses:
                want = theirs(input_ids=ids).logits
                error = ((logits - want).norm() / want.norm()).item()
                after = (experts.comm.collectives, experts.comm.sent_bytes) if experts.comm else (0, 0)
                sent = [end - start for start, end in zip(before, after, strict=True)]
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
            engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return error, sent[0] / LAYERS, sent[1], losses[0], losses[-1], same


def main() -> None:
    """Print a line for each family and each kind of routes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(OWN), default=list(OWN))
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=1, help="ZeRO stage")
    options = parser.parse_args()
    deepspeed.utils.logging.logger.setLevel("ERROR")
    distributed.init_process_group()
    first = distributed.get_rank() == 0
    if first:
        ranks = distributed.get_world_size()
        print(f"{ranks} rank{'s' * (ranks > 1)}, ZeRO-{options.stage}; forward pass of {LAYERS} expert layers")
        print("model     routes    logits differ  collectives/layer  bytes sent  loss, first and last  export = import")
    for family in options.families:
        for replayed in (False, True):
            error, collectives, sent, loss, last, same = run(family, options.stage, replayed=replayed)
            if first:
                kind = "replayed" if replayed else "live"
                print(
                    f"{family:<9} {kind:<9} {error:<14.1e} {collectives:<18g} {sent:<11,} {loss:.3f}, {last:.3f}"
                    f"          {'yes' if same else 'no'}",
                    flush=True,
                )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
