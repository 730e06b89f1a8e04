"""Ten steps of a tiny model with a router of the examples, on one rank and on two that share the experts out.

The optimizer is linear in the gradient, which shows every gradient with its scale (Adam as usual would hide it).
"""

from dataclasses import replace

import numpy as np
import torch
from torch import distributed as dist

from foreroute.engine.config import MoEConfig
from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.streams import Streams
from foreroute.engine.model.build import build_model
from foreroute.engine.moe.layer import update_routers
from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.methods import planned_method
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.tiny_run import EXPERTS, SYMBOLS, tiny_config

STEPS = 10


def train(rank, ranks, router, k, stage, moe, recompute):
    """Return mean losses over the ranks, and each parameter and each buffer of a router; of experts each by itself."""
    config, mesh = tiny_config(stage, recompute=recompute), Mesh(rank, ranks, ranks)
    config = replace(config, moe=MoEConfig(router=router, experts=EXPERTS, expert_width=12, **moe))
    adapter.build_optimizer = lambda params, _: torch.optim.Adam(params, 100.0, (0.0, 0.999), 1e3, fused=True)
    text = np.random.default_rng(0).integers(0, SYMBOLS, 2000).astype(np.uint8)
    method, routers = planned_method(config.moe), None
    if method is not None:
        routers = method.build(config.moe, RouterInputs(SYMBOLS, 1, config.num_tables, text))
        routers = [found.place(mesh) for found in routers]
    engine = adapter.start(build_model(config, SYMBOLS), config, mesh)
    streams = Streams(text, config.data.streams, config.data.segment, config.context)
    losses = []
    for step in range(STEPS):
        batches = [streams.batch(step, streams.streams_of(r, 0, world=ranks, accumulation=1)) for r in mesh.ep_ranks]
        planned = plan_batch(group_batch(batches, mesh.ep_rank), k, routers)
        out = engine.forward(planned.batch.ids_BQ, planned.batch.targets_BQ, None, planned.routing)
        engine.backward(out.loss)
        assert engine.step()
        count_LE = out.count_LE.double()  # of the expert group, which is the world
        update_routers(engine.module, count_LE)
        loss = out.loss.detach() / ranks
        dist.all_reduce(loss)
        losses.append(float(loss))
    found = {name: buffer.numpy().copy() for name, buffer in engine.module.named_buffers() if ".router." in name}
    for name, state in engine.read_state():
        value = state["weight"].numpy().copy()
        if ".experts." in name:
            found |= {f"{name}@{e}": part for e, part in zip(mesh.local_experts(EXPERTS), value, strict=True)}
        else:
            found[name] = value
    return losses, found


def assert_two_ranks_train_like_one(router, k=2, *, stage=1, recompute=False, **moe):
    """Assert it, and that the loss and every parameter of the router changes; return the names of what was found.

    Args:
        router: FILE:CLASS in examples/routers/.
        moe: options of the section.
    """
    name = f"examples.routers.{router}"
    ((want_losses, want),) = run_ranks(train, 1, 1, name, k, 1, moe, False)
    seen = set()
    for losses, got in run_ranks(train, 2, 2, name, k, stage, moe, recompute):
        np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
        for key, value in got.items():
            np.testing.assert_allclose(value, want[key], rtol=1e-4, atol=1e-6, err_msg=key)
        seen |= got.keys()
    assert seen == want.keys() and len(set(want_losses)) == STEPS
    return want
