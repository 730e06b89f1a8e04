"""What foreroute relies on in DeepSpeed, most of it undocumented: a version that has these names is taken, whatever its
number.

They are looked for when this module is imported; what DeepSpeed puts on objects, by `require_names` in
engine/optim/deepspeed_engine.py. That they do what they should is tested with the versions in docs/versions.md.
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
        f"DeepSpeed {version('deepspeed')} is installed, without what foreroute needs of it: {error} (tested: {TESTED})"
    ) from error

__all__ = [
    "AutoEPMoELayer",
    "TorchBackend",
    "groups",
    "safe_get_full_fp32_param",
    "safe_get_full_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_optimizer_state",
    "split_params_into_different_moe_groups_for_optimizer",
    "stage_1_and_2",
]

COMPATIBLE_OPS = "__compatible_ops__"
"""Of deepspeed.ops: name of a C++ op -> may it be built."""
SHARED_MEMORY_OP = "deepspeed_shm_comm"
GROUP_NAMES = ("_get_expert_parallel_group", "_get_expert_data_parallel_group")
"""Of deepspeed.utils.groups: the ranks that exchange rows with this one, and those that hold the same experts."""
NORMS_NAME = "combine_grad_norm_groups"
"""Of deepspeed.runtime.utils since 0.19.8: versions without it make a step of gradients that are not finite."""
NEW_GROUP_NAME = "new_group"
"""Of TorchBackend: takes ranks, makes every group of them."""
LINK_NAMES = ("_lazy_init_hp_params_optimizer_state", "_hp_optimizer_states_linked")
"""Of the optimizers of ZeRO-1 and 2: link each parameter to its slice of the flat Adam state."""
FLATS_NAME = "fp32_partitioned_groups_flat"
"""Of the optimizer of ZeRO-3: the flat fp32 tensors that Adam steps."""
REGATHER_NAMES = ("checkpoint_event_prologue", "checkpoint_event_epilogue")
"""Of the optimizer of ZeRO-3: give up all gathered weights; gather those that are kept whole again."""
SHARD_NAMES = ("ds_shape", "ds_tensor", "ds_zero_partition_rank", "ds_zero_partition_world_size")
"""Of a parameter at ZeRO-3: its whole shape, this rank's padded part of the compute copy, which part that is, of how
many."""

NORM_CHECK_NAME = "is_invalid_grad_norm"
"""Of NORM_CHECKERS: asked with the global gradient norm of every step; True makes the optimizer drop the update. It
reads the norm back to the host."""
NORM_CHECKERS = (stage_1_and_2, stage3, bf16_optimizer)
NORM_MASK_NAME = "mask_nan_or_inf_with_val_inplace"
"""Of stage_1_and_2: sets a norm that is not finite to -1, by way of a copy from the host."""
OVERFLOW_NAME = "check_overflow"
"""Of the optimizers of ZeRO-1 and 2: asks, with bf16, whether any gradient is not finite. The norm says the same."""


def require_names(owner: Any, *names: str) -> None:
    """Raise UserError unless what DeepSpeed made, or a module of it, has attributes of all these names."""
    for name in names:
        where = getattr(owner, "__name__", type(owner).__qualname__)
        require(
            hasattr(owner, name),
            f"DeepSpeed {deepspeed.__version__} is installed, without what foreroute needs of it: {where} has no {name}"
            f" (tested: {TESTED})",
        )


require_names(deepspeed.ops, COMPATIBLE_OPS)
require_names(TorchBackend, NEW_GROUP_NAME)
require_names(groups, *GROUP_NAMES)
require_names(deepspeed.runtime.utils, NORMS_NAME)
for _module in NORM_CHECKERS:
    require_names(_module, NORM_CHECK_NAME)
require_names(stage_1_and_2, NORM_MASK_NAME)
