"""Expert models of transformers on foreroute's exchange and kernels: Qwen3-MoE, OLMoE, Mixtral.

    model = Qwen3MoeForCausalLM(config)                                       # or from_pretrained
    experts = replace_experts(model, parallel=ParallelConfig(expert_ranks=2))
    engine, *_ = deepspeed.initialize(model=model, optimizer=Adam(parameter_groups(model.parameters())), config=..)
    loss = engine(input_ids=ids, labels=ids).loss
    ...
    export_pretrained(model, folder)                                          # as their save_pretrained

Blocks are replaced as modules. transformers has an interface for the computation of experts alone
(ALL_EXPERTS_FUNCTIONS), but it does not hold what is needed here: a registered function gets the experts after the
router's choice, so replayed routes could not skip the router; and the module around it keeps all experts, in their
layout, as parameters that are not sharded, so DeepSpeed would reduce and partition them like any other, and a copy in
our layout would be made in every pass. Their router module stays what it is (host_router.py).

Routes recorded elsewhere, such as by the engine that generated a text, are replayed with `replayed=True`: their router
does not choose, and its gate weighs the recorded experts only. No counts are exchanged then.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from foreroute.engine.config import KernelsConfig, MoEConfig, ParallelConfig, RouteWeights
from foreroute.engine.errors import require
from foreroute.engine.hugging_face.families import ROUTERS, Shape, find_blocks, import_experts, shape_of, their_weights
from foreroute.engine.hugging_face.host_router import HostRouter
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.optim.expert_sharding import whole_state
from foreroute.engine.plug_in import experts_of
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.plug_in.replace import insert_layers
from foreroute.engine.routing.methods import planned_method
from foreroute.engine.routing.planned_router import RouterInputs

_HOST = f"{HostRouter.__module__}:{HostRouter.__qualname__}"


def replace_experts(
    model: Any, *, replayed: bool = False, parallel: ParallelConfig | None = None, kernels: KernelsConfig | None = None
) -> PlannedExperts:
    """Replace each expert block of a model of transformers by foreroute's expert layer with the same weights.

    Call it before DeepSpeed or an optimizer takes the model's parameters, on every rank with the same weights. The
    model's outputs stay the same. With its own routers it is called as before (LiveExperts). With replayed routes every
    pass needs those of its batch, `with experts.planned(ids, routes=routes):`, int [B, Q, layers, k].

    Args:
        replayed: routes come with each batch; the router's gate makes the weights of these experts.
        parallel: expert_ranks above 1 shards the experts over that many neighbouring ranks and requires an initialized
            process group. By default each rank has all experts.

    Raises:
        UserError: the model has no such blocks, or they have something that the layer has not.
    """
    parallel = parallel or ParallelConfig()
    blocks = find_blocks(model)
    shapes = {name: shape_of(name, block) for name, block in blocks.items()}
    shape, *others = set(shapes.values())
    require(not others, f"expert blocks differ: {shape} and {others[:1]}; must be equal")
    _refuse_router_logits(model, replayed)
    moe = _config(shape, replayed)
    layers = {
        name: _layer(block, number, shape, moe, kernels or KernelsConfig())
        for number, (name, block) in enumerate(blocks.items())
    }
    embeddings: nn.Module = model.get_input_embeddings()
    inputs = RouterInputs(embeddings.get_parameter("weight").shape[0], 0, len(layers))
    method = planned_method(moe)
    routers = None if method is None else method.build(moe, inputs)
    return insert_layers(model, layers, routers, moe, parallel, inputs=inputs, width=shape.width, k=shape.k)


def _config(shape: Shape, replayed: bool) -> MoEConfig:
    return MoEConfig(
        router="given" if replayed else _HOST,
        experts=shape.experts,
        expert_width=shape.expert_width,
        activation=shape.activation,
        weights=RouteWeights.live if replayed else RouteWeights.table,
        gate_normalised=shape.normalised,
    )


def _layer(block: nn.Module, number: int, shape: Shape, moe: MoEConfig, kernels: KernelsConfig) -> MoELayer:
    with torch.device("meta"):
        layer = MoELayer(shape.width, moe, kernels, number)
    weight = block.get_parameter("gate.weight")
    layer.experts.to_empty(device=weight.device).to(shape.dtype)
    import_experts(layer.experts, block)
    layer.experts.without_biases()
    if layer.gate is not None:
        layer.gate.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    else:
        assert isinstance(layer.router, HostRouter)
        layer.router.gate = block.get_submodule("gate")
    return layer


def _refuse_router_logits(model: Any, replayed: bool) -> None:
    """Refuse a model's own balance loss where its routers do not run."""
    if not replayed:
        return
    line = "output_router_logits=True: must be False with replayed routes, for which no router runs"

    def check(_: nn.Module, __: object, options: dict[str, object]) -> None:
        wanted = options.get("output_router_logits")
        require(not (model.config.output_router_logits if wanted is None else wanted), line)

    require(not model.config.output_router_logits, line)
    model.register_forward_pre_hook(check, with_kwargs=True)


@torch.no_grad()
def record_routes(model: nn.Module, *args: Any, **options: Any) -> Tensor:
    """Run a model of transformers and return its routers' choices, int64 [B, Q, layers, k] on the host.

    The model is one before replace_experts, or one with its own routers after it.

    Args:
        args, options: of the model's call.

    Raises:
        UserError: no router ran.
    """
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        found.append(output[2].cpu())

    gates = [module for module in model.modules() if type(module).__name__ in ROUTERS]
    hooks = [gate.register_forward_hook(note) for gate in gates]
    try:
        batch: tuple[int, int] = model(*args, **options).logits.shape[:2]
    finally:
        for hook in hooks:
            hook.remove()
    require(len(found) > 0, f"{type(model).__name__}: no router of transformers ran; must have {', '.join(ROUTERS)}")
    return torch.stack(found, dim=1).view(*batch, len(found), -1)


def export_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state under the names of transformers, whole and on the host.

    It is a collective over all ranks, which all return the same. Values are those with which the model computes, in its
    number format. They are the imported ones bit for bit where nothing was trained.

    Raises:
        RuntimeError: experts are sharded, and DeepSpeed has not created their group yet.
    """
    experts = experts_of(model)
    state, of_layer = whole_state(model, [one.name for one in experts.replaced], experts.connect())
    for name, ours in of_layer.items():
        moe = {key.removeprefix("moe."): value for key, value in ours.items() if key.startswith("moe.")}
        state |= their_weights(name, moe)
    return state


def export_pretrained(model: Any, folder: Path | str) -> None:
    """Write a folder as the model's own save_pretrained does; it is read by from_pretrained without foreroute.

    A collective over all ranks; rank 0 writes.
    """
    state = export_state_dict(model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
