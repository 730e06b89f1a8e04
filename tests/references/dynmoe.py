"""DynMoE's gate and losses token by token, with its sign whose gradient passes straight through.

Letters: D width, E experts.
"""

import torch


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, score):
        return torch.sign(score)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def signs(x_D, direction_ED, threshold_E, active):
    """Return 1 for each expert that the token has, else 0 [E]."""
    found = []
    for e, (w_D, g) in enumerate(zip(direction_ED, threshold_E, strict=True)):
        score = torch.sigmoid(w_D @ x_D / (w_D.norm() * x_D.norm())) if e in active else torch.zeros_like(g)
        found.append(Sign.apply(torch.relu(score - torch.sigmoid(g))))
    return torch.stack(found)


def weights(sign_E):
    return sign_E / max(int(sign_E.detach().sum()), 1)


def loss(sign_TE, direction_ED, active):
    """Return load balance + mean activation + diversity + mean length."""
    experts = sign_TE.shape[1]
    some = [sign_E for sign_E in sign_TE if sign_E.detach().sum() > 0]
    load = 0.0
    for e in range(experts):
        share = sum(sign_E[e] / sign_E.sum() for sign_E in some) / len(some)
        used = sum(float(sign_E.detach()[e] > 0) for sign_E in some) / len(some)
        load = load + share * used / experts * experts**2
    apart = 0.0
    for a in active:
        for b in active:
            cosine = direction_ED[a] @ direction_ED[b] / (direction_ED[a].norm() * direction_ED[b].norm())
            apart = apart + (cosine - float(a == b)) ** 2
    length = sum(w_D.norm() for w_D in direction_ED) / experts
    return load + sign_TE.mean() + torch.sqrt(apart) + length
