"""Every activation, gated and plain, on the CPU and in the reference, against loops of PyTorch's own functions."""

import itertools

import pytest
import torch
from torch.nn import functional

from foreroute.kernels import Dropout, ExpertWeights, expert_ffn, keep_mask, moe_ffn, row_hash, unit_hash
from foreroute.kernels.activations import ACTIVATIONS, saves_pre
from foreroute.kernels.testing.cases import make_case, relative_error, run_layer, worst_error
from tests.references.activated_layer import ACT, activated_layer

SHAPE = (13, 8, 12, 4, 2)  # tokens, width, hidden, experts, active
WAYS = {"lean": {}, "fast": {"mode": "fast"}, "masked": {"masked": True}, "reference": {"backend": "reference"}}
way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
activations = pytest.mark.parametrize("activation", ACT)
gates = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def loops(x, weight, weights, rows, *, activation, dropout=None):
    """The loops with the arguments of moe_ffn."""
    keep, scale, expert_N = None, 1.0, rows.expert_N()
    if dropout is not None:
        row_N = row_hash(dropout, dropout.token_R[rows.source_N], expert_N)
        keep, scale = keep_mask(row_N, unit_hash(weights.b1_LF.shape[1]), dropout.threshold), dropout.scale
        assert 0 < keep.float().mean() < 1
    return activated_layer(x, weight, weights, rows.source_N, expert_N, activation, keep, scale)


def test_the_loops_know_every_activation():
    assert ACT.keys() == ACTIVATIONS.keys()


@activations
@gates
@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["all units", "dropout"])
@way
def test_equals_loops(activation, gated, rate, options):
    case = make_case(SHAPE, gated=gated)
    dropout = Dropout(rate, 1234567890123 * 2**20, torch.arange(13) * 7 + 3, first_expert=5) if rate else None
    shared = {"activation": activation, "dropout": dropout}
    want = run_layer(loops, case, torch.float64, **shared)
    got = run_layer(moe_ffn, case, torch.float64, **shared, **options)
    assert worst_error(got, want)[0] < 1e-13  # the order of additions
    got = run_layer(moe_ffn, case, torch.float32, **shared, **options)
    assert worst_error(got, want)[0] < 2e-6


@activations
@gates
@pytest.mark.parametrize("options", [{"mode": "fast"}, {"masked": True}], ids=["fast", "masked"])
def test_half_precision(activation, gated, options):
    for dtype, bound in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        case = make_case(SHAPE, gated=gated).rounded(dtype)
        want = run_layer(loops, case, torch.float64, activation=activation)
        assert worst_error(run_layer(moe_ffn, case, dtype, activation=activation, **options), want)[0] < bound


@activations
@gates
def test_planned_weights_and_experts_alone(activation, gated):
    case = make_case(SHAPE, gated=gated)
    want = run_layer(loops, case, torch.float64, activation=activation, dweight=False)
    for options in WAYS.values():
        got = run_layer(moe_ffn, case, torch.float64, activation=activation, dweight=False, **options)
        assert worst_error(got, want)[0] < 1e-13
    y_ND = expert_ffn(case.x_TD, case.weights, case.rows, activation=activation)
    out_TD = torch.zeros_like(case.x_TD).index_add(0, case.rows.source_N, y_ND * case.weight_N[:, None])
    assert relative_error(out_TD, want["out"]) < 1e-13


@pytest.mark.parametrize("name", ACT)
def test_formulas(name):
    """Values, and gradients where autograd differentiates the formula and PyTorch its operator."""
    activation, z = ACTIVATIONS[name], torch.linspace(-12, 12, 4801, dtype=torch.float64)
    z = z[z != 0]  # the kink of ReLU
    leaf = z.clone().requires_grad_()
    ACT[name](leaf).sum().backward()
    assert torch.equal(activation.apply(z), ACT[name](z))
    assert torch.allclose(activation.formula(z), ACT[name](z), rtol=1e-12, atol=1e-14)
    slope = torch.ones_like(z)
    activation.backward_(slope, z)
    assert torch.allclose(slope, leaf.grad, rtol=1e-12, atol=1e-14)


@gates
def test_another_activation_is_seen(gated):
    case = make_case(SHAPE, gated=gated)
    found = {name: run_layer(moe_ffn, case, torch.float64, activation=name) for name in ACT}
    for one, other in itertools.combinations(ACT, 2):
        assert worst_error(found[one], found[other])[0] > 1e-4, (one, other)


@gates
@way
def test_without_a_name_it_is_relu_or_swiglu(gated, options):
    case = make_case(SHAPE, gated=gated)
    want = run_layer(moe_ffn, case, torch.float32, activation="silu" if gated else "relu", **options)
    got = run_layer(moe_ffn, case, torch.float32, **options)
    assert all(torch.equal(got[name], value) for name, value in want.items())


@activations
def test_nan_is_not_hidden(activation):
    case = make_case(SHAPE)
    case.x_TD[3] = torch.nan
    got = run_layer(moe_ffn, case, torch.float32, activation=activation)
    assert got["out"][3].isnan().all() and got["d_w1"].isnan().any()


def kept_numbers(case, activation, **options):
    """Numbers that the layer keeps for backward besides its inputs: storages that no caller holds."""
    weights = [None if w is None else w.float().requires_grad_() for w in case.weights]
    x, weight = case.x_TD.float().requires_grad_(), case.weight_N.float()
    inputs = (x, weight, *case.rows.tensors(), *(w for w in weights if w is not None))
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in inputs}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_ffn(x, weight, ExpertWeights(*weights), case.rows, activation=activation, **options)
    return sum(kept.values())


@activations
@gates
def test_what_is_kept_for_backward(activation, gated):
    """No activation keeps more than ReLU without a gate, SwiGLU with one."""
    tokens, width, hidden, experts, active = shape = (16, 8, 12, 4, 2)
    case, products = make_case(shape, gated=gated), 1 + gated
    lean = products * tokens * active * hidden
    assert kept_numbers(case, activation) == lean
    assert kept_numbers(case, activation, mode="fast") == lean + tokens * active * width
    assert kept_numbers(case, activation, masked=True) == products * tokens * experts * hidden


def test_which_activations_keep_their_input():
    assert [name for name in ACT if not saves_pre(name, gated=False)] == ["relu"]
    assert all(saves_pre(name, gated=True) for name in ACT)


def test_backward_twice_gives_the_same():
    """Backward works in place on its own tensors alone."""
    case = make_case(SHAPE)
    for options, activation in itertools.product(({}, {"masked": True}), ACT):
        x = case.x_TD.clone().requires_grad_()
        out = moe_ffn(x, case.weight_N, case.weights, case.rows, activation=activation, **options)
        first, second = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_large_pre_activations():
    z = torch.tensor([-1e4, -40.0, 40.0, 1e4])
    for activation in ACTIVATIONS.values():
        slope = torch.ones_like(z)
        activation.backward_(slope, z)
        assert torch.allclose(activation.apply(z), functional.relu(z)) and torch.allclose(slope, (z > 0).float())


def test_an_unknown_activation_is_refused():
    case = make_case(SHAPE)
    for call in (
        lambda: moe_ffn(case.x_TD, case.weight_N, case.weights, case.rows, activation="swiglu"),
        lambda: expert_ffn(case.x_TD, case.weights, case.rows, activation="swiglu"),
    ):
        with pytest.raises(ValueError, match="activation='swiglu': must be one of 'relu', 'silu', 'gelu', 'gelu_tanh'"):
            call()
