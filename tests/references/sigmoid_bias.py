"""DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2) by plain loops."""

import torch


def route(x_TD, gate_ED, bias_E, k, *, scale=1.0, groups=1, limit=1):
    """Return each token's experts, and the weights of all experts, 0 for those not chosen."""
    used, weight_TE = [], []
    for x_D in x_TD:
        score_E = 1 / (1 + torch.exp(-(gate_ED @ x_D)))
        biased = [s + b for s, b in zip(score_E.tolist(), bias_E.tolist(), strict=True)]
        size = len(biased) // groups
        best = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        allowed = [g * size + i for g in largest(best, limit) for i in range(size)]
        chosen = [allowed[i] for i in largest([biased[e] for e in allowed], k)]
        total = sum(score_E[e] for e in chosen)
        used.append(sorted(chosen))
        weight_TE.append([scale * score_E[e] / total if e in chosen else 0 * total for e in range(len(biased))])
    return used, weight_TE


def update(bias, counts, step):
    """Return the biases after a step."""
    mean = sum(counts) / len(counts)
    return [b + step * ((mean > c) - (mean < c)) for b, c in zip(bias, counts, strict=True)]


def largest(values, k):
    """Return the places of the k largest values, largest first."""
    numbers = torch.as_tensor(values).tolist()
    return sorted(range(len(numbers)), key=lambda i: -numbers[i])[:k]
