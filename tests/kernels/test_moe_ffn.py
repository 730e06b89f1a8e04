"""moe_ffn on the cpu backend against the plain-loop reference in fp64: outputs and every gradient."""

import pytest
import torch

from kernels import Dropout, ExpertWeights, expert_rows, keep_mask, moe_ffn
from kernels.dropout import row_hash, unit_hash

SHAPES = {  # tokens, width, hidden, experts, active
    "T13-D8-F12-E4-K2": (13, 8, 12, 4, 2),
    "T7-D20-F8-E5-K5": (7, 20, 8, 5, 5),
    "T1-D4-F4-E3-K1": (1, 4, 4, 3, 1),
    "T9-D4-F4-E1-K1": (9, 4, 4, 1, 1),
    "T0-D4-F4-E3-K2": (0, 4, 4, 3, 2),
}


def make_case(shape, *, gated=False, only_expert=None, seed=0):
    tokens, width, hidden, experts, active = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    scores = normal(tokens, experts)
    if only_expert is not None:
        scores[:, only_expert] += 100
    expert_TK = scores.topk(active, 1).indices if tokens else torch.zeros(0, active).long()
    rows, _ = expert_rows(expert_TK, experts)
    weights = ExpertWeights(
        normal(experts, hidden, width),
        normal(experts, hidden),
        normal(experts, hidden, width),
        normal(experts, width),
        normal(experts, hidden, width) if gated else None,
    )
    return normal(tokens, width), normal(tokens * active).abs(), weights, rows


def run(case, dtype, *, dweight=True, **options):
    x, weight, weights, rows = case
    leaves = [x.to(dtype), weight.to(torch.promote_types(dtype, torch.float32))]
    leaves += [w.to(dtype) for w in weights if w is not None]
    leaves = [leaf.detach().requires_grad_(i != 1 or dweight) for i, leaf in enumerate(leaves)]
    out = moe_ffn(leaves[0], leaves[1], ExpertWeights(*leaves[2:]), rows, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    out.backward(cotangent.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def worst_error(got, want):
    errors = []
    for a, b in zip(got, want, strict=True):
        if b is None:  # the reference of zero rows touches no parameter
            assert a is None or a.abs().sum() == 0
        else:
            norm = b.double().norm()
            errors.append(((a.double() - b.double()).norm() / norm.clamp(min=1e-30)).item())
    return max(errors)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
@pytest.mark.parametrize("masked", [False, True], ids=["grouped", "masked"])
@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["plain", "dropout"])
def test_equals_reference(shape, gated, masked, rate):
    case = make_case(shape, gated=gated)
    tokens = torch.arange(shape[0]) * 7 + 3
    dropout = Dropout(rate, 1234567890123, tokens) if rate else None
    want = run(case, torch.float64, backend="reference", dropout=dropout)
    # fp64 leaves only the order of additions: widths are at most 20, so 1e-13 is generous
    got = run(case, torch.float64, masked=masked, dropout=dropout)
    assert worst_error(got, want) < 1e-13
    # fp32: eps 6e-8 times a few dozen additions, one rounding for each of three products
    got = run(case, torch.float32, masked=masked, dropout=dropout)
    assert worst_error(got, want) < 2e-6


@pytest.mark.parametrize("masked", [False, True], ids=["grouped", "masked"])
def test_bf16(masked):
    case = make_case(SHAPES["T13-D8-F12-E4-K2"])
    rounded = (*[t.bfloat16().double() for t in case[:2]], ExpertWeights(*[None if w is None else w.bfloat16().double() for w in case[2]]), case[3])  # fmt: skip
    want = run(rounded, torch.float64, backend="reference")
    got = run(rounded, torch.bfloat16, masked=masked)
    # bf16 rounds to 2^-9 relative; hidden units, outputs and gradients each round once or twice
    assert 1e-4 < worst_error(got, want) < 2e-2


@pytest.mark.parametrize("masked", [False, True], ids=["grouped", "masked"])
def test_one_expert_has_everything(masked):
    case = make_case((6, 4, 8, 4, 1), only_expert=2)
    assert case[3].counts() == [0, 0, 6, 0]
    got = run(case, torch.float64, masked=masked)
    assert worst_error(got, run(case, torch.float64, backend="reference")) < 1e-13
    assert (
        got[3][0].abs().sum() == 0 and got[3][2].abs().sum() > 0
    )  # dw1 of an idle and the busy expert


def test_constant_weights_get_no_gradient():
    case = make_case(SHAPES["T13-D8-F12-E4-K2"])
    assert run(case, torch.float32, dweight=False)[2] is None


def test_a_wrong_row_is_seen():
    case = make_case(SHAPES["T13-D8-F12-E4-K2"])
    want = run(case, torch.float64, backend="reference")
    case[3].source_N[4] = (case[3].source_N[4] + 1) % 13
    assert worst_error(run(case, torch.float64), want) > 1e-2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("b1_LF", torch.zeros(4, 11, dtype=torch.float64), "b1_LF has shape"),
        ("w2_LFD", torch.zeros(4, 12, 8), "w2_LFD is torch.float32"),
    ],
)
def test_bad_input_is_named(field, value, message):
    x, weight, weights, rows = make_case(SHAPES["T13-D8-F12-E4-K2"])
    with pytest.raises(ValueError, match=message):
        moe_ffn(x, weight, weights._replace(**{field: value}), rows)
    with pytest.raises(ValueError, match="backend='cuda'"):
        moe_ffn(x, weight, weights, rows, backend="cuda")


