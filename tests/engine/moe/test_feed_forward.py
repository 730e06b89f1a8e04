"""The dense feed-forward with every activation: against a loop of PyTorch's own functions, and what it keeps."""

import pytest
import torch
from torch.nn import functional

from benchmarks.models.memory_model import SMALL, SYMBOLS, make_layout
from foreroute.engine.certificate.memory.sizes import Sizes
from foreroute.engine.config import Activation
from foreroute.engine.moe.feed_forward import FeedForward
from tests.references.activated_layer import ACT

WIDTH, INNER, TOKENS = 6, 10, 7
NAMES = {  # function, gated
    "relu": ("relu", False),
    "silu": ("silu", False),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "reglu": ("relu", True),
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "geglu_tanh": ("gelu_tanh", True),
}


def test_every_name_is_known():
    assert {name: (Activation[name].function, Activation[name].gated) for name in Activation.__members__} == NAMES


def gradients(function, x_TD, parameters):
    return torch.autograd.grad(function(x_TD).square().sum(), [x_TD, *parameters])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dropped", [False, True], ids=["all units", "mask"])
def test_equals_a_loop(name, dropped):
    torch.manual_seed(0)
    function, gated = NAMES[name]
    made = FeedForward(WIDTH, INNER, Activation[name], 0.0).double()
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    keep_TF = torch.rand(TOKENS, INNER) < 0.5 if dropped else None

    def loop(x_TD):
        rows = []
        for t, x_D in enumerate(x_TD):
            hidden_F = ACT[function](made.w1.weight @ x_D + made.w1.bias)
            if gated:
                hidden_F = hidden_F * (made.w3.weight @ x_D)
            if dropped:
                hidden_F = torch.where(keep_TF[t], hidden_F * 1.25, 0.0)
            rows.append(made.w2.weight @ hidden_F + made.w2.bias)
        return torch.stack(rows)

    parameters = list(made.parameters())
    assert len(parameters) == 4 + gated
    want = gradients(loop, x_TD, parameters)
    got = gradients(lambda x_TD: made(x_TD, keep_TF, 1.25), x_TD, parameters)
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-13)
    wrong = functional.tanh if function != "relu" else functional.silu
    made.activation = made.activation._replace(apply=wrong)
    assert not torch.allclose(made(x_TD, keep_TF, 1.25), loop(x_TD), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True], ids=["all units", "mask"])
def test_what_is_kept_is_what_the_certificate_counts(name, masked):
    made = FeedForward(WIDTH, INNER, Activation[name], 0.0)
    x_TD, kept = torch.randn(TOKENS, WIDTH), {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (x_TD, *made.parameters())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made(x_TD, torch.rand(TOKENS, INNER) < 0.5 if masked else None, 2.0)
    sizes = Sizes(make_layout({"moe": {"activation": Activation[name]}}, SMALL, 1), SYMBOLS, 1, 1, False)
    each = 4 * sizes.dense_numbers(dropout=masked) + masked
    assert sum(nbytes for nbytes, _ in kept.values()) == TOKENS * INNER * each
