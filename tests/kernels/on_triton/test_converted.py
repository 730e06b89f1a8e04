"""Converted feed-forwards on Triton's kernels, against those on the CPU's, whose tests are in tests/engine/convert."""

import copy

import pytest
import torch

from foreroute.engine.convert import Adapters, Copies, Slices
from tests.engine.convert.test_converted_layers import TOKENS, WIDTH, Host, convert, run


@pytest.mark.parametrize(("start", "weights"), [(Copies(), "table"), (Slices(), "sum"), (Adapters(width=5), "table")])
@pytest.mark.parametrize(("kind", "act", "bias"), [("plain", "gelu", False), ("gated", "silu", True)])
def test_outputs_and_gradients_are_those_on_the_cpu(start, weights, kind, act, bias, device):
    dense, found = Host(kind, act, bias).float().to(device), []
    for backend in ("cpu", "triton") if device == "cpu" else ("reference", "triton"):
        model = copy.deepcopy(dense)
        x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
        y = run(model, convert(model, start, weights, 2, backend), 2, x, weights)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": x.grad, **gradients})
    want, got = found
    assert want.keys() == got.keys() and len(got) > 3
    for name, value in want.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm() + 1e-12, name
