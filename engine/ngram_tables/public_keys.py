"""Rows of n-gram tables as two published models find them: multiply, XOR, remainder of a prime.

An n-gram of the ids t_0 (the newest), t_1, ... is mixed into XOR_k m_k t_k by odd multipliers m_k; head h of its order
reads row `mix mod p_h` of its own range of p_h rows, a prime that no other head has. So n-grams that share a row of one
head hardly share one of another. `engram_keys` and `qwen_keys` choose multipliers and primes as these two do:

* Engram (DeepSeek 2026, arXiv 2601.07372, and its engram_demo_v1.py; DeepSeek-V4.1-Flash has such tables): orders
  from 2 on, 8 heads each; multipliers from numpy's PCG64; ids first mapped by a normalising map of the vocabulary
  (engine/data/tokens/normalised.py); n-grams go across documents.
* Qwen3.8-Flash-Next (model type qwen4_exp of transformers): the same with multipliers from splitmix64; n-grams stop at
  the id that ends a document.

Letters: B streams, Q segment length, C ids left of a segment, X = C + Q, H heads of all orders, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.errors import require
from foreroute.engine.routing.hashing import GAMMA, hash64

_LAYER_STEP = 10007  # between the seeds of layers, in both
_LARGEST = 2**63 - 1
_WITNESSES = 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37  # decide below 3.3e24 (Sorenson and Webster 2015)


@dataclass(frozen=True)
class MultiplyXorKeys:
    """The map from n-grams to the rows of one table; the heads' ranges of rows follow each other."""

    orders: tuple[int, ...]  # ids in the n-grams, ascending
    primes: tuple[tuple[int, ...], ...]  # of each order: the rows of each of its heads
    multipliers: tuple[int, ...]  # of an n-gram's ids, the newest first
    missing: int = 0  # in place of an id of another document, after new_ids
    document_end: int | None = None  # id after which n-grams begin anew, before new_ids
    new_ids: Tensor | None = None  # int64 [V]: what each id is mixed as; None: as itself
    whole: bool = False

    @property
    def context(self) -> int:
        """Ids that the first n-gram of a segment needs left of it."""
        return self.orders[-1] - 1

    @property
    def heads(self) -> int:
        """Heads H of all orders."""
        return sum(map(len, self.primes))

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return sum(map(sum, self.primes))

    def rows_of(self, ids_BQ: Tensor, left_BC: Tensor, new_document_BX: Tensor | None = None) -> Tensor:
        """Return the row of each id and head, int64 [B, Q, H], orders one after the other.

        Args:
            left_BC: the true ids left of each segment, of which the last `context` matter. At the start of a text the
                published models have `missing` there.
            new_document_BX: bool, true where a document begins; n-grams stop there. None: at document_end alone.

        Raises:
            ValueError: too few ids left.

        Example: bigrams with multipliers 3 and 5 and one head of 7 rows: ids [[2, 4]] after [[1]] are mixed to
        6 XOR 5 = 3 and 12 XOR 10 = 6, and find the rows [[[3], [6]]].
        """
        spare = left_BC.shape[1] - self.context
        if spare < 0:
            raise ValueError(f"left_BC has {left_BC.shape[1]} ids: n-grams of {self.orders[-1]} need {self.context}")
        id_BX = torch.cat([left_BC[:, spare:], ids_BQ], dim=1).numpy()
        begins_BX = (
            np.zeros(id_BX.shape, bool) if new_document_BX is None else new_document_BX[:, spare:].numpy().copy()
        )
        if self.document_end is not None:
            begins_BX[:, 1:] |= id_BX[:, :-1] == self.document_end
        if self.new_ids is not None:
            id_BX = self.new_ids.numpy()[id_BX]
        mixed = dict(zip(range(1, self.orders[-1] + 1), self._mixed(id_BX, begins_BX), strict=True))
        offsets = iter(accumulate(chain.from_iterable(self.primes), initial=0))
        found = [
            mixed[order] % prime + next(offsets)
            for order, primes in zip(self.orders, self.primes, strict=True)
            for prime in primes
        ]
        return torch.from_numpy(np.stack(found, axis=-1))

    def _mixed(self, id_BX: NDArray[np.int64], begins_BX: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
        """Yield the mixes [B, Q] of n-grams of 1, 2, ... ids."""
        size = id_BX.shape[1] - self.context
        mix_BQ = np.zeros((id_BX.shape[0], size), np.int64)
        hidden_BQ = np.zeros(mix_BQ.shape, bool)  # from here on the ids are of another document
        for back, multiplier in enumerate(self.multipliers):
            first = self.context - back
            part_BQ = id_BX[:, first : first + size]
            if back > 0:
                hidden_BQ |= begins_BX[:, first + 1 : first + 1 + size]
                part_BQ = np.where(hidden_BQ, self.missing, part_BQ)
            mix_BQ = mix_BQ ^ (part_BQ * multiplier)
            yield mix_BQ


def engram_keys(
    vocab_size: int,
    layers: Sequence[int],
    layer: int,
    *,
    orders: Sequence[int] = (2, 3),
    rows: Sequence[int],
    heads: int = 8,
    seed: int = 0,
    missing: int = 0,
    new_ids: Tensor | None = None,
) -> MultiplyXorKeys:
    """Return the keys of one layer's table of an Engram model.

    Multipliers are 2 r + 1 with r drawn from PCG64(seed + 10007 layer) below half of (2^63 - 1) // vocab_size. A head's
    prime is the smallest that is at least its order's `rows`, above the one of the head before, and no head of an
    earlier layer's.

    Args:
        vocab_size: ids after new_ids.
        layers: numbers of all layers with a table, in order; `layer` is one of them.
        rows: of a head, for each order, at least.
        missing: the id of padding, after new_ids.

    Raises:
        UserError: orders do not ascend, or not one number of rows for each.
    """
    _check(orders, rows, vocab_size)
    draws = np.random.Generator(np.random.PCG64(seed + _LAYER_STEP * layer))
    drawn = draws.integers(0, _half_bound(vocab_size), size=orders[-1], dtype=np.int64)
    taken: set[int] = set()
    primes: tuple[tuple[int, ...], ...] = ()
    for _ in layers[: layers.index(layer) + 1]:
        primes = tuple(_take_primes(least, heads, taken) for least in rows)
    multipliers = tuple(2 * int(number) + 1 for number in drawn)
    return MultiplyXorKeys(tuple(orders), primes, multipliers, missing, new_ids=new_ids)


def qwen_keys(
    vocab_size: int,
    number: int,
    *,
    orders: Sequence[int] = (2, 3),
    rows: int = 20_000_000,
    heads: int = 8,
    seed: int = 1234,
    document_end: int | None = None,
    missing: int | None = None,
) -> MultiplyXorKeys:
    """Return the keys of one layer's table of a qwen4_exp model.

    Multiplier i is 2 (splitmix64(seed + 10007 number + (i + 1) gamma) mod half of (2^63 - 1) // vocab_size) + 1, where
    gamma is splitmix64's increment. The heads of all tables take the primes from `rows` on, one after the other.

    Args:
        number: of the layer among those with a table, from 0.
        rows: of a head, at least.
        document_end: id after which n-grams begin anew; None: they stop at known document starts alone.
        missing: in place of an id of another document; None: document_end, as published, or 0 if that is None.

    Raises:
        UserError: orders do not ascend.
    """
    _check(orders, [rows] * len(orders), vocab_size)
    places = np.arange(1, orders[-1] + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # wrapping is meant
        drawn = hash64(np.uint64(seed + _LAYER_STEP * number) + GAMMA * places) % np.uint64(_half_bound(vocab_size))
    taken: set[int] = set()
    for _ in range(number + 1):
        primes = tuple(_take_primes(rows, heads, taken) for _ in orders)
    if missing is None:
        missing = document_end or 0
    return MultiplyXorKeys(tuple(orders), primes, tuple(2 * int(x) + 1 for x in drawn), missing, document_end)


def _check(orders: Sequence[int], rows: Sequence[int], vocab_size: int) -> None:
    ascend = all(first < second for first, second in zip([0, *orders], orders, strict=False))
    require(bool(orders) and ascend, f"orders={list(orders)}: must be ascending numbers of ids, at least 1")
    require(len(rows) == len(orders), f"rows={list(rows)}: must be one number for each of {len(orders)} orders")
    require(1 <= vocab_size <= 1 << 31, f"a vocabulary of {vocab_size} ids: must have 1 to 2**31")


def _half_bound(vocab_size: int) -> int:
    """Half of the largest multiplier with which no id's product passes 2**63."""
    return max(1, _LARGEST // vocab_size // 2)


def _take_primes(least: int, count: int, taken: set[int]) -> tuple[int, ...]:
    """Take the first `count` primes from `least` on that are not taken yet."""
    found: list[int] = []
    while len(found) < count:
        if least not in taken and is_prime(least):
            found.append(least)
        least += 1
    taken.update(found)
    return tuple(found)


def is_prime(number: int) -> bool:
    """Return whether a number below 3.3e24 is a prime (Miller and Rabin's test with witnesses that decide)."""
    if number < 2 or any(number % p == 0 for p in _WITNESSES):
        return number in _WITNESSES
    odd = number - 1
    twos = (odd & -odd).bit_length() - 1
    odd >>= twos

    def passes(witness: int) -> bool:
        power = pow(witness, odd, number)
        for _ in range(twos):
            if power in (1, number - 1):
                return True
            power = power * power % number
            if power == 1:
                return False
        return False

    return all(map(passes, _WITNESSES))
