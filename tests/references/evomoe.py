"""EvoMoE's dense-to-sparse gate token by token.

Letters: D width, E experts.
"""

import torch


def temperature(steps, start, end, decay):
    return start + (end - start) * min(steps, decay) / decay


def weights(x_D, gate_ED, noise_E, tau, threshold):
    """Return each expert's weight [E], 0 where the token does not have it."""
    probability_E = torch.exp(gate_ED @ x_D) / torch.exp(gate_ED @ x_D).sum()
    scaled_E = torch.exp((torch.log(probability_E) + noise_E) / tau)
    share_E = scaled_E / scaled_E.sum()
    return torch.stack([share if share > threshold else 0 * share for share in share_E])


def balance(probability_TE, has_TE):
    """Return E sum_e f_e P_e, with f_e the share of expert e in all that tokens have."""
    experts, total = probability_TE.shape[1], has_TE.sum()
    return experts * sum(has_TE[:, e].sum() / total * probability_TE[:, e].mean() for e in range(experts))
