"""Experts sharded over the ranks of an expert group, in DeepSpeed's groups."""

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch import distributed as dist

from foreroute.engine.config import BalanceOver, MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.optim.adam import comes_last
from foreroute.engine.optim.deepspeed_contract import (
    GROUP_NAMES,
    AutoEPMoELayer,
    groups,
    split_params_into_different_moe_groups_for_optimizer,
)
from foreroute.engine.parallel.collectives import ExpertGroupComm, all_reduce_sum
from foreroute.engine.parallel.mesh import Mesh


def is_sharded(param: nn.Parameter) -> bool:
    """Return whether other ranks of the expert group hold other experts of this parameter."""
    return not getattr(param, "allreduce", True)


class _ShardedLayer(MoELayer, AutoEPMoELayer):  # type: ignore[misc]
    """A layer with sharded experts; its class makes DeepSpeed treat it as one."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, without the process group that DeepSpeed sets."""
        return {**self.__dict__, "ep_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; copy.deepcopy does not copy the tags of parameters."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for parameter in self.experts.parameters():
            _tag(parameter, state["ep_group_name"])

    @property
    def num_local_experts(self) -> int:
        """Refuse DeepSpeed's checkpoints, which alone ask for it: they would lose the biases, and need equal ranks.

        Raises:
            UserError: always.
        """
        raise UserError(
            "save_checkpoint and load_checkpoint of DeepSpeed: take no sharded expert layers; call"
            " foreroute.engine.plug_in.save_pretrained(engine, folder) and load_pretrained on all ranks"
        )


# The next three functions and shard_experts also serve models of users' own (engine/plug_in/replace.py).
def expert_group_comm(mesh: Mesh, device: torch.device, *, timed: bool = True) -> ExpertGroupComm:
    """Return the communicator of this rank's expert group, which deepspeed.initialize creates.

    Args:
        timed: as for ExpertGroupComm.

    Raises:
        RuntimeError: the group does not exist yet, or differs from that of the mesh.
    """
    try:
        return ExpertGroupComm(_expert_group(mesh), deepspeed.comm, device, timed=timed)
    except (AssertionError, KeyError) as error:  # DeepSpeed's errors for a missing group
        raise RuntimeError(
            f"experts are sharded over {mesh.ep_size} ranks that have no group yet: "
            "call deepspeed.initialize with the model before you run it"
        ) from error


@torch.no_grad()
def whole_weight(parameter: Tensor, comm: ExpertGroupComm | None) -> Tensor:
    """Return a copy of a parameter or buffer on the host, whole: at ZeRO-3 from all shards, of sharded experts from all
    ranks of their group. A collective over all ranks.

    Args:
        comm: of the expert group; None: experts are not sharded.
    """
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            value = parameter.detach().clone()
    else:
        value = parameter.detach()
    if comm is not None and isinstance(parameter, nn.Parameter) and is_sharded(parameter):
        rows = comm.all_gather(value.flatten(1).contiguous()).wait()
        value = rows.view(-1, *value.shape[1:])
    return value.cpu().clone()


def whole_state(
    model: nn.Module, layers: Iterable[str], comm: ExpertGroupComm | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return the model's state as whole_weight has it: that outside the named layers, and of each its own, under the
    layer's own names. A collective over all ranks.
    """
    outside: dict[str, Tensor] = {}
    inside: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for key, value in model.state_dict(keep_vars=True).items():
        layer = next((name for name in inside if key.startswith(f"{name}.")), None)
        state, name = (outside, key) if layer is None else (inside[layer], key.removeprefix(f"{layer}."))
        state[name] = whole_weight(value, comm)
    return outside, inside


def aligned_first(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Sort parameters into their order in ZeRO's flat buffers (comes_last in engine/optim/adam.py)."""
    return sorted(parameters, key=lambda p: comes_last(p.numel()))


def parameter_groups(params: Iterable[nn.Parameter | dict[str, Any]]) -> list[dict[str, Any]]:
    """Split an optimizer's parameters into groups that separate sharded experts from the rest, as DeepSpeed requires.

    An optimizer that is passed to deepspeed.initialize needs these groups. DeepSpeed itself makes them for an optimizer
    that its config names.

    Args:
        params: parameters, or groups of them: dicts with "params" and further options.
    """
    given = list(params)
    groups = [p for p in given if isinstance(p, dict)] or [{"params": given}]
    named = [{"name": f"parameters {i}", **group, "params": list(group["params"])} for i, group in enumerate(groups)]
    result: list[dict[str, Any]] = split_params_into_different_moe_groups_for_optimizer(named)
    return [group for group in result if group["params"]]


def _group_name(mesh: Mesh) -> str:
    return f"ep_size_{mesh.ep_size}"  # the form is parsed by DeepSpeed


def _expert_group(mesh: Mesh) -> dist.ProcessGroup:
    """Return DeepSpeed's expert group of this rank.

    Raises:
        RuntimeError: DeepSpeed's groups differ from those of the mesh.
    """
    exchanging: dist.ProcessGroup
    exchanging, same_experts = (getattr(groups, name)(_group_name(mesh)) for name in GROUP_NAMES)
    for what, group, ranks in (
        ("expert group", exchanging, mesh.ep_ranks),
        ("ranks with the same experts", same_experts, mesh.expert_dp_ranks),
    ):
        found = dist.get_process_group_ranks(group)
        if found != list(ranks):
            raise RuntimeError(f"{what} of rank {mesh.rank}: DeepSpeed has {found}, the mesh {list(ranks)}")
    return exchanging


def total_grad_norm(parameters: Iterable[nn.Parameter], comm: ExpertGroupComm | None) -> Tensor:
    """Compute the norm of all gradients of the whole model at ZeRO-0; a collective over the expert group.

    Args:
        comm: communicator of the expert group; None if experts are not sharded.
    """
    gradients: dict[bool, list[Tensor]] = {False: [], True: []}
    for parameter in parameters:
        if parameter.grad is not None:
            gradients[is_sharded(parameter)].append(parameter.grad)
    dense, experts = (nn.utils.get_total_norm(part) for part in gradients.values())
    if comm is not None:
        experts = all_reduce_sum(experts**2, comm.group).sqrt()
    return torch.hypot(dense, experts)


def balance_over_ranks(model: nn.Module, moe: MoEConfig, mesh: Mesh) -> None:
    """Connect routers that balance to all ranks if their loss shall count the tokens of all ranks."""
    if moe.balance_over is not BalanceOver["global"] or mesh.world == 1:
        return
    world = ExpertGroupComm(None, deepspeed.comm)
    for layer in model.modules():
        if isinstance(layer, MoELayer) and layer.router is not None and layer.router.balances:
            layer.connect(balance_comm=world)


def shard_experts(layer: MoELayer, mesh: Mesh) -> None:
    """Keep this rank's experts and give the layer the interface of DeepSpeed's expert parallelism (AutoEPMoELayer).

    Every expert parameter has four tags that name the ranks that reduce its gradient and shard its optimizer state.

    Raises:
        UserError: the number of experts is no multiple of the number of ranks.
    """
    experts = mesh.local_experts(layer.experts.w1.shape[0])
    group_name = _group_name(mesh)
    layer.keep_experts(experts)
    for parameter in layer.experts.parameters():
        _tag(parameter, group_name)
    contract = {
        "num_experts": len(experts) * mesh.ep_size,
        "ep_size": mesh.ep_size,
        "ep_rank": mesh.ep_rank,
        "ep_group_name": group_name,
        "ep_group": None,
        "hidden_size": layer.experts.w1.shape[2],
        "folding_group_handles": None,
        "combine_impl": "weighted_sum",
        "comm_backend": "comm",
        "expert_placement_descriptor": None,
    }
    for name, value in contract.items():
        setattr(layer, name, value)
    layer.__class__ = _ShardedLayer


def _tag(parameter: nn.Parameter, group_name: str) -> None:
    parameter.allreduce, parameter.group_name = False, group_name  # type: ignore[attr-defined]
    parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
    parameter.ds_zero_partition_group_name = group_name  # type: ignore[attr-defined]
