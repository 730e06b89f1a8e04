"""MoE++ (arXiv 2410.07348) by plain loops: gate with residual, constants, copies and null experts.

Experts are numbered: those with rows, constants, copies, nulls.
"""

import torch


def logits(x_TD, hidden_HD, gate_XH, before_TX=None, residual_XX=None):
    """Return W2 tanh(W1 x) + G (logits of the layer before); without W1, W2 x."""
    rows = []
    for t, x_D in enumerate(x_TD):
        inner = x_D if hidden_HD is None else torch.tanh(hidden_HD @ x_D)
        row = gate_XH @ inner
        rows.append(row if before_TX is None else row + residual_XX @ before_TX[t])
    return torch.stack(rows)


def route(logits_TX, k, nulls):
    """Return each token's choice and the weights of all its experts: softmax over the chosen that are not null."""
    chosen, weight_TX = [], []
    for row in logits_TX:
        share_X = torch.exp(row) / torch.exp(row).sum()
        taken = largest(share_X, k)
        true = [i for i in taken if i < len(row) - nulls]
        total = sum((share_X[i] for i in true), torch.zeros_like(share_X[0]))
        chosen.append(taken)
        weight_TX.append([share_X[i] / total if i in true else None for i in range(len(row))])
    return chosen, weight_TX


def without_rows(x_TD, chosen, weight_TX, experts, constants, copies, vector_cD, mix_c2D):
    """Return the sum of each token's constants, a1 x + a2 v with (a1, a2) = softmax(Wc x), and copies, x."""
    rows = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D)
        for i in chosen[t]:
            if experts <= i < experts + constants:
                c = i - experts
                exp_2 = torch.exp(mix_c2D[c] @ x_D)
                a_2 = exp_2 / exp_2.sum()
                y_D = y_D + weight_TX[t][i] * (a_2[0] * x_D + a_2[1] * vector_cD[c])
            elif experts + constants <= i < experts + constants + copies:
                y_D = y_D + weight_TX[t][i] * x_D
        rows.append(y_D)
    return torch.stack(rows)


def loss(logits_TX, chosen, experts, tau, *, balance, z):
    """Return X sum_i eta_i f_i P_i, eta_i = tau for experts without rows, and the z-loss, weighted."""
    exp_TX = torch.exp(logits_TX)
    counts = [sum(i in row for row in chosen) * (1 if i < experts else tau) for i in range(logits_TX.shape[1])]
    even = switch_balance(exp_TX / exp_TX.sum(dim=1, keepdim=True), counts, len(logits_TX))
    return balance * even + z * squared_log_sum(logits_TX)


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