def test_keep_mask_is_uniform_and_uncorrelated():
    tokens, units, rate = 2000, 512, 0.1
    dropout = Dropout(rate, 42, torch.arange(tokens))
    keep = keep_mask(row_hash(dropout, dropout.token_R, 3), unit_hash(units), dropout.threshold).double()
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(keep.mean() - (1 - rate)) < 5 * sigma / (tokens * units) ** 0.5
    # each row and each column is a sample of its own: the spread of the means must be binomial
    assert keep.mean(1).std() / (sigma / units**0.5) == pytest.approx(1, abs=0.1)
    assert keep.mean(0).std() / (sigma / tokens**0.5) == pytest.approx(1, abs=0.2)
    centred = (keep - keep.mean()) / sigma
    for other in (
        centred.roll(1, 0),  # next token
        centred.roll(1, 1),  # next unit
        self_mask(tokens, units, rate, seed=43, expert=3, sigma=sigma),  # next step
        self_mask(tokens, units, rate, seed=42, expert=4, sigma=sigma),  # next expert
    ):
        assert abs((centred * other).mean()) < 5 / (tokens * units) ** 0.5


def self_mask(tokens, units, rate, *, seed, expert, sigma):
    dropout = Dropout(rate, seed, torch.arange(tokens))
    keep = keep_mask(row_hash(dropout, dropout.token_R, expert), unit_hash(units), dropout.threshold).double()
    return (keep - keep.mean()) / sigma


def test_neighbouring_seeds_share_no_row():
    """The layers of a step have neighbouring seeds; no token of one may have the mask of another token of the other."""
    tokens = torch.arange(4096)
    rows = [
        set(row_hash(Dropout(0.1, seed, tokens), tokens, 0).tolist()) for seed in range(6000, 6008)
    ]
    shared = sum(len(a & b) for i, a in enumerate(rows) for b in rows[:i])
    assert shared <= 4  # 28 pairs x 4096^2 / 2^31: 0.2 expected by chance


def test_keep_mask_depends_on_token_not_on_row_number():
    tokens = torch.tensor([5, 9, 5])
    keep = keep_mask(row_hash(Dropout(0.5, 1, tokens), tokens, 0), unit_hash(64), 0)
    assert torch.equal(keep[0], keep[2]) and not torch.equal(keep[0], keep[1])
