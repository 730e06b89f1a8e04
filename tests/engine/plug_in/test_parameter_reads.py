"""Which parameters a plan and a layer read: ZeRO-3 gathers one that is read by its name in a forward pass, in the
thread that reads it."""

from collections import OrderedDict

import torch
from torch import nn

from foreroute.engine.config import Builder, MoEConfig
from foreroute.engine.plug_in import replace_feed_forwards

WIDTH = 8


class Watched(OrderedDict):
    """Parameters of a module, as DeepSpeed holds them."""

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name)


def test_only_the_experts_themselves_read_their_parameters():
    ids = torch.arange(12).view(2, 6)
    model = nn.Sequential(nn.Embedding(12, WIDTH), nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH)))
    moe = MoEConfig(experts=2, expert_width=8, ngram=2, rows=16, builder=Builder.random)
    experts = replace_feed_forwards(model, "1", width=WIDTH, vocab_size=12, moe=moe, k=1)
    module = experts.layers[0].experts
    module._parameters = watched = Watched(module._parameters)
    watched.read = []
    outside = []
    module.register_forward_pre_hook(lambda *_: outside.extend(watched.read))
    with experts.planned(ids):
        model(ids)
    assert outside == []
    assert {"w1", "w2"} <= set(watched.read)  # a control: the experts read them
