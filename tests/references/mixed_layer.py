"""An expert layer token by token: a given set of experts, weights by a learned gate, experts without rows, a residual.

    w_i = scale f(g_i) / (sum over the set of f(g_j) + 1e-20), g = W x; without the division if not normalised, where
    a softmax is over all columns instead of the set
    experts 0 .. E - 1     w (W2 relu(W1 x + b1) + b2)
    the next, constants    w (a1 x + a2 v), (a1, a2) = softmax(Wc x)   (MoE++, arXiv 2410.07348)
    the next, copies       w x
    all after them         nothing

f is exp for softmax, 1 / (1 + exp(-g)) for sigmoid, sqrt(log(1 + exp(g))) for sqrt_softplus (DeepSeek-V4's hash
layers). The residual is that of PR-MoE (arXiv 2201.05596): c0 y + c1 MLP(x), c = softmax(Wr x + br).
"""

import torch


def set_weights(logits, kind, normalised=True, scale=1.0):
    """Weights of one token's set."""
    if not len(logits):
        return logits
    if kind == "softmax":
        found = (logits - logits.max()).exp()
        return scale * found / found.sum()
    found = 1 / (1 + (-logits).exp()) if kind == "sigmoid" else (1 + logits.exp()).log().sqrt()
    return scale * found / (found.sum() + 1e-20) if normalised else scale * found


def expert(x, tensors, number):
    """One expert's output for one token."""
    hidden = (tensors["experts.w1"][number] @ x + tensors["experts.b1"][number]).clamp(min=0)
    return hidden @ tensors["experts.w2"][number] + tensors["experts.b2"][number]


def mixed(x, chosen, tensors, weights, copies=0):
    """The weighted sum of one token's set."""
    y, num_experts = torch.zeros_like(x), len(tensors["experts.w1"])
    constants = len(tensors["zero_experts.vector"]) if "zero_experts.vector" in tensors else 0
    for number, weight in zip(chosen, weights, strict=True):
        place = number - num_experts
        if number < num_experts:
            y = y + weight * expert(x, tensors, number)
        elif place < constants:
            a = (tensors["zero_experts.mix"][place] @ x).exp()
            y = y + weight * (a[0] * x + a[1] * tensors["zero_experts.vector"][place]) / a.sum()
        elif place < constants + copies:
            y = y + weight * x
    return y


def layer(x_TD, chosen_T, tensors, kind, normalised=True, scale=1.0, copies=0, fixed_T=None):
    """All tokens; `tensors` by the names of the layer's parameters, `fixed_T` weights instead of the gate's."""
    y_T = []
    for token, (x, chosen) in enumerate(zip(x_TD, chosen_T, strict=True)):
        if fixed_T is None and kind == "softmax" and not normalised:
            logits = tensors["gate.weight"] @ x
            found = (logits - logits.max()).exp()
            weights = scale * found[chosen] / found.sum()
        elif fixed_T is None:
            weights = set_weights(tensors["gate.weight"][chosen] @ x, kind, normalised, scale)
        else:
            weights = fixed_T[token]
        y = mixed(x, chosen, tensors, weights, copies)
        if "coefficient.weight" in tensors:
            hidden = (tensors["shared.w1.weight"] @ x + tensors["shared.w1.bias"]).clamp(min=0)
            c = (tensors["coefficient.weight"] @ x + tensors["coefficient.bias"]).exp()
            dense = tensors["shared.w2.weight"] @ hidden + tensors["shared.w2.bias"]
            y = (c[0] * y + c[1] * dense) / c.sum()
        y_T.append(y)
    return torch.stack(y_T)
