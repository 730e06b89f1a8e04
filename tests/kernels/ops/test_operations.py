"""expert_ffn, combine and the row copies on the CPU against their references; all operations as PyTorch operators."""

import doctest
import importlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from foreroute.kernels import (
    Dropout,
    ExpertRows,
    ExpertWeights,
    combine,
    expert_ffn,
    expert_rows,
    expert_rows_from_lists,
    moe_ffn,
    permute_rows,
    unpermute_rows,
)
from foreroute.kernels.gpu import expert_ffn as expert_ffn_launch
from foreroute.kernels.launching import recording
from foreroute.kernels.testing.cases import (
    layer_inputs,
    make_case,
    padded,
    relative_error,
    run_layer,
    run_with_gradients,
    worst_error,
)

SHAPE = (13, 8, 12, 4, 2)
PARTIAL = [[0, 2], [], [1], [2, 1, 0], []]  # an expert rank's rows: none to three local experts each


def ffn_function(rows, **options):
    def call(x, **weights):
        return expert_ffn(x, ExpertWeights(*weights.values()), rows, **options)

    return call


def ffn_inputs(case, dtype):
    inputs = layer_inputs(case, dtype)
    del inputs["weight"]
    return inputs


@pytest.mark.parametrize("name", ["combine", "expert_ffn", "moe_ffn", "permute"])
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(f"foreroute.kernels.ops.{name}"))
    assert result.attempted > 3 and result.failed == 0


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
@pytest.mark.parametrize("mode", ["lean", "fast"])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_expert_ffn_equals_reference(gated, mode, rate):
    case = make_case(SHAPE, gated=gated)
    dropout = Dropout(rate, 77, torch.arange(13), first_expert=5) if rate else None
    function = ffn_function(case.rows, mode=mode, dropout=dropout)
    reference = ffn_function(case.rows, backend="reference", dropout=dropout)
    want = run_with_gradients(reference, ffn_inputs(case, torch.float64))
    got = run_with_gradients(function, ffn_inputs(case, torch.float64))
    assert worst_error(got, want)[0] < 1e-13


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_combine_of_partial_rows_equals_reference(weighted, dtype):
    rows = expert_rows_from_lists(PARTIAL, 3)
    rows.validate()
    wide = torch.promote_types(dtype, torch.float32)
    y = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.rand(6, generator=torch.Generator().manual_seed(2)).to(wide)
    inputs = {"y_ND": y, "weight_N": weight if weighted else None}

    def call(backend):
        return run_with_gradients(lambda y_ND, weight_N: combine(y_ND, weight_N, rows, backend=backend), inputs)

    got, want = call("cpu"), call("reference")
    assert got["out"][1].abs().sum() == 0  # no expert rows
    # bf16: the weight and the sum are each rounded to 2^-9
    assert worst_error(got, want)[0] < (1e-14 if dtype == torch.float64 else 8e-3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.complex64, torch.uint16])
def test_row_copies_of_any_dtype(dtype):
    x = torch.arange(40).view(8, 5).to(dtype)
    index = torch.tensor([7, 0, 3, 1])
    assert torch.equal(permute_rows(x, index), x[index])
    back = unpermute_rows(permute_rows(x, index), index, 8)
    want = torch.zeros_like(x)
    for row in index.tolist():
        want[row] = x[row]
    assert torch.equal(back, want)
    assert torch.equal(back, unpermute_rows(x[index], index, 8, backend="reference"))


def test_gradients_of_row_copies_add_up_over_repeats():
    index = torch.tensor([2, 0, 2, 2])
    x = torch.arange(12.0, dtype=torch.float64).view(4, 3)

    def call(backend):
        return run_with_gradients(lambda x_RD: permute_rows(x_RD, index, backend=backend), {"x_RD": x})

    got, want = call("cpu"), call("reference")
    assert worst_error(got, want)[0] < 1e-15
    assert got["d_x_RD"][1].abs().sum() == 0 and got["d_x_RD"][2].abs().sum() > 0


