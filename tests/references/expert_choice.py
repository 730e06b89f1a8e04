"""Expert choice (arXiv 2202.09368) by plain loops."""

import torch


def route(x_TD, gate_ED, capacity):
    """Return each token's experts, and softmax(W x) of each token, its weights."""
    exp_TE = torch.exp(x_TD @ gate_ED.T)
    share_TE = exp_TE / exp_TE.sum(dim=1, keepdim=True)
    used = [[] for _ in x_TD]
    for e in range(len(gate_ED)):
        for t in largest(share_TE[:, e], capacity):
            used[t].append(e)
    return used, share_TE


def largest(values, k):
    """Return the places of the k largest values, largest first."""
    numbers = torch.as_tensor(values).tolist()
    return sorted(range(len(numbers)), key=lambda i: -numbers[i])[:k]
