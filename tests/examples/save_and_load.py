import argparse
import inspect
import sys
from pathlib import Path

import deepspeed
import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy

from foreroute.engine.config import Builder, MoEConfig, ParallelConfig
from foreroute.engine.plug_in import load_pretrained, parameter_groups, replace_feed_forwards, save_pretrained


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.GRU(64, 64, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))

    def forward(self, x):
        x = x + self.mix(x)[0]
        return x + self.mlp(x)


folder, stage = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group()
rank, ranks = distributed.get_rank(), distributed.get_world_size()
torch.manual_seed(0)
text = torch.tensor(list(inspect.getsource(argparse).encode()))
model = nn.Sequential(nn.Embedding(256, 64), Block(), Block(), nn.Linear(64, 256))

moe = MoEConfig(experts=6, expert_width=64, rows=4096, builder=Builder.random)
parallel = ParallelConfig(expert_ranks=ranks)
experts = replace_feed_forwards(model, r"\d\.mlp", width=64, vocab_size=256, moe=moe, k=2, parallel=parallel)
optimizer = torch.optim.Adam(parameter_groups(model.parameters()), lr=0.003, eps=1e-6)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
config = {"train_micro_batch_size_per_gpu": 6 // ranks, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)

if folder.exists():
    load_pretrained(engine, folder)
for step in range(engine.global_steps, engine.global_steps + 20):
    places = torch.randint(len(text) - 64, (6, 1), generator=torch.Generator().manual_seed(step))
    ids = text[places + torch.arange(65)].chunk(ranks)[rank].to(engine.device)
    with experts.planned(ids[:, :-1]):
        loss = cross_entropy(engine(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        engine.backward(loss)
    engine.step()
save_pretrained(engine, folder)
distributed.all_reduce(loss := loss.detach() / ranks)
if rank == 0:
    print(f"step {engine.global_steps} loss {loss.item():.4f}")
