"""COMET's gate token by token, tree by tree: node i has children 2i + 1 and 2i + 2, the last level are leaves.

Letters: D width, J trees, I inner nodes, E experts.
"""

import torch


def step(value, gamma):
    if value <= -gamma / 2:
        return torch.zeros_like(value)
    if value >= gamma / 2:
        return torch.ones_like(value)
    return -2 / gamma**3 * value**3 + 3 / (2 * gamma) * value + 0.5


def shares(x_D, weight_ID, bias_I, gamma):
    """Return the leaves' shares of one tree, by recursion from the root."""
    inner, leaves = len(weight_ID), {}

    def visit(node, share):
        if node >= inner:
            leaves[node - inner] = share
            return
        left = step(weight_ID[node] @ x_D + bias_I[node], gamma)
        visit(2 * node + 1, share * left)
        visit(2 * node + 2, share * (1 - left))

    visit(0, torch.ones((), dtype=x_D.dtype))
    return [leaves[e] for e in range(inner + 1)]


def weights(x_D, trees, gamma):
    """Return each expert's weight [E], and the entropy of the shares.

    Args:
        trees: for each the weights and biases of its inner nodes and of its leaves' scores.
    """
    parts, entropy = [], 0.0
    for node_ID, node_I, score_ED, score_E in trees:
        for e, share in enumerate(shares(x_D, node_ID, node_I, gamma)):
            entropy = entropy - share * torch.log(share + 1e-6)
            if share > 0:
                parts.append((e, torch.exp(score_ED[e] @ x_D + score_E[e]) * (share + 1e-8)))
    total = sum(part for _, part in parts)
    experts = len(trees[0][3])
    return torch.stack([sum((p for f, p in parts if f == e), 0 * total) / total for e in range(experts)]), entropy
