"""The activations of an expert feed-forward: plain formulas, PyTorch's operators, and which of them save their input.

    relu       max(z, 0)
    silu       z sigmoid(z)                                               arXiv:1702.03118, section 2
    gelu       z Phi(z), Phi the distribution function of N(0, 1)         arXiv:1606.08415, section 2
    gelu_tanh  z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2          the same, its approximation

z is the pre-activation w1 x + b1. With a gate the hidden units are act(z) (w3 x): ReGLU, SwiGLU, GEGLU
(arXiv:2002.05202, section 2). The Triton functions are in kernels/gpu/activation_kernels.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """One activation, in three forms that are equal up to rounding."""

    formula: Callable[[Tensor], Tensor]  # for the plain-loop reference, differentiated by autograd
    apply: Callable[[Tensor], Tensor]  # PyTorch's operator, into a new tensor
    backward_: Callable[[Tensor, Tensor], object]  # (gradient of act(z), z): the gradient of z, in place of the first


def _gelu_tanh(z: Tensor) -> Tensor:
    return z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


def _relu_backward_(grad: Tensor, z: Tensor) -> None:
    torch.ops.aten.threshold_backward.grad_input(grad, z, 0, grad_input=grad)


def _silu_backward_(grad: Tensor, z: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(grad, z, grad_input=grad)


def _gelu_backward_(grad: Tensor, z: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(grad, z, grad_input=grad)


def _gelu_tanh_backward_(grad: Tensor, z: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(grad, z, approximate="tanh", grad_input=grad)


ACTIVATIONS = {
    "relu": Activation(torch.relu, F.relu, _relu_backward_),
    "silu": Activation(lambda z: z * torch.sigmoid(z), F.silu, _silu_backward_),
    "gelu": Activation(lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2, F.gelu, _gelu_backward_),
    "gelu_tanh": Activation(_gelu_tanh, lambda z: F.gelu(z, approximate="tanh"), _gelu_tanh_backward_),
}


def saves_pre(activation: str, *, gated: bool) -> bool:
    """Return whether forward saves the pre-activation, from which backward computes the hidden units again.

    Only ReLU without a gate saves the hidden units instead: they also show which units were active or dropped.
    """
    return gated or activation != "relu"
