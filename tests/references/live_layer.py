"""The sum of experts by plain loops, for references of live routers.

Letters: T tokens, D width, E experts, F their hidden width.
"""

import torch


def mixture(x_TD, weight_TE, used, w1_EFD, b1_EF, w2_EFD, b2_ED):
    """Return sum_e w_te E_e(x_t) with E_e(x) = W2 relu(W1 x + b1) + b2, token by token.

    Args:
        weight_TE: for each token a list of each expert's weight.
        used: for each token the experts that it uses.
    """
    rows = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D)
        for e in used[t]:
            hidden_F = torch.relu(w1_EFD[e] @ x_D + b1_EF[e])
            y_D = y_D + weight_TE[t][e] * (hidden_F @ w2_EFD[e] + b2_ED[e])
        rows.append(y_D)
    return torch.stack(rows)
