"""A step in which the host waits for nothing, by what it reads back.

Read-backs are counted on CPUs, over whole steps through DeepSpeed on one rank and two. The second proof is of another
kind: forward and backward of tensors without data (PyTorch's meta device), where nothing can be read.
"""

import sys
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from foreroute.engine.config import RouteWeights
from foreroute.engine.data.loader import PlannedLoader
from foreroute.engine.data.planned_batches import TrainingBatches
from foreroute.engine.data.streams import Streams
from foreroute.engine.metrics.rank_sums import RankRow, sum_over_ranks
from foreroute.engine.metrics.step_meter import StepMeter
from foreroute.engine.model.build import build_model
from foreroute.engine.moe.exchange import build_exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.nested import map_tensors
from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.optim.expert_sharding import shard_experts
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.routing.live.frozen import FrozenRouter
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.read_backs import HostWaits, ReadBacks
from foreroute.engine.testing.routers import hashed_of
from foreroute.engine.testing.tiny_run import LAYERS, SEGMENT, STREAMS, SYMBOLS, K, tiny_config
from foreroute.engine.train.step import train_step

CPU_PRODUCTS = "kernels/expert_index.py:counts"
"""kernels/cpu/ multiplies expert by expert, and needs their sizes; kernels/gpu/ does not call it."""
CLIP = {"clip": 0.25}
QUIET = {  # ZeRO stage, options of the run
    "no ZeRO": (0, {}),
    "ZeRO-1": (1, {}),
    "ZeRO-1, clipped": (1, CLIP),
    "ZeRO-2, clipped": (2, CLIP),
    "ZeRO-2, bf16": (2, {"precision": "bf16", **CLIP}),
    "many symbols": (1, {"symbols": 1500, **CLIP}),
    "words": (1, {"model": {"cutoffs": [2, 9], "div_val": 2}, **CLIP}),
    "gate": (2, {"moe": {"weights": RouteWeights.live}, **CLIP}),
    "experts without rows": (1, {"moe": {"constant_experts": 1, "copy_experts": 1, "null_experts": 1}, **CLIP}),
    "in parts": (1, {"accumulation": 2, "recompute": True, "dropout": 0.1, **CLIP}),
}
EXCEPTIONS = {  # ZeRO stage, options, router, who reads back and why
    "ZeRO-3": (
        *(3, CLIP, "hashed"),
        {"stage3.py:get_grad_norm_direct": "a constant goes to the device for each group of parameters"},
    ),
    "ZeRO-1, bf16": (
        *(1, {"precision": "bf16", **CLIP}, "hashed"),
        {
            "utils.py:clip_tensors_by_global_norm": "BF16_Optimizer compares the norm with the clip; ZeRO-2 does not",
            "utils.py:mask_nan_or_inf_with_val_inplace": "likewise, a constant for each norm",
            "utils.py:to_tensor": "likewise, of experts that are shared out",
            "utils.py:is_invalid_grad_norm": "likewise",
            "utils.py:get_norm_with_moe_layers": "likewise",
        },
    ),
    "offload": (
        *(2, {"offload": True, **CLIP}, "hashed"),
        {
            "stage_1_and_2.py:complete_grad_norm_calculation_for_cpu_offload": "gradients go to the host",
            "stage_1_and_2.py:update_offload_overflow_tracker": "likewise",
        },
    ),
    "a live router": (
        *(1, CLIP, "learned"),
        {
            "kernels/expert_index.py:expert_rows": "its plan is made from hidden states",
            "kernels/expert_index.py:_stable_order": "likewise",
            "kernels/expert_index.py:_counts": "likewise",
            "plans/live_plan.py:_exchange_counts": "likewise, one table of counts",
        },
    ),
}