def test_cast_on_the_way():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    index = torch.tensor([5, 4, 3, 2, 1, 0])
    got = run_with_gradients(lambda x_RD: permute_rows(x_RD, index, dtype=torch.bfloat16), {"x_RD": x})
    assert torch.equal(got["out"], x.flip(0).bfloat16()) and got["d_x_RD"].dtype == torch.float32
    back = unpermute_rows(got["out"], index, 6, dtype=torch.float32)
    assert torch.equal(back, x.bfloat16().float())
    often = torch.zeros(64, dtype=torch.int64)
    got = run_with_gradients(lambda x_RD: permute_rows(x_RD, often, dtype=torch.bfloat16), {"x_RD": x})
    cotangent = torch.randn(64, 4, generator=torch.Generator().manual_seed(9)).bfloat16()
    assert relative_error(got["d_x_RD"][0], cotangent.double().sum(0)) < 1e-6  # added up in fp32


def operator_arguments(*, gated=True, grad=True):
    case = make_case(SHAPE, gated=gated)
    x, weight, *weights = layer_inputs(case, torch.float32).values()
    weights = [w.requires_grad_(grad) for w in weights if w is not None]
    x, weight = x.requires_grad_(grad), weight.requires_grad_(grad)
    return x, weight, weights, list(case.rows.tensors())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # PyTorch 2.14's
