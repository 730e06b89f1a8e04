"""What converted feed-forwards compute, token by token and hidden unit by hidden unit, in fp64.

    copies    sum_i w_i FFN_i(x)              (sparse upcycling, arXiv 2212.05055)
    slices    sum over the units of the active slices + b2    (MoEfication, arXiv 2110.01786)
    adapters  y + s sum_i w_i Up_i gelu(Down_i y), y = FFN(x) (PESC, arXiv 2401.02731)

Letters: D width, F hidden width, T tokens, E experts.
"""

import torch
import torch.nn.functional as F

ACT = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}


def units(x_D, dense, act, chosen):
    """Sum of the hidden units of these numbers, without the output bias; dense has w1 [F, D], w2 [F, D] and others."""
    y_D = torch.zeros_like(x_D)
    for f in chosen:
        z = dense["w1"][f] @ x_D
        if "b1" in dense:
            z = z + dense["b1"][f]
        h = ACT[act](z)
        if "w3" in dense:
            h = h * (dense["w3"][f] @ x_D)
        y_D = y_D + h * dense["w2"][f]
    return y_D


def feed_forward(x_D, dense, act):
    """The whole feed-forward."""
    y_D = units(x_D, dense, act, range(len(dense["w1"])))
    return y_D + dense["b2"] if "b2" in dense else y_D


def copies(x_TD, experts_T, weights_T, copies_E, act):
    """Each token's weighted sum of its feed-forwards."""
    out = []
    for x_D, chosen, weights in zip(x_TD, experts_T, weights_T, strict=True):
        parts = [w * feed_forward(x_D, copies_E[e], act) for e, w in zip(chosen, weights, strict=True)]
        out.append(torch.stack(parts).sum(0))
    return torch.stack(out)


def slices(x_TD, experts_T, units_E, dense, act):
    """Each token's sum of the hidden units of its slices; units_E has the numbers of the units of each slice."""
    out = []
    for x_D, chosen in zip(x_TD, experts_T, strict=True):
        y_D = units(x_D, dense, act, [f for e in chosen for f in units_E[e]])
        out.append(y_D + dense["b2"] if "b2" in dense else y_D)
    return torch.stack(out)


def adapters(x_TD, experts_T, weights_T, dense, act, down_E, up_E, scale):
    """Each token's feed-forward and the adapters of its output."""
    out = []
    for x_D, chosen, weights in zip(x_TD, experts_T, weights_T, strict=True):
        y_D = feed_forward(x_D, dense, act)
        added = torch.zeros_like(y_D)
        for e, w in zip(chosen, weights, strict=True):
            for f in range(len(down_E[e])):
                added = added + w * F.gelu(down_E[e][f] @ y_D) * up_E[e][f]
        out.append(y_D + scale * added)
    return torch.stack(out)
