"""Expert layers of live routers for tests: one in fp64, and its outputs and gradients beside others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foreroute.engine.config import KernelsConfig, MoEConfig
from foreroute.engine.moe.layer import MoELayer


def live_layer(width: int, moe: MoEConfig, number: int = 0) -> MoELayer:
    """Build expert layer number `number` in fp64, all parameters drawn from N(0, 1)."""
    torch.manual_seed(3 + number)
    layer = MoELayer(width, moe, KernelsConfig(), number).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def assert_equal_with_gradients(got: Sequence[Tensor | None], want: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Assert that tensors are equal, and so are all gradients of their sum, each times the same random numbers.

    Args:
        want: may not depend on an input; its gradient is then zero.

    Raises:
        AssertionError: they differ by more than fp64's rounding.
        RuntimeError: `got` does not depend on an input.
    """
    found = []
    for tensors, unused in ((got, False), (want, True)):
        torch.manual_seed(0)
        total = torch.zeros((), dtype=torch.float64)
        for tensor in tensors:
            assert tensor is not None
            total = total + (tensor * torch.randn(tensor.shape, dtype=torch.float64)).sum()
        found.append([*tensors, *torch.autograd.grad(total, inputs, materialize_grads=unused)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
