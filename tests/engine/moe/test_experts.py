"""What the experts ask of the kernels at each k and backend; the kernels' results are tested in tests/kernels."""

import pytest
import torch

from foreroute.engine.config import KernelsConfig, MoEConfig
from foreroute.engine.config.enums import Activation, Backend, MatmulPrecision, SavedForBackward
from foreroute.engine.moe import experts as module
from foreroute.engine.moe.experts import Experts
from foreroute.engine.routing.plan import Route, build_plan


def plan(k, tokens=5):
    expert_TK = torch.stack([torch.arange(4).roll(t)[:k] for t in range(tokens)])
    return build_plan(Route(expert_TK, torch.full((tokens, k), 1 / k)), 4)


def options(monkeypatch, kernels, k, dtype=torch.float32, **moe):
    """What reaches kernels.moe_ffn."""
    found = {}
    monkeypatch.setattr(module, "moe_ffn", lambda x, *_, **how: found.update(how) or x)
    experts = Experts(6, MoEConfig(experts=4, expert_width=3, **moe), kernels).to(dtype)
    experts(torch.zeros(5, 6, dtype=dtype), plan(k), None)
    return found


@pytest.mark.parametrize(
    ("backend", "masked_from_k", "masked"),
    [
        (Backend.auto, 3, [False, False, True, True]),
        (Backend.cpu, 4, [False, False, False, True]),
        (Backend.cpu, None, [False] * 4),
        (Backend.reference, 1, [False] * 4),
        (Backend.triton, 1, [False] * 4),
    ],
)
def test_products_are_masked_on_a_cpu_from_the_k_that_was_asked_for(backend, masked_from_k, masked, monkeypatch):
    kernels = KernelsConfig(backend=backend, masked_from_k=masked_from_k)
    found = [options(monkeypatch, kernels, k) for k in range(1, 5)]
    assert [how["masked"] for how in found] == masked
    assert {how["backend"] for how in found} == {"cpu" if backend is Backend.auto else backend.value}


def test_the_other_options_are_those_of_the_configuration(monkeypatch):
    plain = options(monkeypatch, KernelsConfig(), 2)
    assert (plain["mode"], plain["precision"], plain["debug"]) == ("lean", "ieee", False)
    fast = KernelsConfig(backend=Backend.cpu, mode=SavedForBackward.fast, debug=True)
    found = options(monkeypatch, fast, 2)
    assert (found["mode"], found["debug"]) == ("fast", True)
    tf32 = KernelsConfig(backend=Backend.triton, precision=MatmulPrecision.tf32)
    assert options(monkeypatch, tf32, 2)["precision"] == "tf32"


@pytest.mark.parametrize(
    ("name", "function"), {"relu": "relu", "silu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}.items()
)
def test_the_activation_is_that_of_the_configuration(name, function, monkeypatch):
    assert options(monkeypatch, KernelsConfig(), 2, activation=Activation[name])["activation"] == function


@pytest.mark.parametrize("activation", list(Activation))
def test_weights_begin_as_drawn(activation):
    torch.manual_seed(0)
    moe = MoEConfig(experts=4, expert_width=48, activation=activation)
    experts = Experts(32, moe, KernelsConfig())
    gated = activation.name.endswith(("glu", "glu_tanh"))
    matrices = [experts.w1, experts.w2, *([experts.w3] if gated else [])]
    assert (experts.w3 is not None) == gated
    for std in (0.02, 0.3):
        for matrix in matrices:
            assert matrix.shape == (4, 48, 32)
            assert matrix.std().item() == pytest.approx(std, rel=0.05)
        experts.init_weights(0.3)
    assert experts.b1.shape == (4, 48) and experts.b2.shape == (4, 32)
    assert not experts.b1.any() and not experts.b2.any()
