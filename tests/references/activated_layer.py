"""The expert layer by plain loops with PyTorch's own activations, for tests of the kernels.

Letters: R token rows, N expert rows, D width, L experts, F expert hidden width.
"""

import torch
import torch.nn.functional as F

ACT = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}


def activated_layer(x_RD, weight_N, weights, source_N, expert_N, activation, keep_NF=None, scale=1.0):
    """Return the sum of weight[n] (keep[n] scale act(w1[e] x[r] + b1[e]) @ w2[e] + b2[e]) over the expert rows n of r.

    Args:
        weights: w1_LFD, b1_LF, w2_LFD, b2_LD and w3_LFD; with w3 act(.) is multiplied by w3[e] x[r].
        source_N: the token row of each expert row.
        expert_N: the expert of each expert row.
        keep_NF: the hidden units that dropout keeps; None: all.
    """
    w1_LFD, b1_LF, w2_LFD, b2_LD, w3_LFD = weights
    out = [torch.zeros_like(x_D) for x_D in x_RD]
    for n, (r, e) in enumerate(zip(source_N.tolist(), expert_N.tolist(), strict=True)):
        hidden_F = ACT[activation](w1_LFD[e] @ x_RD[r] + b1_LF[e])
        if w3_LFD is not None:
            hidden_F = hidden_F * (w3_LFD[e] @ x_RD[r])
        if keep_NF is not None:
            hidden_F = torch.where(keep_NF[n], hidden_F * scale, 0.0)
        out[r] = out[r] + weight_N[n] * (hidden_F @ w2_LFD[e] + b2_LD[e])
    return torch.stack(out)
