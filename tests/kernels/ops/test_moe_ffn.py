"""moe_ffn on the CPU against the plain-loop reference in fp64: outputs and every gradient."""

import pytest
import torch

from foreroute.kernels import Dropout, ExpertWeights, moe_ffn, moe_ffn_backward, moe_ffn_forward
from foreroute.kernels.testing.cases import layer_inputs, make_case, run_layer, worst_error

SHAPES = {  # tokens, width, hidden, experts, active
    "T13-D8-F12-E4-K2": (13, 8, 12, 4, 2),
    "T7-D20-F8-E5-K5": (7, 20, 8, 5, 5),
    "T5-D6-F8-E9-K1": (5, 6, 8, 9, 1),
    "T1-D4-F4-E3-K1": (1, 4, 4, 3, 1),
    "T9-D4-F4-E1-K1": (9, 4, 4, 1, 1),
    "T0-D4-F4-E3-K2": (0, 4, 4, 3, 2),
}
WAYS = {"lean": {}, "fast": {"mode": "fast"}, "masked": {"masked": True}}
USUAL = SHAPES["T13-D8-F12-E4-K2"]
way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
@pytest.mark.parametrize("dweight", [False, True], ids=["constant", "live"])
@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["plain", "dropout"])
@way
def test_equals_reference(shape, gated, dweight, rate, options):
    case = make_case(shape, gated=gated)
    tokens = torch.arange(shape[0]) * 7 + 3
    dropout = Dropout(rate, 1234567890123 * 2**20, tokens) if rate else None
    shared = {"dropout": dropout, "dweight": dweight}
    want = run_layer(moe_ffn, case, torch.float64, backend="reference", **shared)
    # fp64 leaves only the order of additions: widths are at most 20, so 1e-13 is generous
    got = run_layer(moe_ffn, case, torch.float64, **shared, **options)
    assert worst_error(got, want)[0] < 1e-13
    # fp32: eps 6e-8 times a few dozen additions, one rounding for each of three products
    got = run_layer(moe_ffn, case, torch.float32, **shared, **options)
    assert worst_error(got, want)[0] < 2e-6


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
@pytest.mark.parametrize("dweight", [False, True], ids=["constant", "live"])
@way
def test_forward_and_backward_by_hand_are_those_of_autograd(gated, dweight, options):
    case = make_case(USUAL, gated=gated)
    options = {**options, "dropout": Dropout(0.3, 5, torch.arange(USUAL[0]))}
    want = run_layer(moe_ffn, case, torch.float64, dweight=dweight, **options)
    x, weight, *weights = layer_inputs(case, torch.float64).values()
    call = x, weight, ExpertWeights(*weights), case.rows
    out, saved = moe_ffn_forward(*call, save=True, dweight=dweight, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).double()
    found = moe_ffn_backward(cotangent, *call, saved, dweight=dweight, **options)
    assert torch.equal(out, want["out"]) and torch.equal(found.x_RD, want["d_x"])
    assert torch.equal(found.weight_N, want["d_weight"]) if dweight else found.weight_N is None
    for name, gradient in zip(("w1", "b1", "w2", "b2", "w3"), found.weights, strict=True):
        assert gradient is None or torch.equal(gradient, want[f"d_{name}"])
    with pytest.raises(ValueError, match="'reference': has no backward pass of its own"):
        moe_ffn_forward(*call, save=True, dweight=dweight, backend="reference")


@way
def test_bf16(options):
    case = make_case(USUAL).rounded(torch.bfloat16)
    want = run_layer(moe_ffn, case, torch.float64, backend="reference")
    got = run_layer(moe_ffn, case, torch.bfloat16, **options)
    # bf16 rounds to 2^-9 relative; hidden units, outputs and gradients each round once or twice
    assert 1e-4 < worst_error(got, want)[0] < 2e-2


@pytest.mark.parametrize("shape", [*SHAPES.values(), (150, 8, 12, 3, 2)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
@pytest.mark.parametrize("mode", ["lean", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_products_reach_into_other_experts_rows(shape, gated, mode, dtype):
    """They take up to 31 rows more; none of it may be seen in a result."""
    case = make_case(shape, gated=gated).rounded(dtype)
    options = {"dropout": Dropout(0.3, 5, torch.arange(shape[0]))}
    want = run_layer(moe_ffn, case, torch.float64, backend="reference", **options)
    got = run_layer(moe_ffn, case, dtype, mode=mode, **options)
    assert worst_error(got, want)[0] < (3e-2 if dtype == torch.bfloat16 else 4e-3)


@way
def test_one_expert_has_everything(options):
    case = make_case((6, 4, 8, 4, 1), only_expert=2, gated=True)
    assert case.rows.counts() == [0, 0, 6, 0]
    got = run_layer(moe_ffn, case, torch.float64, **options)
    want = run_layer(moe_ffn, case, torch.float64, backend="reference")
    assert worst_error(got, want)[0] < 1e-13
    idle, busy = got["d_w3"][0], got["d_w3"][2]
    assert idle.abs().sum() == 0 and busy.abs().sum() > 0


@way
def test_negative_weights(options):
    """Nothing in the operation says that mixing weights are positive."""
    case = make_case(USUAL)
    case = case._replace(weight_N=-case.weight_N)
    for dweight in (False, True):
        got = run_layer(moe_ffn, case, torch.float64, dweight=dweight, **options)
        want = run_layer(moe_ffn, case, torch.float64, backend="reference", dweight=dweight)
        assert worst_error(got, want)[0] < 1e-13


def test_constant_weights_get_no_gradient():
    assert "d_weight" not in run_layer(moe_ffn, make_case(USUAL), torch.float32, dweight=False)


def test_backward_twice_gives_the_same():
    """Nothing saved is changed by backward."""
    case = make_case(USUAL)
    for options in WAYS.values():
        x = case.x_TD.clone().requires_grad_()
        out = moe_ffn(x, case.weight_N, case.weights, case.rows, **options)
        (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        (second,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(first, second)


@way
def test_a_wrong_row_is_seen(options):
    case = make_case(USUAL)
    want = run_layer(moe_ffn, case, torch.float64, backend="reference")
    case.rows.source_N[4] = (case.rows.source_N[4] + 1) % 13
    assert worst_error(run_layer(moe_ffn, case, torch.float64, **options), want)[0] > 1e-2


def saved_bytes(case, dtype, **options):
    """Bytes of activations kept for backward: distinct storages that are no parameter and no index."""
    leaves = [w.to(dtype).requires_grad_() for w in case.weights[:4]]
    x, weight = case.x_TD.to(dtype).requires_grad_(), case.weight_N.float()
    known = {t.untyped_storage().data_ptr() for t in (*leaves, *case.rows.tensors(), weight)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_ffn(x, weight, case.weights._make([*leaves, None]), case.rows, **options)
    return sum(kept.values())


def test_what_is_kept_for_backward():
    tokens, width, hidden, experts, active = shape = (16, 8, 12, 4, 2)
    case, rows = make_case(shape), tokens * active
    lean = 4 * (tokens * width + rows * hidden)
    assert saved_bytes(case, torch.float32) == lean
    assert saved_bytes(case, torch.float32, mode="fast") == lean + 4 * rows * width
    masked = 4 * (tokens * width + tokens * experts * hidden)
    assert saved_bytes(case, torch.float32, masked=True) == masked


def test_nothing_is_kept_without_gradients():
    case = make_case(USUAL)
    with torch.no_grad():
        assert saved_bytes(case, torch.float32) == 0
