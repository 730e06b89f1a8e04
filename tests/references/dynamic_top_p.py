"""The top-p router of "Harder Tasks Need More Experts" (arXiv 2403.07652), and XMoE's rule, by plain loops."""

import torch


def probabilities(x_TD, gate_ED):
    """Return softmax(W x) of each token."""
    exp_TE = torch.exp(x_TD @ gate_ED.T)
    return exp_TE / exp_TE.sum(dim=1, keepdim=True)


def chosen(share_E, threshold):
    """Take experts in order of probability until their sum is above the threshold; the one that crosses it is in."""
    taken, total = [], 0.0
    for e in largest(share_E, len(share_E)):
        taken.append(e)
        total += share_E.tolist()[e]
        if total > threshold:
            break
    return sorted(taken)


def chosen_by_xmoe(share_E, threshold):
    """Take the experts for which the sum up to them, less their own probability, is below the threshold; the first."""
    order, total, taken = largest(share_E, len(share_E)), 0.0, []
    for place, e in enumerate(order):
        total += share_E.tolist()[e]
        if total - share_E.tolist()[e] < threshold or place == 0:
            taken.append(e)
    return sorted(taken)


def loss(x_TD, gate_ED, threshold, *, balance, entropy, z):
    """Return the balance loss, the entropy and the z-loss, weighted."""
    share_TE = probabilities(x_TD, gate_ED)
    used = [chosen(share_E, threshold) for share_E in share_TE]
    counts = [sum(e in row for row in used) for e in range(len(gate_ED))]
    disorder = sum(-(share_E * torch.log(share_E)).sum() for share_E in share_TE) / len(share_TE)
    even = switch_balance(share_TE, counts, len(x_TD))
    return balance * even + entropy * disorder + z * squared_log_sum(x_TD @ gate_ED.T)


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
