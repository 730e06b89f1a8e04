"""AdaMoE (arXiv 2406.13233) by plain loops, its balance loss as the paper means it."""

import torch


def route(x_TD, gate_XD, k, experts):
    """Return each token's true experts, the weights of all true experts, and its choice among all."""
    used, weight_TE, chosen_all = [], [], []
    for x_D in x_TD:
        exp_X = torch.exp(gate_XD @ x_D)
        share_X = exp_X / exp_X.sum()
        chosen = largest(share_X, k)
        true = [i for i in chosen if i < experts]
        total = sum((share_X[i] for i in true), torch.zeros_like(share_X[0]))
        used.append(sorted(true))
        weight_TE.append([share_X[i] / total if i in true else None for i in range(experts)])
        chosen_all.append(chosen)
    return used, weight_TE, chosen_all


def loss(x_TD, gate_XD, k, experts, *, balance, z):
    """Return the balance loss, in which all null experts have their mean load, and the z-loss, weighted."""
    exp_TX = torch.exp(x_TD @ gate_XD.T)
    _, _, chosen = route(x_TD, gate_XD, k, experts)
    counts = [sum(i in row for row in chosen) for i in range(len(gate_XD))]
    nulls = counts[experts:]
    counts[experts:] = [sum(nulls) / len(nulls)] * len(nulls)
    even = switch_balance(exp_TX / exp_TX.sum(dim=1, keepdim=True), counts, len(x_TD))
    return balance * even + z * squared_log_sum(x_TD @ gate_XD.T)


def largest(values, k):
    """Return the places of the k largest values, largest first."""
    numbers = torch.as_tensor(values).tolist()
    return sorted(range(len(numbers)), key=lambda i: -numbers[i])[:k]


def squared_log_sum(logits_TX):
    """Return the mean of log(sum_i exp(logit_i)) squared."""
    return sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits_TX) / len(logits_TX)


def switch_balance(share_TX, count_X, denominator):
    """Return X sum_i f_i P_i, with f_i = count_i / denominator and P_i the mean of share_ti."""
    columns = share_TX.shape[1]
    total = share_TX.new_zeros(())
    for i in range(columns):
        total = total + count_X[i] / denominator * sum(row[i] for row in share_TX) / len(share_TX)
    return columns * total
