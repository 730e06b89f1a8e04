"""Engram's gate and short convolution, position by position and unit by unit (arXiv 2601.07372, engram_demo_v1.py)."""

import math

import torch


def rms_norm(x_D, gain_D, eps):
    """x / sqrt(mean x^2 + eps) * gain."""
    scale = torch.rsqrt(sum(x * x for x in x_D) / len(x_D) + eps)
    return torch.stack([x * scale * g for x, g in zip(x_D, gain_D, strict=True)])


def gated(row_QX, x_QD, p, *, dilation, eps, convolution_eps, begins=(0,)):
    """x + v + SiLU(convolution of RMSNorm(v)) of one text.

    Args:
        p: key, key_bias, value, value_bias, of which biases may be None; key_gain, x_gain, convolution_gain;
            convolution, [D, taps].
        begins: places of the documents' first ids; the convolution does not look across them.
    """
    values, normed, found = [], [], []
    for row_X, x_D in zip(row_QX, x_QD, strict=True):
        key_D = p["key"] @ row_X + (0 if p["key_bias"] is None else p["key_bias"])
        value_D = p["value"] @ row_X + (0 if p["value_bias"] is None else p["value_bias"])
        s = rms_norm(key_D, p["key_gain"], eps) @ rms_norm(x_D, p["x_gain"], eps) / math.sqrt(len(x_D))
        gate = 1 / (1 + torch.exp(-torch.sign(s) * torch.sqrt(torch.clamp(torch.abs(s), min=1e-6))))
        values.append(gate * value_D)
        normed.append(rms_norm(values[-1], p["convolution_gain"], convolution_eps))
    taps = p["convolution"].shape[1]
    for place, x_D in enumerate(x_QD):
        start = max(begin for begin in begins if begin <= place)
        sums = []
        for d in range(len(x_D)):
            total = torch.zeros((), dtype=x_D.dtype)
            for tap in range(taps):
                source = place - (taps - 1 - tap) * dilation
                if source >= start:
                    total = total + p["convolution"][d, tap] * normed[source][d]
            sums.append(total / (1 + torch.exp(-total)))
        found.append(x_D + values[place] + torch.stack(sums))
    return torch.stack(found)
