"""Expert rows: which input row each expert-row reads and where its result is added, as plain index tensors.

Built by engine/moe/plan.py (or by hand in tests), read by every backend of kernels.moe_ffn. No values of x in here.

Letters: R input rows, L experts here, N expert rows (one per input row and active local expert).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Expert-major list of the (input row, expert) pairs of one layer.

    Example with R=3 input rows, L=2 experts; row 0 uses experts 1 and 0, row 1 expert 1, row 2 expert 0:

        source_N       = [0, 2, 0, 1]      expert 0 reads rows 0 and 2; expert 1 reads rows 0 and 1
        offset_L       = [2, 4]            expert 0 owns expert-rows 0..1, expert 1 owns 2..3
        slot_N         = [2, 0, 3, 1]      row 0 adds up expert-rows 2 and 0, row 1 adds 3, row 2 adds 1
        slot_offset_R  = [0, 2, 3]         where each row's slots start in slot_N
    """

    source_N: Tensor  # int64: input row that expert-row n reads; ascending within an expert
    offset_L: Tensor  # int32: end of each expert's range of expert-rows (cumulative counts)
    slot_N: Tensor  # int64: expert-rows in the order in which input rows add them up
    slot_offset_R: Tensor  # int64: start of each input row's part of slot_N

    @property
    def num_experts(self) -> int:
        """Number of local experts L."""
        return self.offset_L.numel()

    @property
    def num_rows(self) -> int:
        """Number of expert rows N."""
        return self.source_N.numel()

    @property
    def num_inputs(self) -> int:
        """Number of input rows R."""
        return self.slot_offset_R.numel()

    def counts(self) -> list[int]:
        """Expert rows of each expert, on the host (reads offset_L back)."""
        ends = self.offset_L.tolist()
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def expert_rows(expert_RK: Tensor, num_experts: int) -> tuple[ExpertRows, Tensor]:
    """Sort the choices [R, K] of local experts into expert-major order.

    Returns:
        The rows, and choice_N int64: expert-row n is entry choice_N[n] of the flattened [R, K] choices.
    """
    num_inputs, num_choices = expert_RK.shape
    flat_N = expert_RK.reshape(-1)
    choice_N = _stable_order(flat_N, num_experts)
    slot_N = torch.empty_like(choice_N)
    slot_N[choice_N] = torch.arange(choice_N.numel(), device=choice_N.device)
    offset_L = torch.bincount(flat_N.long(), minlength=num_experts).cumsum(0).to(torch.int32)
    slot_offset_R = torch.arange(num_inputs, device=choice_N.device) * num_choices
    source_N = choice_N // num_choices
    return ExpertRows(source_N, offset_L, slot_N, slot_offset_R), choice_N


def _stable_order(key_N: Tensor, num_keys: int) -> Tensor:
    """Stable argsort of keys below num_keys; on the CPU numpy's radix sort of bytes, ten times as fast as torch's."""
    if key_N.is_cuda or num_keys > 256:
        return torch.argsort(key_N, stable=True)
    return torch.from_numpy(np.argsort(key_N.to(torch.uint8).numpy(), kind="stable"))
