"""The names in DeepSpeed on which foreroute relies, most of them undocumented.

Every DeepSpeed version that has these names is accepted. Importing this module checks the names in DeepSpeed's modules;
engine/optim/deepspeed_engine.py checks the attributes of objects with `require_names`. Tests check their behaviour with
the versions in docs/versions.md.
"""

from typing import Any

from foreroute.engine.errors import UserError, require

TESTED = "0.19.8"

try:
    import deepspeed
    import deepspeed.ops
    import deepspeed.runtime.utils
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2
    from deepspeed.runtime.zero import utils as zero_utils
    from deepspeed.utils import (
        groups,
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )
except ImportError as error:
    from importlib.metadata import version

    raise UserError(
        f"DeepSpeed {version('deepspeed')} is installed, but lacks a name that foreroute needs: {error} (tested:"
        f" {TESTED})"
    ) from error

__all__ = [
    "AutoEPMoELayer",
    "TorchBackend",
    "bf16_optimizer",
    "groups",
    "safe_get_full_fp32_param",
    "safe_get_full_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_optimizer_state",
    "split_params_into_different_moe_groups_for_optimizer",
    "stage_1_and_2",
    "zero_utils",
]

COMPATIBLE_OPS = "__compatible_ops__"
"""Of deepspeed.ops: name of a C++ op -> whether it may be built."""
SHARED_MEMORY_OP = "deepspeed_shm_comm"
GROUP_NAMES = ("_get_expert_parallel_group", "_get_expert_data_parallel_group")
"""Of deepspeed.utils.groups: the expert-parallel group of this rank, and the ranks that hold the same experts."""
NORMS_NAME = "combine_grad_norm_groups"
"""Of deepspeed.runtime.utils since 0.19.8: versions without it step on gradients that are not finite. Of ZERO_STEPS as
well: combines the norms of the parameter groups into the global norm, by which the step clips."""
ZERO_STEPS = (stage_1_and_2, stage3)
BF16_NORM_NAME = "get_global_norm_of_tensors"
"""Of bf16_optimizer: the norm of all gradients but those of experts, which are added to it."""
NEW_GROUP_NAME = "new_group"
"""Of TorchBackend: creates every group from its ranks."""
LINK_NAMES = ("_lazy_init_hp_params_optimizer_state", "_hp_optimizer_states_linked")
"""Of the optimizers of ZeRO-1 and 2: link each parameter to its slice of the flat Adam state."""
FLATS_NAME = "fp32_partitioned_groups_flat"
"""Of the optimizer of ZeRO-3: the flat fp32 tensors that Adam updates."""
PARAMETERS_NAMES = ("bit16_groups", "bf16_groups")
"""Of the optimizers of ZeRO-1 and 2, one of them: the parameters of each flat tensor."""
SUB_GROUPS_NAMES = ("fp16_groups", "sub_group_to_group_id")
"""Of the optimizer of ZeRO-3: the parameters of each flat tensor, and the number of its group in Adam."""
REGATHER_NAMES = ("checkpoint_event_prologue", "checkpoint_event_epilogue")
"""Of the optimizer of ZeRO-3: release all gathered weights; gather the persistent ones again."""
SHARD_NAMES = ("ds_shape", "ds_tensor", "ds_zero_partition_rank", "ds_zero_partition_world_size")
"""Of a parameter at ZeRO-3: its whole shape, this rank's padded shard of the compute copy, the number of that shard,
and the number of shards."""

NORM_CHECK_NAME = "is_invalid_grad_norm"
"""Of NORM_CHECKERS: called with the global gradient norm of every step; True makes the optimizer skip the update. It
reads the norm back to the host."""
NORM_CHECKERS = (stage_1_and_2, stage3, bf16_optimizer)
NORM_MASK_NAME = "mask_nan_or_inf_with_val_inplace"
"""Of stage_1_and_2: sets a norm that is not finite to -1, with a copy from the host."""
OVERFLOW_NAME = "check_overflow"
"""Of the optimizers of ZeRO-1 and 2: checks, with bf16, whether a gradient is not finite; the norm shows the same."""
COMM_NAME = "dist"
"""Of zero_utils: DeepSpeed's communication, by whose get_rank its checks know whether they run on rank 0."""


def require_names(owner: Any, *names: str) -> None:
    """Raise UserError unless a module or an object of DeepSpeed has attributes of all these names."""
    for name in names:
        where = getattr(owner, "__name__", type(owner).__qualname__)
        require(
            hasattr(owner, name),
            f"DeepSpeed {deepspeed.__version__} is installed, but lacks a name that foreroute needs: {where} has no"
            f" {name} (tested: {TESTED})",
        )


require_names(deepspeed.ops, COMPATIBLE_OPS)
require_names(TorchBackend, NEW_GROUP_NAME)
require_names(groups, *GROUP_NAMES)
require_names(deepspeed.runtime.utils, NORMS_NAME)
for _module in NORM_CHECKERS:
    require_names(_module, NORM_CHECK_NAME)
for _module in ZERO_STEPS:
    require_names(_module, NORMS_NAME)
require_names(bf16_optimizer, BF16_NORM_NAME)
require_names(stage_1_and_2, NORM_MASK_NAME)
require_names(zero_utils, COMM_NAME)
