"""kernels.ops.linear_cross_entropy against one token at a time in fp64, and PyTorch's plain way: nats and gradients."""

import doctest

import pytest
import torch
import torch.nn.functional as F

from foreroute.kernels.ops import linear_cross_entropy as module
from foreroute.kernels.ops.linear_cross_entropy import (
    chunk_tokens,
    largest_chunk,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

NAMES = ("hidden", "weight", "bias")


def inputs(t: int, d: int, v: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 * t + v)
    shapes = [(t, d), (v, d), (v,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return tensors, torch.randint(v, (t,), generator=generator)


def results(function, tensors, target, **options):
    """Nats and gradients, of a loss that something else follows."""
    out = function(*tensors, target, **options)
    assert not out.nll_T.requires_grad
    grads = torch.autograd.grad(out.loss * 0.3, tensors)
    return dict(zip(("loss", "nll", *NAMES), (out.loss.detach(), out.nll_T, *grads), strict=True))


def differences(got, want):
    return {
        name: ((got[name].double() - value).norm() / value.norm().clamp(min=1e-3)).item()
        for name, value in want.items()
    }


def assert_close(got, want, tolerance):
    for name, error in differences(got, want).items():
        assert error < tolerance, f"{name}: relative error {error:.2e}"


CASES = [
    (7, 5, 11, 3, None),  # chunks of 3, 3 and 1
    (6, 4, 13, 1, None),
    (6, 4, 13, None, None),  # one chunk
    (1, 3, 2, 5, None),
    (9, 4, 7, 2, [1, 2, 5, 6, 7]),
    (5, 4, 7, 2, []),  # no token counts
    (4, 3, 1, 2, [0, 2, 3]),  # one symbol
]


@pytest.mark.parametrize("t, d, v, chunk, counted", CASES, ids=[f"T{c[0]}-D{c[1]}-V{c[2]}-c{c[3]}" for c in CASES])
def test_fp64_equals_reference(t, d, v, chunk, counted):
    tensors, target = inputs(t, d, v)
    counted_N = None if counted is None else torch.tensor(counted, dtype=torch.int64)
    want = results(linear_cross_entropy_reference, tensors, target, scale=0.2, counted_N=counted_N)
    got = results(linear_cross_entropy, tensors, target, scale=0.2, counted_N=counted_N, chunk=chunk)
    assert_close(got, want, 1e-12)


def test_no_tokens():
    tensors, target = inputs(0, 3, 5)
    got = results(linear_cross_entropy, tensors, target, scale=1.0)
    assert got["loss"] == 0 and not any(got[name].any() for name in NAMES)


# fp32: sums of 300 terms, each rounded to 6e-8. bf16: logits and their gradients are rounded to 4e-3.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_precision(dtype, tolerance):
    """Against the plain way in fp64, from the same rounded numbers; weights' gradients add up over 10 chunks."""
    tensors, target = inputs(300, 40, 500, dtype)
    with torch.no_grad():
        tensors[1] *= 0.2
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    nll = F.cross_entropy(F.linear(*leaves), target, reduction="none")
    grads = torch.autograd.grad(nll.mean() * 0.3, leaves)
    want = dict(zip(("loss", "nll", *NAMES), (nll.mean().detach(), nll.detach(), *grads), strict=True))
    got = results(linear_cross_entropy, tensors, target, scale=1 / 300, chunk=30)
    assert got["loss"].dtype == got["nll"].dtype == torch.float32
    assert got["weight"].dtype == dtype
    assert_close(got, want, tolerance)


def test_gradcheck():
    tensors, target = inputs(5, 3, 4)
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, target, scale=0.7, chunk=2).loss, tensors)


@pytest.mark.parametrize("index", range(3), ids=NAMES)
def test_negative_control(index):
    tensors, target = inputs(7, 5, 11)
    want = results(linear_cross_entropy_reference, tensors, target, scale=0.2)
    with torch.no_grad():
        tensors[index][0] *= 1.001
    found = differences(results(linear_cross_entropy, tensors, target, scale=0.2, chunk=3), want)
    assert min(found.values()) > 1e-9


def test_no_gradient_gives_the_same_nats():
    tensors, target = inputs(9, 4, 7)
    options = {"scale": 0.5, "counted_N": torch.tensor([0, 1, 4, 8]), "chunk": 2}
    want = linear_cross_entropy(*tensors, target, **options)
    with torch.no_grad():
        got = linear_cross_entropy(*tensors, target, **options)
    assert torch.equal(got.nll_T, want.nll_T) and got.loss == want.loss


def test_large_logits_do_not_overflow():
    tensors, target = inputs(7, 5, 11, torch.float32)
    got = results(
        linear_cross_entropy, [tensors[0].detach().mul(1e4).requires_grad_(), *tensors[1:]], target, scale=1.0
    )
    assert all(value.isfinite().all() for value in got.values())


def test_only_a_chunk_of_logits_is_held(monkeypatch):
    largest = []
    of_chunk = module._of_chunk

    def counted(hidden, *arguments):
        largest.append(len(hidden))
        return of_chunk(hidden, *arguments)

    monkeypatch.setattr(module, "_of_chunk", counted)
    tensors, target = inputs(1000, 4, 7)
    linear_cross_entropy(*tensors, target, scale=1.0)
    assert largest == [250] * 4
    assert (chunk_tokens(1000, 410), chunk_tokens(0, 410), largest_chunk(32), largest_chunk(410)) == (334, 0, 256, 410)


def test_compiled_whole_it_gives_the_same_bits():
    tensors, target = inputs(9, 4, 7, torch.float32)
    options = {"scale": 0.3, "counted_N": torch.tensor([1, 2, 3, 4, 6, 7]), "chunk": 4}

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden.tanh(), weight, bias, target, **options).loss.square()

    found = []
    for call in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        found.append(torch.autograd.grad(call(*leaves), leaves))
    assert all(map(torch.equal, *found))


def test_the_operator_keeps_its_contract():
    tensors, target = inputs(9, 4, 7, torch.float32)
    torch.library.opcheck(torch.ops.foreroute.linear_cross_entropy, (*tensors, target, 0.3, None, 4, True))


def test_what_does_not_fit_is_refused():
    tensors, target = inputs(5, 3, 4)
    with pytest.raises(ValueError, match="do not fit each other"):
        linear_cross_entropy(*tensors, target[:4], scale=1.0)
    with pytest.raises(ValueError, match="do not fit each other"):
        linear_cross_entropy(tensors[0], tensors[1][:, :2], tensors[2], target, scale=1.0)
    with pytest.raises(ValueError, match="chunk=0: must be at least 1"):
        linear_cross_entropy(*tensors, target, scale=1.0, chunk=0)


def test_the_example():
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0