class Steps:
    """A tiny run's steps, one rank's part of them."""

    def __init__(self, mesh, stage, options, router="hashed", steps=3):
        options = dict(options)
        symbols, moe = options.pop("symbols", SYMBOLS), options.pop("moe", {})
        config = tiny_config(stage, **options)
        self.config = replace(config, moe=replace(config.moe, router=router, **moe))
        text = np.random.default_rng(0).integers(0, SYMBOLS, 2000).astype(np.uint8)
        routers = None
        if router == "hashed":
            tables = build_tables(self.config.moe, symbols, text, num_tables=LAYERS, seed=1, cache_dir=None)
            routers = [found.place(mesh) for found in HashedRouter.of_tables(self.config.moe, tables)]
        self.model = build_model(self.config, symbols)
        self.engine = adapter.start(self.model, self.config, mesh)
        world = World(mesh, cpu_group=GlooGroup(dist.group.WORLD)) if mesh.world > 1 else World(mesh)
        self.meter = StepMeter(self.model, self.engine.device, self.engine.comm, world)
        data = self.config.data
        streams = Streams(text, data.streams, data.segment, self.config.context, data.start)
        self.batches = TrainingBatches(self.config, streams, mesh, routers)
        self.memory = [None] * self.config.train.accumulation
        self.steps = steps

    def run(self, watch, first=0):
        """Train, watched from a step on; gives the steps' losses, which are read when nobody watches."""
        accumulation = self.config.train.accumulation
        steps = range(self.steps)
        loader = PlannedLoader(
            self.batches, steps=steps, accumulation=accumulation, prefetch=1, device=self.engine.device
        )
        losses = []
        for step in steps:
            with watch if step >= first else nullcontext():
                launched = train_step(
                    self.engine,
                    loader,
                    self.memory,
                    train=self.config.train,
                    optim=self.config.optim,
                    step=step,
                    meter=self.meter,
                )
            launched.wait()
            losses.append(launched.read().loss)
        loader.close()
        return losses


def quiet(rank, ranks):
    """What whole steps read back where they must read nothing: places, by case."""
    losses = {}
    for name, (stage, options) in QUIET.items():
        watch = ReadBacks(refuse=True, allowed=[CPU_PRODUCTS])
        losses[name] = Steps(Mesh(rank, ranks, ranks), stage, options).run(watch)
        assert watch.found == []
    return losses


def noisy(rank, ranks):
    """Places that read back, by exception."""
    found = {}
    for name, (stage, options, router, _) in EXCEPTIONS.items():
        watch = ReadBacks(allowed=[CPU_PRODUCTS])
        # in its first steps ZeRO-3 compares between the ranks in which order it gathers weights
        Steps(Mesh(rank, ranks, ranks), stage, options, router).run(watch, first=2)
        found[name] = {place for _, place in watch.found}
    return found


class Counting(FrozenRouter):
    """Counts itself which experts it chooses, and keeps what it is told after each step."""

    def __init__(self, width, moe, layer):
        super().__init__(width, moe, layer)
        self.chosen, self.told = torch.zeros(moe.experts), []

    def forward(self, x_TD, k, carried=None):
        live = super().forward(x_TD, k, carried)
        self.chosen += torch.bincount(live.route.expert_TK.flatten(), minlength=self.experts)
        return live

    def after_step(self, count_E):
        self.told.append((self.chosen.clone(), count_E.clone()))
        self.chosen.zero_()


def told(rank, ranks, expert_ranks):
    """Pairs of a rank's own count and what a router was told, by layer and step."""
    sys.modules["own_routers"] = own = ModuleType("own_routers")
    own.Counting = Counting
    steps = Steps(Mesh(rank, ranks, expert_ranks), 1, {"accumulation": 2}, "own_routers:Counting")
    steps.run(nullcontext())
    return [block.moe.router.told for block in steps.model.blocks]


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "expert_ranks"), [(1, 1), (2, 1), (2, 2)])
def test_after_a_step_a_router_is_told_the_rows_of_all_ranks_and_micro_batches(ranks, expert_ranks):
    """A user's own class, by the name of its module; each layer has counts of its own."""
    answers = [told(0, 1, 1)] if ranks == 1 else run_ranks(told, ranks, ranks, expert_ranks)
    for layer in range(LAYERS):
        for step in range(3):
            found = [answer[layer][step] for answer in answers]
            want = sum(own for own, _ in found)
            assert want.sum() == STREAMS * SEGMENT * K
            assert all(torch.equal(count_E.float(), want) for _, count_E in found)
            assert ranks == 1 or not torch.equal(found[0][0], want)  # negative control: not its own alone
    assert not torch.equal(answers[0][0][0][1], answers[0][1][0][1])


def on_ranks(function, ranks):
    return [function(0, 1)] if ranks == 1 else run_ranks(function, ranks, ranks)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_reads_nothing_back(ranks):
    for losses in on_ranks(quiet, ranks):
        assert all(len(set(found)) == 3 for found in losses.values())  # it trained


