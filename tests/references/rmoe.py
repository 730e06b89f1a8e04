"""RMoE's router token by token: the equations of a GRU (Cho et al. 2014, as in RMoE's rnn.py), then top k.

Letters: D width, H width of the state, E experts.
"""

import torch


def state(x_D, h_H, project_HD, w_ih, w_hh, b_ih, b_hh):
    """Return the next state of one token."""
    z_H = project_HD @ x_D
    (w_ir, w_iz, w_in), (w_hr, w_hz, w_hn) = w_ih.chunk(3), w_hh.chunk(3)
    (b_ir, b_iz, b_in), (b_hr, b_hz, b_hn) = b_ih.chunk(3), b_hh.chunk(3)
    reset_H = 1 / (1 + torch.exp(-(w_ir @ z_H + b_ir + w_hr @ h_H + b_hr)))
    keep_H = 1 / (1 + torch.exp(-(w_iz @ z_H + b_iz + w_hz @ h_H + b_hz)))
    new_H = torch.tanh(w_in @ z_H + b_in + reset_H * (w_hn @ h_H + b_hn))
    return (1 - keep_H) * new_H + keep_H * h_H


def weights(h_H, gate_EH, k):
    """Return the weight of each expert [E], 0 for all but the top k."""
    logits_E = gate_EH @ h_H
    best = sorted(range(len(logits_E)), key=lambda e: -logits_E[e].item())[:k]
    total = sum(torch.exp(logits_E[e]) for e in best)
    zero = torch.zeros((), dtype=h_H.dtype)
    return torch.stack([torch.exp(logits_E[e]) / total if e in best else zero for e in range(len(logits_E))])
