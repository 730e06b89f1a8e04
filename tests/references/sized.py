"""Experts of unequal width, one by one: E_g(x) = W2 act(W1 x + b1) + b2 with m_g F hidden units, summed by weight.

HMoE (arXiv 2408.10681), section 3: y = sum over the chosen g of w_g E_g(x). Letters: T tokens, D width, F hidden units
of a slice, G experts, E slices.
"""

import torch
import torch.nn.functional as F


class WideExperts:
    """The experts, cut together from stacked slices [E, F, D], [E, F] and [E, D]; b2 of each is its first slice's."""

    def __init__(self, sizes, stacked):
        self.sizes, self.experts, first = sizes, [], 0
        for size in sizes:
            part = {name: tensor[first : first + size] for name, tensor in stacked.items()}
            wide = {name: tensor.reshape(-1, *tensor.shape[2:]) for name, tensor in part.items() if name != "b2"}
            wide["b2"] = part["b2"][0]
            self.experts.append({name: tensor.clone().requires_grad_() for name, tensor in wide.items()})
            first += size

    def named(self):
        return [(name, tensor) for expert in self.experts for name, tensor in expert.items()]

    def __call__(self, x_TD, sets):
        """Apply to each token the experts of its set, pairs of an expert and a weight."""
        rows = []
        for x_D, chosen in zip(x_TD, sets, strict=True):
            y_D = torch.zeros_like(x_D)
            for g, weight in chosen:
                p = self.experts[g]
                z = p["w1"] @ x_D + p["b1"]
                hidden = F.silu(z) * (p["w3"] @ x_D) if "w3" in p else F.relu(z)
                y_D = y_D + weight * (p["w2"].T @ hidden + p["b2"])
            rows.append(y_D)
        return torch.stack(rows)

    def as_slices(self, name, *, grad=False):
        """A parameter, or its gradient, as the stacked slices have it; b2 beyond first slices is zero."""
        parts = []
        for size, expert in zip(self.sizes, self.experts, strict=True):
            tensor = expert[name].grad if grad else expert[name].detach()
            if name == "b2":
                parts += [tensor[None], torch.zeros(size - 1, *tensor.shape, dtype=tensor.dtype)]
            else:
                parts.append(tensor.reshape(size, -1, *tensor.shape[1:]))
        return torch.cat(parts)
