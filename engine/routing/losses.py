"""Auxiliary losses of learned and stochastic routers; the caller multiplies them by their configured weights.

Letters: T tokens, E experts, K active experts per token, V vocabulary.
"""

import torch
from torch import Tensor

from foreroute.engine.routing.plan import Route


def balance_loss(logits_TE: Tensor, count_E: Tensor, total: Tensor | None = None) -> Tensor:
    """Return E * sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, eq. 4, for any K): 1 when all is even.

    f_e is the fraction of the T*K expert rows that went to expert e (a constant), P_e the mean over tokens of the
    softmax probability of e over all E experts (carries the gradient). SMoE-Dropout's public code divides the
    probabilities by T*K instead of T, so its loss is 1/K of this one: multiply its coefficient accordingly.

    Args:
        count_E: expert rows of each expert, from chosen_counts. Added up over the ranks of a run with equal numbers of
            tokens, they make the mean over ranks of this loss, and of its gradient, those of the ranks' tokens
            together.
        total: scalar, the number that counts are fractions of, such as that of the tokens; None: all expert rows.
    """
    logits_TE = _wide(logits_TE)
    total = count_E.sum() if total is None else total
    fraction_E = count_E.to(logits_TE.device, logits_TE.dtype) / total.clamp(min=1)
    mean_probability_E = logits_TE.softmax(dim=-1).mean(dim=0)
    return logits_TE.shape[-1] * torch.dot(fraction_E, mean_probability_E)


def z_loss(logits_TE: Tensor) -> Tensor:
    """Return the mean over tokens of log(sum_e exp(logit_e)) squared (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return _wide(logits_TE).logsumexp(dim=-1).square().mean()


def consistency_loss(one_TV: Tensor, other_TV: Tensor) -> Tensor:
    """Return the mean over tokens of (KL(p||q) + KL(q||p)) / 2 = 1/2 sum_v (p_v - q_v)(log p_v - log q_v).

    p and q are the softmax of two passes' logits (THOR, Zuo et al., ICLR 2022, arXiv 2110.04260). The public code adds
    up over tokens where this, as our cross-entropy, is a mean: its whole loss is ours times the tokens of a batch, so
    its weight alpha means the same. Logarithms come from log_softmax in fp32 at least: a probability may underflow, its
    logarithm does not.
    """
    log_p_TV, log_q_TV = (_wide(logits_TV).log_softmax(-1) for logits_TV in (one_TV, other_TV))
    difference_TV = (log_p_TV.exp() - log_q_TV.exp()) * (log_p_TV - log_q_TV)
    return 0.5 * difference_TV.sum(-1).mean()


def chosen_counts(route: Route, num_experts: int) -> Tensor:
    """Count the tokens that chose each expert, int64 [E]; nothing is read back from a device."""
    chosen_N = route.expert_TK.reshape(-1)
    used_N = torch.ones_like(chosen_N) if route.used_TK is None else route.used_TK.reshape(-1).long()
    return chosen_N.new_zeros(num_experts).scatter_add_(0, chosen_N, used_N)


def _wide(logits_TE: Tensor) -> Tensor:
    return logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
