"""Experts shared out over the ranks of an expert group, as DeepSpeed's groups have them."""

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from torch import distributed as dist
from torch import nn

from foreroute.engine.config import MoEConfig, Router
from foreroute.engine.config.enums import BalanceOver
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.optim.adam import comes_last
from foreroute.engine.optim.deepspeed_contract import (
    GROUP_NAMES,
    AutoEPMoELayer,
    groups,
    split_params_into_different_moe_groups_for_optimizer,
)
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.mesh import Mesh


def is_sharded(param: nn.Parameter) -> bool:
    """Whether other ranks of the expert group hold other experts of this parameter."""
    return not getattr(param, "allreduce", True)


class _ShardedLayer(MoELayer, AutoEPMoELayer):  # type: ignore[misc]
    """A layer whose experts are shared out, as DeepSpeed knows one: its class decides how it is treated."""

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: no process group, which DeepSpeed has put here."""
        return {**self.__dict__, "ep_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy; copy.deepcopy leaves out the tags of parameters."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for parameter in self.experts.parameters():
            _tag(parameter, state["ep_group_name"])


# These two, and shard_experts, are also for models that others hand to DeepSpeed (engine/plug_in/replace.py).
def expert_group_comm(mesh: Mesh, device: torch.device, *, timed: bool = True) -> ExpertGroupComm:
    """Give what the ranks of this rank's expert group exchange rows through; deepspeed.initialize forms the group.

    Args:
        timed: as of ExpertGroupComm.

    Raises:
        RuntimeError: it has not yet, or in another way than the mesh.
    """
    try:
        return ExpertGroupComm(_expert_group(mesh), deepspeed.comm, device, timed=timed)
    except (AssertionError, KeyError) as error:  # as DeepSpeed says that there is no such group
        raise RuntimeError(
            f"experts are shared out over {mesh.ep_size} ranks that have no group yet: "
            "give the model to deepspeed.initialize before you run it"
        ) from error


def aligned_first(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Give parameters in the order in which they are to lie in ZeRO's flat buffers (engine/optim/adam.py,
    comes_last)."""
    return sorted(parameters, key=lambda p: comes_last(p.numel()))


def parameter_groups(params: Iterable[nn.Parameter | dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn what a torch.optim optimizer takes into groups in which DeepSpeed can tell shared-out experts from the rest.

    Needed for an optimizer that is passed to deepspeed.initialize; of one that is named in its config DeepSpeed sees to
    it.

    Args:
        params: parameters, or groups of them as dicts with further options, each a group "params".
    """
    given = list(params)
    groups = [p for p in given if isinstance(p, dict)] or [{"params": given}]
    named = [{"name": f"parameters {i}", **group, "params": list(group["params"])} for i, group in enumerate(groups)]
    result: list[dict[str, Any]] = split_params_into_different_moe_groups_for_optimizer(named)
    return [group for group in result if group["params"]]


def _group_name(mesh: Mesh) -> str:
    return f"ep_size_{mesh.ep_size}"  # the form is parsed by DeepSpeed


def _expert_group(mesh: Mesh) -> dist.ProcessGroup:
    """Give DeepSpeed's expert group of this rank.

    Raises:
        RuntimeError: DeepSpeed groups the ranks in another way than the mesh.
    """
    exchanging: dist.ProcessGroup
    exchanging, same_experts = (getattr(groups, name)(_group_name(mesh)) for name in GROUP_NAMES)
    for what, group, ranks in (
        ("expert group", exchanging, mesh.ep_ranks),
        ("ranks with the same experts", same_experts, mesh.expert_dp_ranks),
    ):
        found = dist.get_process_group_ranks(group)
        if found != list(ranks):
            raise RuntimeError(f"{what} of rank {mesh.rank}: DeepSpeed says {found}, the mesh {list(ranks)}")
    return exchanging


def balance_over_ranks(model: nn.Module, moe: MoEConfig, mesh: Mesh) -> None:
    """Let learned routers count the tokens of all ranks for their balance loss, if they shall."""
    everywhere = moe.balance_over is BalanceOver["global"] and mesh.world > 1
    if moe.router is not Router.learned or not everywhere:
        return
    world = ExpertGroupComm(None, deepspeed.comm)
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.connect(balance_comm=world)


def shard_experts(layer: MoELayer, mesh: Mesh) -> None:
    """Keep this rank's experts and present the layer as DeepSpeed's expert parallelism asks (AutoEPMoELayer).

    Every parameter of an expert carries four tags: which ranks add up its gradient and share its optimizer state.

    Raises:
        UserError: the experts cannot be shared out evenly.
    """
    experts = mesh.local_experts(layer.experts.w1.shape[0])
    group_name = _group_name(mesh)
    layer.keep_experts(experts)
    for parameter in layer.experts.parameters():
        _tag(parameter, group_name)
    contract = {
        "num_experts": len(experts) * mesh.ep_size,
        "num_local_experts": len(experts),
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
