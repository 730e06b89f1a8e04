"""foreroute's expert layer in place of the feed-forwards of the user's model, with DeepSpeed or plain PyTorch.

    experts = replace_feed_forwards(
        model, r"layers\\.\\d+\\.mlp", width=256, vocab_size=256, moe=MoEConfig(), k=4, text_ids=text
    )
    optimizer = torch.optim.Adam(parameter_groups(model.parameters()), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    for ids, targets in batches:
        with experts.planned(ids):
            loss = engine(ids, targets)
            engine.backward(loss)
            engine.step()

Any planned router works (docs/routers.md); moe.strata must be 1. Live routers need no plan
(engine/plug_in/live_experts.py). With planned ones every forward pass needs a plan of its own ids, and a plan is used
once; a pass without a plan raises. `planned` makes the plan when it is entered. `ahead` and `plan` make it before the
step. After `attach(model)` each call of the model plans from its ids. On one rank DeepSpeed is not needed. On several
ranks it is: a group of `parallel.expert_ranks` neighbouring ranks shards the experts; DeepSpeed creates the groups and
reduces the gradients, at ZeRO 0 to 3. The ranks of a group may have unequal numbers of tokens.

Limits of DeepSpeed 0.19.8 with sharded experts, which foreroute cannot remove:

* gradient_clipping, by default 1.0, is wrong at ZeRO-0, where it averages the norms of ranks: set 0 there, or use
  ZeRO 1, 2 or 3.
* ZeRO 1 and 2 refuse a client optimizer without `parameter_groups`.
* A model built inside deepspeed.zero.Init is refused here; use_data_before_expert_parallelism is refused at the first
  forward pass.
* save_checkpoint refuses the layers: call save_pretrained and load_pretrained (engine/plug_in/saved/pretrained.py), for
  any number of ranks and ZeRO stage.

Letters: B sequences, Q ids of each, C = ngram - 1 ids left of them, D width, T = B*Q tokens, P ranks of the expert
group.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist

from foreroute.engine.config import Builder, KernelsConfig, MoEConfig, ParallelConfig, Split
from foreroute.engine.convert.start import Start, begin, put_around
from foreroute.engine.errors import require
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.optim.deepspeed_engine import skip_shared_memory_op, wait_at_most
from foreroute.engine.optim.expert_sharding import parameter_groups, shard_experts
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.plug_in.batch_planner import RoutePlanner
from foreroute.engine.plug_in.live_experts import LiveExperts, LiveFeedForward, LivePlanner
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.plug_in.planned_layer import PlannedFeedForward
from foreroute.engine.plug_in.plans import Plans
from foreroute.engine.plug_in.replaceable import Replaced, find_feed_forwards, replaced
from foreroute.engine.routing.methods import live_method, planned_method
from foreroute.engine.routing.planned_router import PlannedRouter, RouterInputs

__all__ = [
    "PlannedExperts",
    "PlannedFeedForward",
    "Plans",
    "Replaced",
    "experts_of",
    "parameter_groups",
    "replace_feed_forwards",
]

Text = Tensor | NDArray[np.integer[Any]] | Sequence[int]
"""Token ids, as one stream."""


def replace_feed_forwards(
    model: nn.Module,
    pattern: str,
    *,
    width: int,
    vocab_size: int,
    moe: MoEConfig,
    k: int,
    text_ids: Text | None = None,
    seed: int = 0,
    dropout: float = 0.0,
    init_std: float = 0.02,
    start: Start | None = None,
    parallel: ParallelConfig | None = None,
    kernels: KernelsConfig | None = None,
) -> PlannedExperts:
    """Replace each matching feed-forward of a model by an expert layer.

    Call it before DeepSpeed or an optimizer takes the model's parameters, on every rank with the same arguments. The
    new modules take x [..., D] alone and return the same shape, in the number format and on the device of the modules
    that they replace. The rest of the model and PyTorch's random state do not change. `replaced` of the result lists
    the replaced modules.

    Args:
        pattern: regular expression; modules whose whole name (as in named_modules) it matches are replaced. Each must
            hold the parameters of one feed-forward and no others: a block with attention or a norm is refused.
        width: width of the hidden states (D).
        k: initial number of active experts; set experts.k to change it.
        text_ids: training text as one stream of ids, from which tables are made, and to which the routes in a file of
            router given belong; None for tables of builder random and routers without tables.
        seed: seed of weights, tables and the experts' dropout.
        dropout: rate on the hidden units of the experts and the shared expert.
        init_std: standard deviation of the experts' initial weights; their biases are 0.
        start: makes the experts of the feed-forwards that they replace (engine/convert/): Copies(), Slices() or
            Adapters(). moe.expert_width and moe.activation then follow from them. None: the experts are drawn.
        parallel: expert_ranks above 1 shards the experts over that many neighbouring ranks and requires an initialized
            process group; exchange, wire and chunks configure the exchange. By default each rank has all experts.

    Raises:
        UserError: the pattern matches no module, or one that is not exactly one feed-forward; or options conflict.
    """
    parallel = parallel or ParallelConfig()
    method = planned_method(moe)
    require(
        method is not None or live_method(moe) is not None, f"moe.router={moe.router}: must be a router, such as hashed"
    )
    require(moe.strata == 1, f"moe.strata={moe.strata}: must be 1, as a feed-forward is replaced by one expert layer")
    require(not moe.by_layer, "moe.by_layer: must be empty, as the pattern selects the layers")
    require(moe.layers is None, f"moe.layers={moe.layers}: must be null, as the pattern selects the layers")
    require(0 <= dropout < 1, f"dropout={dropout}: must be in [0, 1)")
    names = find_feed_forwards(model, pattern, width)
    begun = None if start is None else begin(start, model, names, moe, width)
    moe = moe if begun is None else begun.moe
    inputs = _router_inputs(method, moe, vocab_size, text_ids, len(names), seed)
    routers = None if method is None else method.build(moe, inputs)
    layers, around = [], {}
    with torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}):
        torch.manual_seed(seed)
        for number, name in enumerate(names):
            like = next(model.get_submodule(name).parameters())
            with torch.device(like.device):
                layer = MoELayer(width, moe, kernels or KernelsConfig(), number, dropout=dropout)
            if begun is None:
                layer.experts.init_weights(init_std)
            layers.append(layer.to(like.dtype))
            if begun is not None:
                around[name] = begun.fill(name, layer, seed)
    experts = insert_layers(
        model, dict(zip(names, layers, strict=True)), routers, moe, parallel, inputs=inputs, width=width, k=k
    )
    for name, outer in around.items():
        if outer is not None:
            put_around(model, name, outer)
    return experts


def insert_layers(
    model: nn.Module,
    layer_of: Mapping[str, MoELayer],
    routers: Sequence[PlannedRouter] | None,
    moe: MoEConfig,
    parallel: ParallelConfig,
    *,
    inputs: RouterInputs,
    width: int,
    k: int,
) -> PlannedExperts:
    """Put layers with all experts in the place of modules of a model, sharded over the ranks.

    Args:
        layer_of: layers numbered from 0, by the names of the modules that they replace.
        routers: planned routers; None: the layers have live ones.
        inputs: those of planned routers; of live ones the vocabulary and the seed alone matter.
    """
    names, layers = list(layer_of), list(layer_of.values())
    mesh = _mesh(parallel.expert_ranks)
    skip_shared_memory_op()
    wait_at_most(timedelta(seconds=parallel.timeout_s))
    if mesh.ep_size > 1:
        for layer in layers:
            shard_experts(layer, mesh)
    inputs = dataclasses.replace(inputs, ids=None)
    experts: PlannedExperts
    if routers is None:
        live_planner = LivePlanner(layers[0], moe, mesh, parallel, inputs)
        experts = LiveExperts(layers, live_planner, seed=inputs.seed, k=k)
    else:
        planner = RoutePlanner(layers[0], routers, moe, mesh, parallel, inputs=inputs, width=width)
        experts = PlannedExperts(layers, planner, seed=inputs.seed, k=k)
    experts.replaced = tuple(replaced(name, model.get_submodule(name)) for name in names)
    for name, layer in layer_of.items():
        replacement = (LiveFeedForward if routers is None else PlannedFeedForward)(layer, experts)
        model.set_submodule(name, replacement.train(model.get_submodule(name).training))
    return experts


def experts_of(model: nn.Module) -> PlannedExperts:
    """Return the PlannedExperts of a model whose feed-forwards were replaced; a copy of such a model has its own.

    Raises:
        UserError: the model has no expert layers, or layers of several calls of replace_feed_forwards.
    """
    found = {m.experts for m in model.modules() if isinstance(m, PlannedFeedForward)}
    require(len(found) == 1, f"the model has expert layers of {len(found)} calls of replace_feed_forwards: must be 1")
    return found.pop()


def _mesh(expert_ranks: int) -> Mesh:
    started = dist.is_initialized()
    require(
        started or expert_ranks == 1,
        f"parallel.expert_ranks={expert_ranks}: start the process group first (torch.distributed.init_process_group)",
    )
    return Mesh(dist.get_rank(), dist.get_world_size(), expert_ranks) if started else Mesh()


def _router_inputs(
    method: type[PlannedRouter] | None, moe: MoEConfig, vocab_size: int, text_ids: Text | None, layers: int, seed: int
) -> RouterInputs:
    if method is None:
        return RouterInputs(vocab_size, seed, layers)
    random = moe.builder is Builder.random or "builder" not in method.uses
    require(
        random or text_ids is not None,
        f"moe.builder={moe.builder.name}: needs text_ids; without a text use moe.builder=random",
    )
    inputs = RouterInputs(vocab_size, seed, 1 if moe.share_table else layers)
    if text_ids is None:
        return inputs
    text = _on_host(text_ids)
    require(
        text.size > 0 and text.min() >= 0 and text.max() < vocab_size,
        f"text_ids: must be ids in 0 .. {vocab_size - 1}, at least one",
    )
    # kept with the model only for routers that need it again
    splits = partial(_training_split, text) if method.of_places else None
    return dataclasses.replace(inputs, ids=text, splits=splits)


def _training_split(text: NDArray[np.integer[Any]], split: Split) -> NDArray[np.integer[Any]]:
    require(
        split is Split.train, f"routes of the {split.name} split: text_ids is the training split; there is no other"
    )
    return text


def _on_host(text_ids: Text) -> NDArray[np.integer[Any]]:
    """Return a text from any device as one stream on the host."""
    if isinstance(text_ids, Tensor):
        require(not text_ids.is_meta, "text_ids: is on the meta device, without values; must be on another device")
        text_ids = text_ids.detach().cpu().numpy()
    text = np.asarray(text_ids).reshape(-1)
    require(np.issubdtype(text.dtype, np.integer), f"text_ids of {text.dtype}: must be whole numbers, as one stream")
    return text
