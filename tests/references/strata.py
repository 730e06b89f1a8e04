"""A chain of expert layers, token by token: h = h + E_s(LN_s(h)) for as many strata as the token is deep.

Stratified MoE (arXiv 2305.02176), section 3, with norms before the experts and one expert of weight 1 in each stratum.
"""

import torch
import torch.nn.functional as F


def chain(h_TD, strata, path):
    """Return the hidden states after the strata.

    Args:
        strata: of each, norm's weight and bias, and the experts' w1, b1, w2, b2.
        path: of each token, the numbers of its experts, one for each stratum that it passes through.
    """
    rows = []
    for h_D, experts in zip(h_TD, path, strict=True):
        for (gain_D, bias_D, w1, b1, w2, b2), e in zip(strata[: len(experts)], experts, strict=True):
            centred_D = h_D - h_D.mean()
            x_D = centred_D / torch.sqrt(centred_D.square().mean() + 1e-5) * gain_D + bias_D
            h_D = h_D + w2[e].T @ F.relu(w1[e] @ x_D + b1[e]) + b2[e]
        rows.append(h_D)
    return torch.stack(rows)
