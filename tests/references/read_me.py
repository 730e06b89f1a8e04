"""Read-ME's network, token by token: in whole numbers of Python's own, and with floats as it is published.

Letters: D are numbers of a state, E experts.
"""

import math


def product(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def whole_logits(ids, embedding, query, key, value, output, one=64, steps=16):
    """Return each token's logits; arguments are lists of whole numbers in units of 1 / one."""
    states = [embedding[i] for i in ids]
    queries, keys, values = ([[x // one for x in product(m, h)] for h in states] for m in (query, key, value))
    root = math.isqrt(len(query) * one**4)
    found = []
    for i, state in enumerate(states):
        scores = [sum(a * b for a, b in zip(queries[i], keys[j], strict=True)) * steps // root for j in range(i + 1)]
        below = [max(scores) - score for score in scores]
        shares = [round(65536 * math.exp(-b / steps)) if b < 12 * steps else 0 for b in below]
        context = [
            sum(share * values[j][d] for j, share in enumerate(shares)) // sum(shares) for d in range(len(state))
        ]
        found.append(product(output, [a + b for a, b in zip(state, context, strict=True)]))
    return found


def float_logits(ids, embedding, query, key, value, output):
    """Return each token's logits; arguments are lists of floats."""
    states = [embedding[i] for i in ids]
    queries, keys, values = ([product(m, h) for h in states] for m in (query, key, value))
    found = []
    for i, state in enumerate(states):
        scores = [sum(a * b for a, b in zip(queries[i], keys[j], strict=True)) for j in range(i + 1)]
        shares = [math.exp(score / math.sqrt(len(query))) for score in scores]
        context = [sum(share * values[j][d] for j, share in enumerate(shares)) / sum(shares) for d in range(len(state))]
        found.append(product(output, [a + b for a, b in zip(state, context, strict=True)]))
    return found
