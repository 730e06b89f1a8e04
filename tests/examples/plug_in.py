import argparse
import inspect

import deepspeed
import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy

from foreroute.engine.config import MoEConfig, ParallelConfig
from foreroute.engine.plug_in import parameter_groups, replace_feed_forwards


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.GRU(64, 64, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))

    def forward(self, x):
        x = x + self.mix(x)[0]
        return x + self.mlp(x)


def batches(text, rank):
    places = torch.Generator().manual_seed(rank)
    for _ in range(50):
        ids = text[torch.randint(len(text) - 64, (8, 1), generator=places) + torch.arange(65)]
        yield ids[:, :-1], ids[:, 1:]


distributed.init_process_group()
rank, ranks = distributed.get_rank(), distributed.get_world_size()
torch.manual_seed(0)
text = torch.tensor(list(inspect.getsource(argparse).encode()))
model = nn.Sequential(nn.Embedding(256, 64), Block(), Block(), nn.Linear(64, 256))

moe, parallel = MoEConfig(experts=8, expert_width=64, rows=4096), ParallelConfig(expert_ranks=ranks)
experts = replace_feed_forwards(
    model, r"\d\.mlp", width=64, vocab_size=256, moe=moe, k=2, text_ids=text, parallel=parallel
)
optimizer = torch.optim.Adam(parameter_groups(model.parameters()), lr=0.003)
config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

for step, (plans, (ids, targets)) in enumerate(experts.ahead(batches(text, rank)), start=1):
    with experts.planned(plans):
        logits = engine(ids.to(engine.device))
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten().to(engine.device))
        engine.backward(loss)
    engine.step()
    if rank == 0 and step % 10 == 0:
        print(f"step {step} loss {loss.item():.3f}")
