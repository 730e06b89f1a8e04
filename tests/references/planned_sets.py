"""The plans of an expert group in plain loops over its tokens."""

from collections.abc import Sequence
from typing import NamedTuple


class PlainPlans(NamedTuple):
    weights: dict[tuple[int, int], float]  # of (token of the group, expert)
    sent: list[list[int]]  # tokens that rank p sends to rank q, its own included
    counts: list[int]  # tokens of each expert
    at_home: list[dict[int, float]]  # of each token, the weights of its columns from `experts` on


def plain_plans(sets: Sequence[dict[int, float]], experts: int, ranks: int) -> PlainPlans:
    """Return what is planned for tokens with these weights by column; columns from `experts` on are no experts.

    Rank p has as many tokens as each other rank, from p * len(sets) / ranks on, and the experts from
    p * experts / ranks on.
    """
    weights: dict[tuple[int, int], float] = {}
    sent, counts, at_home = [[0] * ranks for _ in range(ranks)], [0] * experts, []
    for token, columns in enumerate(sets):
        source, homes = token * ranks // len(sets), set()
        for column, weight in columns.items():
            if column < experts:
                weights[token, column] = weight
                counts[column] += 1
                homes.add(column * ranks // experts)
        for home in homes:
            sent[source][home] += 1
        at_home.append({column: weight for column, weight in columns.items() if column >= experts})
    return PlainPlans(weights, sent, counts, at_home)
