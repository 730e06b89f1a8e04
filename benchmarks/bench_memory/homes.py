"""Moving homes of rows, counted: how many vectors would remain if a row could live with the rank that reads it.

With planned rows a row lies where its hash says (its hash home), each other rank that reads it in a step gets its
vector and sends a gradient back. A moving row may change its home in a step in which it is read: the readers have its
vector anyway, gradients go to the new home, and the optimizer's moments follow the row. A row that was not read for
more than W steps is back at its hash home, so that a host remembers the homes of W steps only.

Letters: P ranks, N readings (a row in a step), W steps that a home is remembered.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench_memory.problem import SEGMENT, STREAMS, Table, Text, read_text
from benchmarks.harness import print_table
from foreroute.engine.routing.loops import compiled
from foreroute.engine.routing.plans.row_plan import ID_BYTES

TEXTS = ("bytes", 3), ("bpe8k", 2), ("bpe8k", 3), ("words", 2)  # and ids in an n-gram
STEPS = 100  # at most
VALUES, ADAM = 1, 3  # vectors of a row: values alone; with both moments


class Readings(NamedTuple):
    """Which ranks read a row in a step; sorted by row, for each row by step."""

    row_N: NDArray[np.int64]
    step_N: NDArray[np.int64]
    readers_N: NDArray[np.int64]  # bit r: rank r


def readings(text: Text, table: Table, ranks: int, steps: int) -> Readings:
    """Return the readings of a table by the ranks' tokens in the first steps of training."""
    parts = []
    for step in range(steps):
        for rank in range(ranks):
            rows = np.unique(text.rows(table, rank, ranks, step))
            parts.append(np.stack([rows, np.full_like(rows, step), np.full_like(rows, 1 << rank)]))
    row, step_of, bit = np.concatenate(parts, axis=1)
    key, place = np.unique(row * steps + step_of, return_inverse=True)
    return Readings(key // steps, key % steps, np.bincount(place, bit).astype(np.int64))


class Counted(NamedTuple):
    """Vectors between ranks in all steps, and row numbers that hosts send each other beyond those of fixed homes."""

    fixed: float  # every row at its hash home
    fewest: float  # by any rule, with the whole future known
    ruled: float  # by the rule below
    told: float  # row numbers, by that rule


def count_vectors(found: Readings, ranks: int, remembered: int, moved: float) -> Counted:
    """Count the vectors of fixed and of moving homes.

    The rule: a row moves to a rank that alone reads it and alone read it before. Its hash home's host knows where it
    is, and tells the reader and the home of each reading by another rank, and of each move.

    Args:
        remembered: steps without a reading after which a row is back at its hash home (W).
        moved: vectors that move with a row: 3 of Adam, its values and two moments; 1 would be the values alone.
    """
    return Counted(*_count(*found, ranks, remembered, moved))


@compiled
def _count(row_N: Any, step_N: Any, readers_N: Any, ranks: int, remembered: int, moved: float) -> Any:
    fixed, fewest, ruled, told = 0.0, 0.0, 0.0, 0.0
    cost_P, next_P = np.zeros(ranks), np.empty(ranks)  # of the best way to have the row on each rank
    lives, before = 0, -1  # by the rule; who alone read it last
    for n in range(row_N.shape[0]):
        at_hash, mask = row_N[n] % ranks, readers_N[n]
        if n == 0 or row_N[n] != row_N[n - 1]:
            fewest += cost_P.min()
            cost_P[:] = np.inf
            cost_P[at_hash] = 0.0
            lives, before = at_hash, -1
        elif step_N[n] - step_N[n - 1] > remembered:
            back = min(cost_P[at_hash], cost_P.min() + moved)
            cost_P[:] = np.inf
            cost_P[at_hash] = back
            if lives != at_hash:
                ruled, told = ruled + moved, told + 1
            lives, before = at_hash, -1
        readers, alone = 0, -1
        for rank in range(ranks):
            if (mask >> rank) & 1:
                readers, alone = readers + 1, rank
        if readers > 1:
            alone = -1
        fixed += 2 * (readers - ((mask >> at_hash) & 1))
        for new in range(ranks):
            reads = (mask >> new) & 1
            best = np.inf
            for home in range(ranks):
                sent = readers - ((mask >> home) & 1)
                best = min(best, cost_P[home] + sent + (0.0 if home == new else moved - reads))
            next_P[new] = best + readers - reads
        cost_P[:] = next_P
        away = readers - ((mask >> lives) & 1)
        if lives != at_hash:
            told += 2 * away
        if alone >= 0 and alone == before and alone != lives:
            ruled, told = ruled + moved, told + 2
            lives = alone
        else:
            ruled += 2 * away
        before = alone
    return fixed, fewest + (cost_P.min() if row_N.shape[0] else 0.0), ruled, told


def show_homes(path: str | None) -> dict[str, float]:
    """Print what remains with moving homes; return the shares of the bytes by the rule, moments included, W = 16."""
    rows, shares = [], {}
    for kind, ngram in TEXTS:
        text = read_text(kind, path)
        for ranks in (4, 8):
            table = Table(1 << 20, 128, ngram)
            steps = min(STEPS, len(text.ids) // (2 * ranks * STREAMS * SEGMENT) - 1)  # from the middle of the text
            found = readings(text, table, ranks, steps)
            for remembered in (4, 16, 64):
                alone, adam = (count_vectors(found, ranks, remembered, moved) for moved in (VALUES, ADAM))
                share = (adam.ruled + adam.told * ID_BYTES / (4 * table.width)) / adam.fixed
                fewest = [alone.fewest / alone.fixed, adam.fewest / adam.fixed]
                rows.append([kind, ngram, ranks, steps, remembered, *fewest, adam.ruled / adam.fixed, share])
                if remembered == 16:
                    shares[f"{kind} n={ngram} ranks={ranks}"] = share
    header = ["text", "n", "ranks", "steps", "W", "fewest, no moments", "fewest", "by the rule", "with ids"]
    print_table(header, rows)
    return shares
