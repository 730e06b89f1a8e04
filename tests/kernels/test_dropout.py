"""The stateless masks: uniform, uncorrelated, and a function of token, expert, unit and seed only."""

import pytest
import torch

from kernels import Dropout, keep_mask
from kernels.dropout import row_hash, unit_hash


def mask(tokens, units, rate, *, seed=42, expert=3, first_expert=0):
    dropout = Dropout(rate, seed, torch.arange(tokens), first_expert)
    return keep_mask(
        row_hash(dropout, dropout.token_R, expert), unit_hash(units), dropout.threshold
    )


def test_keep_mask_is_uniform_and_uncorrelated():
    tokens, units, rate = 2000, 512, 0.1
    sigma = (rate * (1 - rate)) ** 0.5
    keep = mask(tokens, units, rate).double()
    assert abs(keep.mean() - (1 - rate)) < 5 * sigma / (tokens * units) ** 0.5
    # each row and each column is a sample of its own: the spread of the means must be binomial
    assert keep.mean(1).std() / (sigma / units**0.5) == pytest.approx(1, abs=0.1)
    assert keep.mean(0).std() / (sigma / tokens**0.5) == pytest.approx(1, abs=0.2)
    centred = (keep - keep.mean()) / sigma
    next_step = mask(tokens, units, rate, seed=43).double()
    next_expert = mask(tokens, units, rate, expert=4).double()
    for other in (
        centred.roll(1, 0),  # next token
        centred.roll(1, 1),  # next unit
        (next_step - next_step.mean()) / sigma,
        (next_expert - next_expert.mean()) / sigma,
    ):
        assert abs((centred * other).mean()) < 5 / (tokens * units) ** 0.5


def test_neighbouring_seeds_share_no_row():
    """The layers of a step have neighbouring seeds; no token of one may have the mask of another token of the other."""
    tokens = torch.arange(4096)
    rows = [
        set(row_hash(Dropout(0.1, seed, tokens), tokens, 0).tolist()) for seed in range(6000, 6008)
    ]
    shared = sum(len(a & b) for i, a in enumerate(rows) for b in rows[:i])
    assert shared <= 4  # 28 pairs x 4096^2 / 2^31: 0.2 expected by chance


def test_keep_mask_depends_on_token_not_on_row_number():
    tokens = torch.tensor([5, 9, 5])
    keep = keep_mask(row_hash(Dropout(0.5, 1, tokens), tokens, 0), unit_hash(64), 0)
    assert torch.equal(keep[0], keep[2]) and not torch.equal(keep[0], keep[1])


def test_an_expert_keeps_its_masks_wherever_it_lives():
    assert torch.equal(mask(50, 64, 0.5, expert=5), mask(50, 64, 0.5, expert=1, first_expert=4))


def test_seed_words_are_int32_and_periodic_in_64_bits():
    for seed in (0, 1, 2**31, 2**63 + 5, -7, 12345678901234567890123):
        words = Dropout(0.1, seed, torch.arange(1)).seed_words
        assert all(-(2**31) <= word < 2**31 for word in words)
        assert words == Dropout(0.1, seed + 2**64, torch.arange(1)).seed_words
