"""Stateless dropout for expert hidden units: the mask is a function of (seed, token, expert, unit) alone.

Nothing is drawn from a generator and nothing is saved. Backward and activation checkpointing compute the same mask
again, and a token's mask does not depend on the rank of its expert. A unit is kept if the 32-bit product
row_hash * unit_hash (both odd, both from a full avalanche hash) reaches a threshold: one multiplication and one
comparison per unit.

Letters: N expert rows, F expert hidden width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foreroute.kernels.launching import to_device

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Dropout:
    """The inputs of a mask besides expert and unit."""

    rate: float  # probability of zeroing a unit, in [0, 1)
    seed: int | Tensor
    """Depends on (run, step, micro-batch, layer). Or its words (seed_words), int32 [2] on the device of token_R: then
    nothing is copied to the device, and a CUDA graph reads new words at each replay."""
    token_R: Tensor  # int64: global token number of each token row
    first_expert: int = 0  # global number of local expert 0

    @property
    def threshold(self) -> int:
        """The least product of hashes, as int32, at which a unit is kept."""
        return min(round(self.rate * 2**32), 2**32 - 1) - 2**31

    def words(self) -> Tensor:
        """Return the words of the seed, int32 [2], on the device of token_R, without blocking the host."""
        if isinstance(self.seed, Tensor):
            return self.seed
        return to_device(torch.tensor(seed_words(self.seed), dtype=torch.int32), self.token_R.device)

    @property
    def scale(self) -> float:
        """The factor that preserves the expectation: 1 / (1 - rate)."""
        return 1.0 / (1.0 - self.rate)


def seed_words(seed: int) -> tuple[int, int]:
    """Return the low and high word, as int32, of the mixed seed; neighbouring seeds have unrelated words."""
    mixed = _mix64(seed)
    low, high = (word - 2**32 * (word >> 31) for word in (mixed & _MASK32, mixed >> 32))
    return low, high


def hash32(value: Tensor) -> Tensor:
    """Avalanche 32-bit values held in int64 (the finaliser of MurmurHash3)."""
    value = value & _MASK32
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK32
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK32
    return value ^ (value >> 16)


def row_hash(dropout: Dropout, token_N: Tensor, expert: int | Tensor) -> Tensor:
    """Hash (seed, token, global number of the local expert) to odd int32, one for each expert row."""
    # Seeds are often consecutive, and so are tokens. The seed is mixed first, so that the two are not interchangeable.
    words = dropout.seed.unbind() if isinstance(dropout.seed, Tensor) else seed_words(dropout.seed)
    low, high = words
    mixed_N = hash32(token_N ^ low)
    mixed_N = hash32(mixed_N ^ (token_N >> 32) ^ high)
    return (hash32(mixed_N + (dropout.first_expert + expert) * 0x9E3779B1) | 1).to(torch.int32)


def _mix64(value: int) -> int:
    """Avalanche a 64-bit number (the finaliser of SplitMix64)."""
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def unit_hash(width: int, device: torch.device | None = None) -> Tensor:
    """Hash the unit numbers 0..F-1 to odd int32."""
    return (hash32(torch.arange(1, width + 1, device=device) * 0x9E3779B1) | 1).to(torch.int32)


def keep_mask(row_hash_N: Tensor, unit_hash_F: Tensor, threshold: int) -> Tensor:
    """Return the mask [N, F], bool, True where a unit is kept (probability 1 - rate)."""
    return (row_hash_N[:, None] * unit_hash_F) >= threshold