@pytest.mark.parametrize(
    ("activation", "gated"), [("relu", False), ("silu", True), pytest.param("gelu", False, marks=pytest.mark.slow)]
)
def test_opcheck(activation, gated):
    """PyTorch's own test of operators: schema, fakes, autograd registration, tracing with symbolic shapes."""
    x, weight, weights, rows = operator_arguments(gated=gated)
    dropout = torch.arange(13), torch.tensor([7, -3], dtype=torch.int32), 0.3, 0
    ops = torch.ops.foreroute
    how = activation, "cpu", "lean", "ieee"
    torch.library.opcheck(ops.ffn, (x, None, weights, rows, *dropout, True, False, False, *how))
    torch.library.opcheck(
        ops.ffn, (x, None, weights, rows, *dropout, True, False, False, activation, "cpu", "fast", "ieee")
    )
    for masked in (False, True):
        torch.library.opcheck(ops.ffn, (x, weight, weights, rows, *dropout, True, True, masked, *how))
    y = torch.randn(26, 8, requires_grad=True)
    torch.library.opcheck(ops.combine, (y, weight, rows, "cpu"))
    index = torch.tensor([3, 1, 3])
    torch.library.opcheck(ops.permute_rows, (x, index, torch.bfloat16, "cpu"))
    distinct = torch.tensor([3, 1, 5, 0])
    y = torch.randn(4, 8, requires_grad=True)
    torch.library.opcheck(ops.unpermute_rows, (y, distinct, 6, torch.float32, "cpu"))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["lean", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_no_bit(dtype, mode, masked):
    case = make_case((16, 8, 12, 4, 2), gated=masked)
    options = {"mode": mode, "masked": masked}
    want = run_layer(moe_ffn, case, dtype, dweight=False, dropout=Dropout(0.3, 5, torch.arange(16)), **options)
    longer = case._replace(
        x_TD=F.pad(case.x_TD, (0, 0, 0, 3)), weight_N=F.pad(case.weight_N, (0, 20)), rows=padded(case.rows, 20, 3)
    )
    longer.rows.validate()
    dropout = Dropout(0.3, 5, F.pad(torch.arange(16), (0, 3)))
    got = run_layer(moe_ffn, longer, dtype, dweight=False, dropout=dropout, **options)
    assert masked or (not got["out"][16:].any() and not got["d_x"][16:].any())
    got = {name: value[:16] if name in ("out", "d_x") else value for name, value in got.items()}
    for name, value in want.items():
        if masked:  # products of more rows may add up in another order
            assert torch.allclose(got[name], value, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5), name
        else:
            assert torch.equal(got[name], value), name


def test_padding_that_contradicts_itself_is_seen():
    rows = make_case(SHAPE).rows
    wrong = padded(rows, 2)
    for changed, message in (
        ({"slot_offset_R": wrong.slot_offset_R - 1}, "must add up to 28"),
        ({"slot_N": wrong.slot_N.roll(-1)}, "begins with an expert row below 26"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(wrong, **changed).validate()
    with pytest.raises(ValueError, match="must add up to 24 expert rows"):
        short = replace(rows, slot_offset_R=rows.slot_offset_R + 2)
        moe_ffn(
            torch.zeros(13, 8),
            torch.zeros(26),
            ExpertWeights(*(w.float() for w in make_case(SHAPE).weights[:4])),
            short,
        )


def compiled_and_eager(function, *inputs):
    results = []
    for call in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        call(*leaves).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    return results


@pytest.mark.parametrize("options", [{}, {"mode": "fast", "activation": "gelu"}, {"masked": True}], ids=str)
def test_compiled_layer_equals_eager(options):
    x, weight, weights, rows = operator_arguments(gated=False)
    dropout = Dropout(0.2, 5, torch.arange(13))

    def layer(x, weight, *weights):
        return moe_ffn(x, weight, ExpertWeights(*weights), ExpertRows(*rows), dropout=dropout, **options)

    compiled, eager = compiled_and_eager(layer, x, weight, *weights)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


def test_compiled_parts_equal_eager():
    x, weight, weights, rows = operator_arguments()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))

    def layer(x, weight, *weights):
        back = unpermute_rows(permute_rows(x, order), order, 13)
        y = expert_ffn(back, ExpertWeights(*weights), ExpertRows(*rows))
        return combine(y, weight, ExpertRows(*rows))

    compiled, eager = compiled_and_eager(layer, x, weight, *weights)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
    want = run_layer(moe_ffn, make_case(SHAPE, gated=True), torch.float32)["out"]
    assert torch.allclose(layer(x, weight, *weights), want, rtol=1e-5, atol=1e-5)


def test_the_public_call_reads_nothing_back():
    """Fake tensors hold no data: a read-back (.item(), .tolist()) in checks, fakes or autograd would raise."""
    real = make_case(SHAPE)
    inputs = layer_inputs(real, torch.float32)
    with FakeTensorMode():
        x, weight, w1, b1, w2, b2 = (torch.empty(v.shape).requires_grad_() for v in inputs.values() if v is not None)
        rows = ExpertRows(*(torch.empty(t.shape, dtype=t.dtype) for t in real.rows.tensors()))
        out = moe_ffn(x, weight, ExpertWeights(w1, b1, w2, b2), rows)
        out.sum().backward()
        assert w1.grad.shape == w1.shape
        with pytest.raises(Exception, match="_local_scalar_dense"):  # the mode does catch it
            out.sum().item()


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
def test_the_triton_launchers_read_nothing_back(gated):
    """Meta tensors hold no data either, and reach everything down to the launches; forward and backward."""
    case = make_case(SHAPE, gated=gated)
    meta = [None if w is None else w.float().to("meta") for w in case.weights]
    rows = ExpertRows(*(t.to("meta") for t in case.rows.tensors()))
    x, weight, weights = case.x_TD.float().to("meta"), case.weight_N.float().to("meta"), ExpertWeights._make(meta)
    dropout = Dropout(0.1, 1, torch.empty(13, dtype=torch.int64, device="meta"))
    with recording(run=False, arch="sm_90") as recorder:
        options = {"activation": "gelu", "precision": "ieee"}
        y, saved = expert_ffn_launch.ffn_forward_triton(x, weights, rows, dropout, save=True, **options)
        grads = expert_ffn_launch.ffn_backward_triton(
            x, x, weights, rows, dropout, saved, weight_N=weight, dweight=True, **options
        )
    assert y.shape == (26, 8) and grads.weight_N.shape == (26,) and len(recorder.launches) == 9


@pytest.mark.parametrize("options", [{}, {"mode": "fast"}, {"masked": True}], ids=str)
@pytest.mark.parametrize("dweight", [True, False])
@pytest.mark.parametrize("negative", [1, 26])
def test_weights_may_be_negative(options, dweight, negative):
    """One of them, or all: then a hidden unit times its weight no longer says whether ReLU let it through."""
    case = make_case(SHAPE)
    sign_N = torch.ones(26, dtype=torch.float64)
    sign_N[:negative] = -1
    case = case._replace(weight_N=case.weight_N * sign_N)
    want = run_layer(moe_ffn, case, torch.float64, backend="reference", dweight=dweight)
    got = run_layer(moe_ffn, case, torch.float64, dweight=dweight, **options)
    assert worst_error(got, want)[0] < 1e-12


def test_fp16_underflow_of_weighted_units():
    """Hidden units times their weight may be 0 in fp16 where neither is."""
    case = make_case((60, 8, 12, 4, 3))
    small = case.weights._replace(w1_LFD=case.weights.w1_LFD * 1e-4, b1_LF=case.weights.b1_LF * 0)
    case = case._replace(weights=small, weight_N=case.weight_N * 0 + 0.01).rounded(torch.float16)
    want = run_layer(moe_ffn, case, torch.float64, backend="reference", dweight=False)
    got = run_layer(moe_ffn, case, torch.float16, masked=True, dweight=False)
    assert relative_error(got["d_x"], want["d_x"]) < 3e-3


@pytest.mark.parametrize("options", [{}, {"masked": True}], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
def test_autocast_changes_nothing(options, gated):
    case = make_case(SHAPE, gated=gated)
    want = run_layer(moe_ffn, case, torch.float32, **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = run_layer(moe_ffn, case, torch.float32, **options)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_all_units_may_be_dropped():
    case = make_case(SHAPE)
    dropout = Dropout(1 - 2**-40, 1, torch.arange(13))
    want = run_layer(moe_ffn, case, torch.float64, backend="reference", dropout=dropout)
    assert worst_error(run_layer(moe_ffn, case, torch.float64, dropout=dropout), want)[0] < 1e-13


def bad_rows(**changes):
    rows = make_case(SHAPE).rows
    fields = dict(zip(("source_N", "offset_L", "slot_N", "slot_offset_R"), rows.tensors(), strict=True))
    return ExpertRows(**{name: changes.get(name, value.clone()) for name, value in fields.items()})


X, W, WEIGHTS, ROWS = make_case(SHAPE)
BAD = {  # what is changed: arguments of moe_ffn, and the line that must name it
    "shape": (
        {"weights": WEIGHTS._replace(b1_LF=torch.zeros(4, 11).double())},
        r"b1_LF has shape \(4, 11\): must be \(4, 12\)",
    ),
    "dtype": (
        {"weights": WEIGHTS._replace(w2_LFD=WEIGHTS.w2_LFD.float())},
        "w2_LFD is torch.float32: must be torch.float64",
    ),
    "kind": ({"x_RD": X.int()}, "x_RD is torch.int32: must be"),
    "stride": ({"x_RD": X.t().contiguous().t()}, r"x_RD has strides \(1, 13\): must be contiguous"),
    "device": ({"weight_N": W.to("meta")}, "weight_N is on meta: must be on cpu"),
    "weights": ({"weight_N": W.float()}, "weight_N is torch.float32: must be torch.float64"),
    "tokens": ({"dropout": Dropout(0.1, 1, torch.arange(12))}, r"dropout.token_R has shape \(12,\)"),
    "rate": ({"dropout": Dropout(1.0, 1, torch.arange(13))}, r"dropout.rate=1.0: must be in \[0, 1\)"),
    "backend": ({"backend": "cuda"}, "backend='cuda': must be one of 'cpu', 'triton', 'reference'"),
    "no gpu": ({"backend": "triton"}, "backend='triton': the tensors are on cpu"),
    "mode": ({"mode": "small"}, "mode='small': must be one of 'lean', 'fast'"),
    "precision": ({"precision": "tf32"}, "precision='tf32': backend 'cpu' has only 'ieee'"),
    "index type": (
        {"rows": bad_rows(source_N=ROWS.source_N.int())},
        "rows.source_N is torch.int32: must be torch.int64",
    ),
    "index": (
        {"rows": bad_rows(source_N=ROWS.source_N.clone().fill_(13)), "debug": True},
        "rows.source_N holds 13: must be from 0 to 12",
    ),
    "slots": (
        {"rows": bad_rows(slot_N=ROWS.slot_N.flip(0)), "debug": True},
        "rows.slot_N does not list the expert rows",
    ),
    "twice": (
        {"rows": bad_rows(slot_N=ROWS.slot_N.clone().fill_(0)), "debug": True},
        "rows.slot_N lists an expert row twice",
    ),
    "pair twice": (
        {"rows": bad_rows(source_N=ROWS.source_N.clone().fill_(3)), "debug": True},
        "rows.source_N has a token row twice within one expert",
    ),
    "end": ({"rows": bad_rows(offset_L=ROWS.offset_L - 1)}, r"rows.offset_L counts \[.*must add up to 26 expert rows"),
    "missing": ({"weights": WEIGHTS._replace(b2_LD=None)}, "b2_LD is None: only w3_LFD may be left out"),
    "no width": ({"weights": WEIGHTS._replace(w1_LFD=WEIGHTS.w1_LFD[:, :0])}, "widths must be at least 1"),
    "no weights": ({"weight_N": None}, "weight_N is a NoneType: must be a tensor"),
    "no w1": ({"weights": WEIGHTS._replace(w1_LFD=None)}, "w1_LFD is None"),
    "a list": ({"weights": list(WEIGHTS)}, "weights is a list: must be ExpertWeights"),
    "a pair": ({"rows": (ROWS, None)}, "rows is a tuple: must be ExpertRows"),
    "a rate": ({"dropout": 0.1}, r"dropout is a float: must be Dropout\(rate, seed, token_R\)"),
    "a seed": ({"dropout": Dropout(0.1, "5", torch.arange(13))}, "seed a whole number or its words"),
    "words of a seed": ({"dropout": Dropout(0.1, torch.arange(2), torch.arange(13))}, r"dropout\.seed is torch\.int64"),
    "fast": ({"mode": "fast", "backend": "reference"}, "mode='fast': backend 'reference' has only 'lean'"),
    "masked": ({"masked": True, "backend": "reference"}, "masked=True: backend 'reference'"),
    "counts": ({"rows": bad_rows(offset_L=ROWS.offset_L.flip(0)), "debug": True}, "rows.offset_L=.*must not decrease"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(changes, message):
    good = {"x_RD": X, "weight_N": W, "weights": WEIGHTS, "rows": ROWS}
    moe_ffn(**good, debug=True)
    arguments = {**good, **changes}
    with pytest.raises(ValueError, match=message):
        moe_ffn(**arguments)


def test_bad_input_of_the_other_operations_is_named():
    index = torch.tensor([0, 13])
    for call, message in (
        (lambda: permute_rows(X, index, debug=True), "index_M holds 13: must be from 0 to 12"),
        (lambda: permute_rows(X, index.int()), "index_M is torch.int32"),
        (lambda: permute_rows(X.to(torch.complex128), index), "x_RD is torch.complex128"),
        (lambda: permute_rows(X.long(), index, dtype=torch.float32), "dtype=torch.float32: x_RD is torch.int64"),
        (lambda: unpermute_rows(X[:2], index.fill_(1), 5, debug=True), r"index_M=\[1, 1\]: must not repeat"),
        (lambda: unpermute_rows(X, index, 20), r"index_M has shape \(2,\): must be \(13,\)"),
        (lambda: unpermute_rows(X[:2], index, -1), "num_rows=-1: must be from 0"),
        (lambda: combine(X[0], None, ROWS), r"y_ND has shape \(8,\): must have two dimensions"),
        (lambda: combine(X, None, ROWS), r"y_ND has shape \(13, 8\): must be \(26, 8\)"),
        (lambda: expert_ffn(X[:5], WEIGHTS, ROWS), r"x_RD has shape \(5, 8\): must be \(13, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_choices_out_of_range_are_refused():
    for choices, message in (
        (torch.tensor([[0, 4]]), "expert_RK holds 4: must be from 0 to 3"),
        (torch.tensor([[-1, 2]]), "expert_RK holds -1: must be from 0 to 3"),
        (torch.tensor([[0.5, 2]]), "expert_RK is torch.float32 of shape"),
        (torch.tensor([0, 2]), r"of shape \(2,\): must be whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            expert_rows(choices, 4)
    for experts in ([[0], [2]], [[-1]], [[1, 1]]):
        with pytest.raises(ValueError, match="must be distinct, from 0 to 1"):
            expert_rows_from_lists(experts, 2)


def test_more_rows_than_int32_are_refused():
    many = torch.empty(0, dtype=torch.int64, device="meta").expand(0)
    huge = torch.empty(2**31, dtype=torch.int64, device="meta")
    rows = ExpertRows(huge, many.int(), huge, many)
    with pytest.raises(ValueError, match=r"rows\.num_rows=2147483648: must be at most 2147482624"):
        combine(torch.empty(2**31, 1, device="meta"), None, rows)
