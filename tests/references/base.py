"""The balanced assignment of BASE layers (arXiv 2103.16716) by all permutations, for a few tokens."""

import itertools


def best_total(score_TE):
    """Return the largest sum of scores over assignments with T / E tokens for each expert."""
    tokens, experts = score_TE.shape
    places = [e for e in range(experts) for _ in range(tokens // experts)]
    scores = score_TE.tolist()
    return max(sum(row[e] for row, e in zip(scores, order, strict=True)) for order in itertools.permutations(places))
