"""ExpertRows: the token row that each expert row reads and the sum that it enters, as plain index tensors.

Built by engine/routing/plan.py (or by hand in tests) and read by every operation of an expert layer. It holds no values
of x.

Letters: R token rows, L experts here, N expert rows (one per token row and active local expert).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Expert-major list of the (token row, expert) pairs of one layer; a pair occurs once.

    Example with R=3 token rows, L=2 experts; token row 0 uses experts 1 and 0, row 1 expert 1, row 2 expert 0:

        source_N       = [0, 2, 0, 1]      expert 0 reads token rows 0 and 2; expert 1 reads token rows 0 and 1
        offset_L       = [2, 4]            expert 0 owns expert rows 0..1, expert 1 owns 2..3
        slot_N         = [2, 0, 3, 1]      token row 0 sums expert rows 2 and 0, row 1 takes 3, row 2 takes 1
        slot_offset_R  = [0, 2, 3]         start of each token row's slots in slot_N

    Expert rows may be padded to a fixed number. Padding follows the last expert's rows and reads any token row, usually
    0. In slot_N it precedes the first token row's slots, so no sum includes it. The same example, padded to 6:

        source_N       = [0, 2, 0, 1, 0, 0]
        offset_L       = [2, 4]
        slot_N         = [4, 5, 2, 0, 3, 1]
        slot_offset_R  = [2, 4, 5]
    """

    source_N: Tensor  # int64: token row that expert row n reads; ascending within an expert
    offset_L: Tensor  # int32: end of each expert's range of expert rows (cumulative counts)
    slot_N: Tensor  # int64: expert rows in the order in which token rows sum them
    slot_offset_R: Tensor  # int64: start of each token row's range in slot_N

    @property
    def num_experts(self) -> int:
        """Number of local experts L."""
        return self.offset_L.numel()

    @property
    def num_rows(self) -> int:
        """Number of expert rows N, padding included."""
        return self.source_N.numel()

    @property
    def num_inputs(self) -> int:
        """Number of token rows R."""
        return self.slot_offset_R.numel()

    def counts(self) -> list[int]:
        """Return the number of expert rows of each expert, on the host (reads offset_L back)."""
        ends = self.offset_L.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the fields in order."""
        return self.source_N, self.offset_L, self.slot_N, self.slot_offset_R

    def padded(self, num_rows: int) -> "ExpertRows":
        """Return the same rows padded to num_rows expert rows, at least the present number."""
        padding = torch.arange(self.num_rows, num_rows, device=self.source_N.device)
        return ExpertRows(
            torch.cat((self.source_N, torch.zeros_like(padding))),
            self.offset_L,
            torch.cat((padding, self.slot_N)),
            self.slot_offset_R + padding.numel(),
        )

    def expert_N(self) -> Tensor:
        """Return the local expert of each expert row, int64, without padding (reads its length back)."""
        counts_L = torch.diff(self.offset_L, prepend=self.offset_L.new_zeros(1))
        return torch.arange(self.num_experts, device=counts_L.device).repeat_interleave(counts_L)

    def validate(self) -> None:
        """Check every index, on the host.

        Raises:
            ValueError: an index is out of range, or the fields are inconsistent; the message names field and value.
        """
        num_rows, num_inputs = self.num_rows, self.num_inputs
        check_range("rows.source_N", self.source_N, num_inputs)
        check_range("rows.slot_N", self.slot_N, num_rows)
        for name, ends in (("offset_L", self.offset_L), ("slot_offset_R", self.slot_offset_R)):
            if (torch.diff(ends) < 0).any():
                raise ValueError(f"rows.{name}={ends.tolist()}: must not decrease")
            check_range(f"rows.{name}", ends, num_rows + 1)
        last = int(self.offset_L[-1]) if self.num_experts else 0
        padding = int(self.slot_offset_R[0]) if num_inputs else num_rows
        if last + padding != num_rows:
            raise ValueError(
                f"rows.offset_L ends at {last} and rows.slot_offset_R starts at {padding}: must add up to {num_rows}"
            )
        if (self.slot_N.bincount(minlength=num_rows) != 1).any():
            raise ValueError("rows.slot_N lists an expert row twice")
        if (self.slot_N[:padding] < last).any():
            raise ValueError(f"rows.slot_N begins with an expert row below {last}: must begin with the padding")
        pair_N = self.source_N[:last] * max(self.num_experts, 1) + self.expert_N()
        if pair_N.unique().numel() != last:
            raise ValueError("rows.source_N has a token row twice within one expert")
        counts_R = torch.diff(self.slot_offset_R, append=self.slot_offset_R.new_tensor([num_rows]))
        reader_N = torch.arange(num_inputs, device=counts_R.device).repeat_interleave(counts_R)
        if not torch.equal(self.source_N[self.slot_N[padding:]], reader_N):
            raise ValueError("rows.slot_N does not list the expert rows of each token row")


def check_range(name: str, index: Tensor, end: int) -> None:
    """Raise ValueError unless all numbers of an index are from 0 to end - 1; reads them back."""
    bad = index[(index < 0) | (index >= end)]
    if bad.numel():
        raise ValueError(f"{name} holds {int(bad[0])}: must be from 0 to {end - 1}")


def expert_rows(expert_RK: Tensor, num_experts: int) -> tuple[ExpertRows, Tensor]:
    """Sort the choices [R, K] of local experts into expert-major order.

    Args:
        expert_RK: whole numbers from 0 to num_experts - 1, distinct within a token row; a CPU checks the range.

    Returns:
        The expert rows, and choice_N int64: expert row n is entry choice_N[n] of the flattened [R, K] choices.

    Raises:
        ValueError: the choices are not a matrix of whole numbers, or out of range.
    """
    if expert_RK.dim() != 2 or expert_RK.is_floating_point() or expert_RK.dtype == torch.bool:
        raise ValueError(
            f"expert_RK is {expert_RK.dtype} of shape {tuple(expert_RK.shape)}: must be whole numbers [R, K]"
        )
    if expert_RK.device.type == "cpu" and expert_RK.numel():
        low, high = int(expert_RK.min()), int(expert_RK.max())
        if low < 0 or high >= num_experts:
            raise ValueError(f"expert_RK holds {low if low < 0 else high}: must be from 0 to {num_experts - 1}")
    num_inputs, num_choices = expert_RK.shape
    flat_N = expert_RK.reshape(-1)
    choice_N = _stable_order(flat_N, num_experts)
    slot_N = torch.empty_like(choice_N)
    slot_N[choice_N] = torch.arange(choice_N.numel(), device=choice_N.device)
    offset_L = _counts(flat_N, num_experts).cumsum(0).to(torch.int32)
    slot_offset_R = torch.arange(num_inputs, device=choice_N.device) * num_choices
    source_N = choice_N // num_choices
    return ExpertRows(source_N, offset_L, slot_N, slot_offset_R), choice_N


def _counts(key_N: Tensor, num_keys: int) -> Tensor:
    """Count each key below num_keys, with bincount on a CPU, where it is fastest; on a GPU it would block the host."""
    if not key_N.is_cuda:
        return torch.bincount(key_N.long(), minlength=num_keys)
    counts = torch.zeros(num_keys, dtype=torch.int64, device=key_N.device)
    return counts.scatter_add_(0, key_N.long(), torch.ones_like(key_N, dtype=torch.int64))


def _stable_order(key_N: Tensor, num_keys: int) -> Tensor:
    """Argsort keys below num_keys stably; on the CPU by numpy's radix sort of bytes, ten times as fast as torch's."""
    if key_N.is_cuda or num_keys > 256:
        return torch.argsort(key_N, stable=True)
    return torch.from_numpy(np.argsort(key_N.to(torch.uint8).numpy(), kind="stable"))


def expert_rows_from_lists(experts: list[list[int]], num_experts: int) -> ExpertRows:
    """Build expert rows from a list of local experts for each token row; for tests, examples and small tools.

    Example: [[0], [0, 1]] for two experts becomes source_N = [0, 1, 1], offset_L = [2, 3], slot_N = [0, 1, 2],
    slot_offset_R = [0, 1].
    """
    for chosen in experts:
        if any(not 0 <= e < num_experts for e in chosen) or len(set(chosen)) < len(chosen):
            raise ValueError(f"experts={chosen}: must be distinct, from 0 to {num_experts - 1}")
    pairs = sorted((e, r, k) for r, chosen in enumerate(experts) for k, e in enumerate(chosen))
    row_of = {(r, k): n for n, (_, r, k) in enumerate(pairs)}
    slots = [row_of[r, k] for r, chosen in enumerate(experts) for k in range(len(chosen))]
    offset = [sum(e <= last for e, _, _ in pairs) for last in range(num_experts)]
    starts = [sum(map(len, experts[:r])) for r in range(len(experts))]
    return ExpertRows(
        torch.tensor([r for _, r, _ in pairs], dtype=torch.int64),
        torch.tensor(offset, dtype=torch.int32),
        torch.tensor(slots, dtype=torch.int64),
        torch.tensor(starts, dtype=torch.int64),
    )
