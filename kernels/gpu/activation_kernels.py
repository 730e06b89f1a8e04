"""Triton functions of the activations in kernels/activations.py, in fp32; the choice is made when a kernel is compiled.

Letters: M expert rows of a tile, N hidden units of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def _gelu_terms(z):
    """Return Phi(z), the distribution function of N(0, 1), and its density."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)), 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def _gelu_tanh_terms(z):
    """Return (1 + tanh(y)) / 2 = sigmoid(2 y), y = sqrt(2 / pi) (z + 0.044715 z^3), and the derivative of 2 y."""
    return tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z)), 1.5957691216057308 * (1.0 + 0.134145 * z * z)


@triton.jit
def activation_of(z, ACTIVATION: tl.constexpr):
    """Return act(z) [M, N].

    Example: z = [[-1, 0, 2]]: relu [[0, 0, 2]], silu [[-0.2689, 0, 1.7616]], gelu [[-0.1587, 0, 1.9545]].
    """
    if ACTIVATION == "relu":
        a = tl.where(z < 0.0, 0.0, z)  # a GPU's max would turn NaN into 0
    elif ACTIVATION == "silu":
        a = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        share, _ = _gelu_terms(z)
        a = z * share
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        share, _ = _gelu_tanh_terms(z)
        a = z * share
    return a


@triton.jit
def activation_and_slope(z, ACTIVATION: tl.constexpr):
    """Return act(z) and its derivative, both [M, N].

    Example: z = [[-1, 0, 2]]: the derivatives are relu [[0, 0, 1]], silu [[0.0723, 0.5, 1.0908]],
    gelu [[-0.0833, 0.5, 1.0852]].
    """
    if ACTIVATION == "relu":
        a = tl.where(z < 0.0, 0.0, z)
        slope = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(z)
        a = z * sigmoid
        slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        share, density = _gelu_terms(z)
        a = z * share
        slope = share + z * density
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        share, inner = _gelu_tanh_terms(z)
        a = z * share
        slope = share + a * (1.0 - share) * inner
    return a, slope
