"""Every operation on the Triton backend against the plain-loop reference in fp64: outputs and every gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from foreroute.engine.testing.read_backs import ReadBacks
from foreroute.kernels import (
    Dropout,
    ExpertRows,
    ExpertWeights,
    combine,
    expert_ffn,
    expert_rows_from_lists,
    moe_ffn,
    permute_rows,
    unpermute_rows,
)
from foreroute.kernels.dropout import seed_words
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

LARGEST = "T37-D20-F40-L5-K3"
SHAPES = {  # tokens, width, hidden, experts, active: nothing divides by anything
    LARGEST: (37, 20, 40, 5, 3),
    "T13-D9-F13-L4-K2": (13, 9, 13, 4, 2),
    "T5-D6-F8-L9-K1": (5, 6, 8, 9, 1),
    "T7-D33-F17-L3-K3": (7, 33, 17, 3, 3),
    "T1-D4-F4-L3-K1": (1, 4, 4, 3, 1),
    "T9-D4-F4-L1-K1": (9, 4, 4, 1, 1),
    "T0-D4-F4-L3-K2": (0, 4, 4, 3, 2),
}
LARGE = {  # every expert and every dimension has several tiles of the interpreter, the last one in part
    "T60-D36-F50-L4-K2": (60, 36, 50, 4, 2),
    "T130-D33-F48-L5-K1": (130, 33, 48, 5, 1),
    "T22-D34-F66-L6-K6": (22, 34, 66, 6, 6),
}
# fp32: 2^-24 times a few dozen additions and three products. Half types: inputs are rounded before, so what remains is
# the rounding of hidden units, outputs and gradients, each 2^-12 (fp16) or 2^-9 (bf16) at most, a few in a row; with
# one token the gradient of its mixing weight is one number, the difference of larger ones.
BOUNDS = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
floats = pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def check_layer(shape, dtype, device, *, gated, rate=0.0, dweight=True, only_expert=None):
    case = make_case(shape, gated=gated, only_expert=only_expert).rounded(dtype)
    tokens = torch.arange(shape[0]) * 2**33 + 3
    options = {"dweight": dweight}
    if rate:
        options["dropout"] = Dropout(rate, 1234567890123 * 2**20, tokens, first_expert=6)
    want = run_layer(moe_ffn, case, torch.float64, backend="reference", **options)
    if rate:
        options["dropout"] = Dropout(rate, 1234567890123 * 2**20, tokens.to(device), first_expert=6)
    got = run_layer(moe_ffn, case, dtype, backend="triton", device=device, **options)
    assert worst_error(got, want)[0] < BOUNDS[dtype] * (4 if shape[0] == 1 else 1)
    return got


def layers():
    """Yield every combination in fp32, the largest shape without dropout in the slow set. The half precisions share
    their code with fp32 but for the casts: gated layers with dropout have every shape, and each other one two shapes,
    by turns, in the slow set."""
    activations, rates = {"relu": False, "swiglu": True}, {"plain": 0.0, "dropout": 0.3}
    turn = itertools.cycle([name for name in SHAPES if name != LARGEST])
    for dtype, rate, activation in itertools.product(BOUNDS, rates, activations):
        if dtype is torch.float32:
            names, slow = list(SHAPES), {LARGEST} if rate == "plain" else set()
        elif (rate, activation) == ("dropout", "swiglu"):
            names, slow = list(SHAPES), {LARGEST} if dtype is torch.float16 else set()
        else:
            names = [next(turn), next(turn)]
            slow = set(names)
        for shape in names:
            yield pytest.param(
                SHAPES[shape],
                activations[activation],
                rates[rate],
                dtype,
                id=f"{str(dtype).removeprefix('torch.')}-{rate}-{activation}-{shape}",
                marks=[pytest.mark.slow] if shape in slow else [],
            )


@pytest.mark.parametrize(("shape", "gated", "rate", "dtype"), list(layers()))
def test_layer_equals_reference(shape, gated, rate, dtype, device):
    check_layer(shape, dtype, device, gated=gated, rate=rate)


def large_layers():
    """Yield each shape once, and both activations and precisions; test_the_tiles_of_real_chips has fp16 with a gate."""
    kinds = (torch.float32, False), (torch.float16, False), (torch.float32, True)
    for (name, shape), (dtype, gated) in zip(LARGE.items(), kinds, strict=True):
        kind = str(dtype).removeprefix("torch.")
        yield pytest.param(shape, gated, dtype, id=f"{kind}-{'swiglu' if gated else 'relu'}-{name}")


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "gated", "dtype"), list(large_layers()))
def test_large_layer_equals_reference(shape, gated, dtype, device):
    check_layer(shape, dtype, device, gated=gated, rate=0.2)


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
def test_skewed_loads_and_idle_experts(gated, device):
    got = check_layer((40, 8, 12, 5, 1), torch.float32, device, gated=gated, only_expert=3)
    assert all(got["d_w1"][e].abs().sum() == 0 for e in (0, 1, 2, 4))
    check_layer((40, 8, 12, 5, 2), torch.float32, device, gated=gated, only_expert=0)


def test_constant_weights_get_no_gradient_and_no_kernel(device):
    with recording() as recorder:
        got = check_layer((13, 8, 12, 4, 2), torch.float32, device, gated=False, dweight=False)
    assert "d_weight" not in got
    assert "_dweight_kernel" not in [launch.name for launch in recorder.launches]


def test_which_kernels_run(device):
    def names(gated):
        with recording() as recorder:
            run_layer(
                moe_ffn, make_case((13, 8, 12, 4, 2), gated=gated), torch.float32, backend="triton", device=device
            )
        return [launch.name.strip("_").removesuffix("_kernel") for launch in recorder.launches]

    forward = ["tile_map", "up", "down", "combine"]
    backward = ["down_backward", "dweight", "down", "weights", "weights", "combine"]
    assert names(False) == names(True) == forward + backward


@pytest.mark.gpu  # an interpreter runs programs one behind the other: it repeats whatever they do
def test_the_same_bits_every_time(device):
    case = make_case((37, 20, 40, 5, 3), gated=True)
    first, second = (run_layer(moe_ffn, case, torch.float16, backend="triton", device=device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "gfx942"])
def test_the_tiles_of_real_chips(gated, arch, device):
    """Nothing is timed here: the table's large tiles must give the same results as the interpreter's small ones."""
    with recording(arch=arch) as recorder:
        check_layer((150, 72, 136, 2, 1), torch.float16, device, gated=gated, rate=0.2)
    assert max(launch.arguments.get("BLOCK_M", 0) for launch in recorder.launches) >= 64


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
def test_nan_is_not_hidden(gated, device):
    """A destroyed weight must be visible in the loss and in every gradient, as on the CPU backend."""
    case = make_case((13, 8, 12, 4, 2), gated=gated)
    case.weights.w1_LFD.fill_(float("nan"))
    got = run_layer(moe_ffn, case, torch.float32, backend="triton", device=device)
    want = run_layer(moe_ffn, case, torch.float32)
    for name, value in want.items():
        assert torch.equal(value.isnan(), got[name].cpu().isnan()), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes bf16")
def test_bf16_is_refused_where_the_interpreter_would_be_wrong(device):
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16: Triton's interpreter"):
        run_layer(moe_ffn, make_case((5, 8, 8, 2, 1)), torch.bfloat16, backend="triton")


def test_a_wrong_index_is_seen(device):
    case = make_case((13, 8, 12, 4, 2))
    want = run_layer(moe_ffn, case, torch.float64, backend="reference")
    case.rows.source_N[4] = (case.rows.source_N[4] + 1) % 13
    got = run_layer(moe_ffn, case, torch.float32, backend="triton", device=device)
    assert worst_error(got, want)[0] > 1e-2


def test_a_wrong_mask_is_seen(device):
    case = make_case((13, 8, 12, 4, 2))
    tokens = torch.arange(13)
    want = run_layer(moe_ffn, case, torch.float64, backend="reference", dropout=Dropout(0.3, 1, tokens))
    dropout = Dropout(0.3, 2, tokens.to(device))
    got = run_layer(moe_ffn, case, torch.float32, backend="triton", device=device, dropout=dropout)
    assert worst_error(got, want)[0] > 1e-2


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["plain", "dropout"])
@floats
def test_expert_ffn_equals_reference(gated, rate, dtype, device):
    case = make_case((23, 20, 24, 4, 2), gated=gated).rounded(dtype)

    def function(backend, where):
        rows = ExpertRows(*(index.to(where) for index in case.rows.tensors()))
        dropout = Dropout(rate, 5, torch.arange(23).to(where)) if rate else None

        def call(x, **weights):
            return expert_ffn(x, ExpertWeights(*weights.values()), rows, backend=backend, dropout=dropout)

        return call

    def inputs(kind, where):
        return {n: v for n, v in layer_inputs(case, kind, where).items() if n != "weight"}

    want = run_with_gradients(function("reference", "cpu"), inputs(torch.float64, "cpu"))
    got = run_with_gradients(function("triton", device), inputs(dtype, device))
    assert worst_error(got, want)[0] < BOUNDS[dtype]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("width", [5, 64, 1500])
@floats
def test_combine_of_partial_rows_equals_reference(weighted, width, dtype, device):
    rows = expert_rows_from_lists([[0, 2], [], [1], [2, 1, 0], []], 3)
    generator = torch.Generator().manual_seed(1)
    y, weight = torch.randn(6, width, generator=generator).to(dtype), torch.rand(6, generator=generator)

    def run(backend, where, kind):
        index = ExpertRows(*(t.to(where) for t in rows.tensors()))
        wide = torch.promote_types(kind, torch.float32)
        inputs = {"y": y.to(where, kind), "weight": weight.to(where, wide) if weighted else None}
        return run_with_gradients(lambda y, weight: combine(y, weight, index, backend=backend), inputs)

    got, want = run("triton", device, dtype), run("reference", "cpu", torch.float64)
    assert got["out"][1].abs().sum() == 0
    assert worst_error(got, want)[0] < BOUNDS[dtype] / 8


COPIED = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.complex64, torch.float64)


@pytest.mark.parametrize("dtype", COPIED, ids=str)
@pytest.mark.parametrize("width", [5, 64, 3000])
def test_row_copies_of_any_dtype(dtype, width, device):
    x = torch.arange(8 * width).view(8, width).to(device, dtype)
    index = torch.tensor([7, 0, 3, 1], device=device)
    assert torch.equal(permute_rows(x, index, backend="triton"), x[index])
    back = unpermute_rows(x[index], index, 8, backend="triton")
    assert torch.equal(back[index], x[index]) and not back[[2, 4, 5, 6]].any()
    order = torch.tensor([7, 0, 3, 1, 2, 6, 5, 4], device=device)
    there = permute_rows(x, order, backend="triton")
    assert torch.equal(unpermute_rows(there, order, 8, backend="triton"), x)


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_cast_on_the_way(to, device):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 40, generator=generator).to(device)
    index = torch.tensor([5, 4, 5, 0], device=device)

    def copy(x):
        return permute_rows(x, index, dtype=to, backend="triton")

    got = run_with_gradients(copy, {"x": x})
    assert torch.equal(got["out"], x[index].to(to))
    cotangent = torch.randn(4, 40, generator=torch.Generator().manual_seed(9)).to(to).double()
    want = torch.zeros(6, 40).double().index_add(0, index.cpu(), cotangent)
    assert got["d_x"].dtype == torch.float32 and relative_error(got["d_x"], want) < 1e-7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: tensor cores round to tf32")
def test_tf32(device):
    case = make_case((300, 64, 96, 4, 2))
    want = run_layer(moe_ffn, case, torch.float64, backend="reference")
    got = run_layer(moe_ffn, case, torch.float32, backend="triton", device=device, precision="tf32")
    # 10 bits of mantissa: 2^-11 for each operand, averaged over the contraction
    assert 1e-5 < worst_error(got, want)[0] < 2e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 12 GB")
def test_offsets_beyond_int32():
    """Rows times width passes 2^31 numbers."""
    rows, width = 2**31 // 1024 + 64, 1024
    x = (torch.arange(rows, device="cuda") % 30011).short()[:, None].repeat(1, width)
    index = torch.arange(rows, device="cuda").flip(0)
    assert torch.equal(permute_rows(x, index, backend="triton"), x.flip(0))
    each = torch.arange(rows, device="cuda")
    ends = torch.tensor([rows], dtype=torch.int32, device="cuda")
    y = x.half()  # whole numbers up to 2048 are exact
    out = combine(y, None, ExpertRows(index, ends, index, each), backend="triton")
    assert torch.equal(out, y.flip(0))


def test_unaligned_memory_is_refused(device):
    case = make_case((13, 8, 12, 4, 2))
    x, weight, *weights = layer_inputs(case, torch.float32, device).values()
    rows = ExpertRows(*(t.to(device) for t in case.rows.tensors()))
    shifted = torch.zeros(13 * 8 + 1, device=device)[1:].view(13, 8)
    with pytest.raises(ValueError, match="x_RD starts at an address that is no multiple of 16"):
        moe_ffn(shifted, weight, ExpertWeights(*weights), rows, backend="triton")
    with pytest.raises(ValueError, match=r"x_RD is torch\.float64: must be torch\.float32 or"):
        moe_ffn(case.x_TD.to(device), case.weight_N.to(device), case.weights, rows, backend="triton")
    with pytest.raises(ValueError, match="masked=True: backend 'triton'"):
        moe_ffn(x, weight, ExpertWeights(*weights), rows, backend="triton", masked=True)
    with pytest.raises(ValueError, match="mode='fast': backend 'triton' has only 'lean'"):
        moe_ffn(x, weight, ExpertWeights(*weights), rows, backend="triton", mode="fast")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # PyTorch 2.14's
def test_operator_and_compilation(device):
    case = make_case((13, 8, 12, 4, 2), gated=True)
    x, weight, *weights = (v.requires_grad_() for v in layer_inputs(case, torch.float32, device).values())
    rows = [t.to(device) for t in case.rows.tensors()]
    words = torch.tensor([7, -3], dtype=torch.int32, device=device)
    how = (torch.arange(13, device=device), words, 0.3, 0, True, True, False, "gelu", "triton", "lean", "ieee")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.foreroute.ffn, (x, weight, weights, rows, *how), test_utils=tests)

    def layer(x):
        return moe_ffn(x, weight, ExpertWeights(*weights), ExpertRows(*rows), backend="triton")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
def test_padding_changes_no_bit(device, gated):
    """20 expert rows and 3 input rows more, which no sum has in it."""
    case = make_case((16, 8, 12, 4, 2), gated=gated)
    plain = {"backend": "triton", "device": device, "dweight": False}
    dropout = Dropout(0.3, 5, torch.arange(16, device=device))
    want = run_layer(moe_ffn, case, torch.float32, dropout=dropout, **plain)
    longer = case._replace(
        x_TD=F.pad(case.x_TD, (0, 0, 0, 3)), weight_N=F.pad(case.weight_N, (0, 20)), rows=padded(case.rows, 20, 3)
    )
    dropout = Dropout(0.3, 5, F.pad(dropout.token_R, (0, 3)))
    got = run_layer(moe_ffn, longer, torch.float32, dropout=dropout, **plain)
    assert not got["out"][16:].any() and not got["d_x"][16:].any()
    got = {name: value[:16] if name in ("out", "d_x") else value for name, value in got.items()}
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_host_of_a_layer_reads_nothing_back(rate):
    """Forward and backward as on a GPU; kernels are launched into nothing. The CPU's products do read (control)."""
    shape = SHAPES[LARGEST]
    case = make_case(shape, gated=True)
    seed = torch.tensor(seed_words(5), dtype=torch.int32)  # of a plan; a number would be sent in the step
    dropout = Dropout(rate, seed, torch.arange(shape[0]), first_expert=2) if rate else None
    with recording(run=False) as recorder, ReadBacks(refuse=True):
        run_layer(moe_ffn, case, torch.float32, backend="triton", dropout=dropout)
    assert len(recorder.launches) >= 4
    with ReadBacks() as seen:
        run_layer(moe_ffn, case, torch.float32, backend="cpu", dropout=dropout)
    assert {place for _, place in seen.found} == {"kernels/expert_index.py:counts"}