@pytest.mark.dist
def test_who_still_reads_back_is_named():
    """Nobody else, and everybody who is named, on one rank or two: a name that is no longer needed goes."""
    seen = {name: set() for name in EXCEPTIONS}
    for ranks in (1, 2):
        for answer in on_ranks(noisy, ranks):
            for name, places in answer.items():
                seen[name] |= places
    for name, (*_, named) in EXCEPTIONS.items():
        assert [place for place in seen[name] if not place.endswith(tuple(named))] == [], name
        assert all(any(place.endswith(end) for place in seen[name]) for end in named), name


@pytest.mark.parametrize("where", ["forward", "backward", "update"])
def test_a_planted_read_is_seen(where):
    steps = Steps(Mesh(), 1, CLIP)
    parameter = steps.model.get_parameter("output_bias")
    if where == "forward":
        steps.model.register_forward_hook(lambda *inputs: inputs[2].loss.item() and None)
    elif where == "backward":
        parameter.register_post_accumulate_grad_hook(lambda p: p.sum().tolist() and None)
    else:
        steps.engine._adam.register_step_post_hook(lambda *_: parameter.sum().cpu() and None)
    with pytest.raises(HostWaits, match=r"test_step\.py:<lambda>"):
        steps.run(ReadBacks(refuse=True, allowed=[CPU_PRODUCTS]))


class Silent:
    """Collectives that bring nothing."""

    def __init__(self, ranks):
        self._ranks = ranks

    def get_rank(self, group):
        return 0

    def get_world_size(self, group):
        return self._ranks

    def _collective(self, *args, **options):
        return self

    all_to_all_single = all_gather_into_tensor = _collective

    def wait(self):
        return True

    def get_future(self):
        return self

    def add_done_callback(self, call):
        call(None)


class Uploads(TorchDispatchMode):
    """Counts copies from the host to where nothing has data."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        result = func(*args, **(kwargs or {}))
        copies = func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        self.number += copies and source.device.type == "cpu" and result.is_meta
        return result


def without_data(ranks, read=None, model=None):
    """Forward, backward and the sum over the ranks of tensors without data."""
    mesh = Mesh(0, ranks, ranks)
    config = tiny_config(dropout=0.1, model=model)
    text = np.random.default_rng(0).integers(0, SYMBOLS, 2000).astype(np.uint8)
    tables = build_tables(config.moe, SYMBOLS, text, num_tables=LAYERS, seed=1, cache_dir=None)
    streams = Streams(text, config.data.streams, config.data.segment, config.context, config.data.start)
    batches = TrainingBatches(config, streams, mesh, hashed_of(tables, mesh))
    planned = map_tensors(lambda tensor: tensor.to("meta"), batches.plan(batches.read(0, 0), K))
    model = build_model(config, SYMBOLS)
    for layer in model.modules():
        if isinstance(layer, MoELayer) and ranks > 1:
            shard_experts(layer, mesh)
            layer.exchange = build_exchange(
                ExpertGroupComm(None, Silent(ranks)), config.parallel, config.kernels.backend
            )
    model.to("meta")
    with Uploads() as uploads:
        output = model(planned.batch.ids_BQ, planned.batch.targets_BQ, None, planned.routing)
        output.loss.backward()
        assert uploads.number == 0
        total = sum_over_ranks([output], World(), RankRow(own_ms=1.0))
        assert uploads.number == 1  # the rank's row, pinned on a GPU
    if read is not None:
        read(total.is_finite)
    return [parameter.grad for parameter in model.parameters()], total


@pytest.mark.parametrize("ranks, model", [(1, None), (2, None), (1, {"cutoffs": [2, 9], "div_val": 2})])
def test_forward_and_backward_need_no_data(ranks, model):
    gradients, total = without_data(ranks, model=model)
    assert all(gradient is not None and gradient.is_meta for gradient in gradients) and total.values.is_meta


@pytest.mark.parametrize("read", [bool, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.nonzero])
def test_without_data_a_planted_read_fails(read):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        without_data(1, read)


class SyncsRefused:
    """PyTorch raises where a GPU would be waited for."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUIET)
def test_on_a_gpu_a_step_waits_for_nothing(name):
    """From the fourth step on: kernels are compiled in the first."""
    stage, options = QUIET[name]
    losses = Steps(Mesh(), stage, options, steps=6).run(SyncsRefused(), first=3)
    assert len(set(losses)) == 6
    with pytest.raises(RuntimeError, match="synchroniz"), SyncsRefused():  # the control
        torch.ones(2, device="cuda").sum().item()
