"""The stateless masks: uniform, uncorrelated, and a function of token, expert, unit and seed only."""

import pytest
import torch

from foreroute.kernels import Dropout, keep_mask
from foreroute.kernels.dropout import hash32, row_hash, seed_words, unit_hash


def mask(tokens, units, rate, *, seed=42, expert=3, first_expert=0):
    dropout = Dropout(rate, seed, torch.arange(tokens), first_expert)
    return keep_mask(row_hash(dropout, dropout.token_R, expert), unit_hash(units), dropout.threshold)


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
    rows = [set(row_hash(Dropout(0.1, seed, tokens), tokens, 0).tolist()) for seed in range(6000, 6008)]
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
        words = seed_words(seed)
        assert all(-(2**31) <= word < 2**31 for word in words)
        assert words == seed_words(seed + 2**64)


def murmur(value):
    """MurmurHash3's finaliser in Python integers."""
    value &= 2**32 - 1
    value = (value ^ value >> 16) * 0x85EBCA6B % 2**32
    value = (value ^ value >> 13) * 0xC2B2AE35 % 2**32
    return value ^ value >> 16


def int32(value):
    return (value + 2**31) % 2**32 - 2**31


def test_published_values_of_murmur_3():
    values = [0, 1, 2, 0xDEADBEEF, 2**32 - 1]
    want = [0, 0x514E28B7, 0x30F4C306, 0x0DE5C6A9, 0x81F16F39]
    assert hash32(torch.tensor(values)).tolist() == want == [murmur(value) for value in values]
    assert hash32(torch.tensor([1 + 2**32, 1 - 2**40])).tolist() == [want[1]] * 2  # 32 bits count


@pytest.mark.parametrize(
    ("seed", "first_output"),
    [(1234567, 6457827717110365317), (0, 0xE220A8397B1DCDAF), (2**64 + 1234567, 6457827717110365317)],
)
def test_seed_words_are_the_published_first_output_of_splitmix64(seed, first_output):
    words = seed_words(seed)
    assert words == (int32(first_output % 2**32), int32(first_output >> 32))


def test_row_and_unit_hashes_in_python_integers():
    golden, seed = 0x9E3779B1, 1234567
    low, high = 6457827717110365317 % 2**32, 6457827717110365317 >> 32
    tokens = [0, 1, 77, 2**31, 2**32 + 5, 2**40 + 3]
    for first_expert, expert in ((0, 0), (0, 3), (4, 1)):
        want = []
        for token in tokens:
            mixed = murmur(murmur(token ^ low) ^ (token >> 32) ^ high)
            want.append(int32(murmur(mixed + (first_expert + expert) * golden) | 1))
        dropout = Dropout(0.1, seed, torch.tensor(tokens), first_expert)
        assert row_hash(dropout, dropout.token_R, expert).tolist() == want
    assert unit_hash(40).tolist() == [int32(murmur(unit * golden) | 1) for unit in range(1, 41)]


def test_a_seed_may_be_given_as_its_words():
    tokens = torch.tensor([5, 9, 2**40])
    by_number = Dropout(0.5, -(2**62) + 11, tokens)
    by_words = Dropout(0.5, torch.tensor(seed_words(-(2**62) + 11), dtype=torch.int32), tokens)
    assert torch.equal(row_hash(by_number, tokens, 3), row_hash(by_words, tokens, 3))
    assert torch.equal(by_number.words(), by_words.words())


def test_threshold_and_scale():
    dropouts = [Dropout(rate, 0, torch.arange(1)) for rate in (0.0, 0.25, 0.5, 1 - 2**-40)]
    assert [d.threshold for d in dropouts] == [-(2**31), -(2**30), 0, 2**31 - 1]
    assert [d.scale for d in dropouts[:3]] == [1.0, 4 / 3, 2.0]
    # the product of the hashes wraps to int32, and one that is at the threshold is kept
    rows, units = torch.tensor([3, 2**30 + 1], dtype=torch.int32), torch.tensor([5, 7]).int()
    assert keep_mask(rows, units, 15).tolist() == [[True, True], [True, False]]
    assert (2**30 + 1) * 5 - 2**32 >= 15 and int32((2**30 + 1) * 7) < 15
