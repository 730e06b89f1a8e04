"""Every activation on the Triton backend: its functions alone, and in a layer, against PyTorch's own functions."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from foreroute.kernels import Dropout, keep_mask, moe_ffn, row_hash, unit_hash
from foreroute.kernels.gpu.activation_kernels import activation_and_slope, activation_of
from foreroute.kernels.launching import launch, recording
from foreroute.kernels.testing.cases import make_case, run_layer, worst_error
from foreroute.kernels.tiles import Tile
from tests.references.activated_layer import ACT, activated_layer

SHAPE = (9, 9, 13, 3, 2)  # tokens, width, hidden, experts, active: nothing divides by anything
LARGE = (40, 33, 50, 4, 2)
COUNT = 1024
# NumPy's, in the interpreter: sigmoid(-142) of gelu_tanh(-12) is 1 / (1 + inf) = 0
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@triton.jit
def _activation_kernel(z_ptr, a_ptr, again_ptr, slope_ptr, ACTIVATION: tl.constexpr, COUNT: tl.constexpr):
    n = tl.arange(0, COUNT)
    z = tl.load(z_ptr + n)
    again, slope = activation_and_slope(z, ACTIVATION)
    tl.store(a_ptr + n, activation_of(z, ACTIVATION))
    tl.store(again_ptr + n, again)
    tl.store(slope_ptr + n, slope)


def values(activation, z):
    """act(z) as forward and as backward compute it, and its derivative."""
    found = [torch.empty_like(z) for _ in range(3)]
    names = dict(zip(("a_ptr", "again_ptr", "slope_ptr"), found, strict=True))
    launch(_activation_kernel, 1, Tile(1, 1, 1, 1, 1), z_ptr=z, **names, ACTIVATION=activation, COUNT=z.numel())
    return [value.cpu() for value in found]


@pytest.mark.parametrize("activation", ACT)
def test_functions(activation, device):
    z = torch.linspace(-12, 12, COUNT)
    a, again, slope = values(activation, z.to(device))
    leaf = z.double().requires_grad_()
    want = ACT[activation](leaf)
    want.sum().backward()
    assert torch.equal(a, again)
    # 1 + erf of a negative number has the absolute error of 1
    assert torch.allclose(a.double(), want.detach(), rtol=2e-6, atol=1e-6)
    assert torch.allclose(slope.double(), leaf.grad, rtol=2e-6, atol=1e-6)


def test_worked_examples(device):
    z = torch.tensor([-1.0, 0.0, 2.0, torch.nan], device=device)
    want = {
        "relu": ([0, 0, 2], [0, 0, 1]),
        "silu": ([-0.2689, 0, 1.7616], [0.0723, 0.5, 1.0908]),
        "gelu": ([-0.1587, 0, 1.9545], [-0.0833, 0.5, 1.0852]),
    }
    for activation in ACT:
        a, _, slope = values(activation, z)
        assert a[3].isnan()
        if activation in want:
            assert torch.allclose(a[:3], torch.tensor(want[activation][0]).float(), atol=6e-5)
            assert torch.allclose(slope[:3], torch.tensor(want[activation][1]).float(), atol=6e-5)


def loops(x, weight, weights, rows, *, activation, dropout):
    """The loops with the arguments of moe_ffn."""
    expert_N = rows.expert_N()
    row_N = row_hash(dropout, dropout.token_R[rows.source_N], expert_N)
    keep_NF = keep_mask(row_N, unit_hash(weights.b1_LF.shape[1]), dropout.threshold)
    return activated_layer(x, weight, weights, rows.source_N, expert_N, activation, keep_NF, dropout.scale)


def layers():
    """All in fp32 but those that test_layer.py has; half precisions, and GELU with several tiles, in the slow set."""
    kinds = {"float32": (torch.float32, 2e-6), "float16": (torch.float16, 4e-3), "bfloat16": (torch.bfloat16, 3.2e-2)}
    for shape, kind, activation, gated in itertools.product((SHAPE, LARGE), kinds, ACT, (False, True)):
        if activation == ("silu" if gated else "relu") or (
            shape == LARGE and (kind, activation) != ("float16", "gelu")
        ):
            continue
        slow = [pytest.mark.slow] if kind != "float32" else []
        name = f"{activation}-{'gated' if gated else 'plain'}-{kind}-T{shape[0]}"
        yield pytest.param(activation, gated, *kinds[kind], shape, id=name, marks=slow)


@pytest.mark.parametrize(("activation", "gated", "dtype", "bound", "shape"), list(layers()))
def test_layer_equals_loops(activation, gated, dtype, bound, shape, device):
    case = make_case(shape, gated=gated).rounded(dtype)
    tokens = torch.arange(shape[0]) * 2**33 + 3
    seed = 1234567890123 * 2**20
    want = run_layer(loops, case, torch.float64, activation=activation, dropout=Dropout(0.3, seed, tokens))
    options = {"activation": activation, "dropout": Dropout(0.3, seed, tokens.to(device))}
    with recording() as recorder:
        got = run_layer(moe_ffn, case, dtype, backend="triton", device=device, **options)
    assert worst_error(got, want)[0] < bound
    assert len(recorder.launches) == 10  # as many kernels as for ReLU


@pytest.mark.parametrize("activation", ACT)
def test_inference_equals_training(activation, device):
    """Without backward nothing is saved, and the output has the same bits."""
    x, weight, weights, rows = make_case(SHAPE)
    rows = type(rows)(*(index.to(device) for index in rows.tensors()))
    weights = weights._make(None if w is None else w.float().to(device) for w in weights)
    call = x.float().to(device), weight.float().to(device), weights, rows
    options = {"activation": activation, "backend": "triton"}
    want = moe_ffn(call[0].clone().requires_grad_(), *call[1:], **options)
    assert torch.equal(moe_ffn(*call, **options), want)
