"""kernels.relative_attention against one query at a time in fp64, forward and every gradient."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from foreroute.kernels.ops import relative_attention as module
from foreroute.kernels.ops.relative_attention import relative_attention, relative_attention_reference

NAMES = ("query", "key", "value", "r", "u", "v")


def inputs(b: int, q: int, m: int, h: int = 2, w: int = 4, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * q + m)
    s = m + q
    shapes = [(b, q, h, w), (b, s, h, w), (b, s, h, w), (s, h, w), (h, w), (h, w)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def results(function, tensors: list[Tensor], **options) -> dict[str, Tensor]:
    """Output and gradients; the gradient that comes in is the same for every function."""
    out = function(*tensors, scale=0.5, **options)
    d_out = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape)
    grads = torch.autograd.grad(out, tensors, d_out.to(out.dtype))
    return dict(zip(("out", *NAMES), (out, *grads), strict=True))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, value in want.items():
        error = (got[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-9)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


CASES = [
    (2, 7, 5, None),
    (5, 1, 0, None),  # more streams than a tile holds; one query that sees itself
    (1, 1, 6, None),
    (2, 6, 0, None),
    (1, 66, 3, None),  # fp64 blocks hold 64 queries
    (2, 7, 5, 3),
    (1, 7, 5, 1),
    (2, 9, 4, 100),  # wider than all keys
    (1, 67, 3, 65),  # the window starts inside the second block
    (1, 70, 10, 20),
]


@pytest.mark.parametrize("b, q, m, window", CASES, ids=[f"B{b}-Q{q}-M{m}-w{w}" for b, q, m, w in CASES])
@pytest.mark.parametrize("limits", [module._ON_CPU, module._ON_GPU], ids=["cpu", "gpu"])
def test_fp64_equals_reference(b, q, m, window, limits, monkeypatch):
    """By the tiles of a CPU, and by those that a GPU gets."""
    monkeypatch.setattr(module, "_ON_CPU", limits)
    tensors = inputs(b, q, m)
    want = results(relative_attention_reference, tensors, window=window)
    assert_close(results(relative_attention, tensors, window=window), want, 1e-12)


def document_starts(b: int, q: int, m: int) -> Tensor:
    """First keys of queries whose documents start at a few places, others in each stream; some lie in the memory."""
    own_Q = torch.arange(m, m + q)
    first_BQ = torch.zeros(b, q, dtype=torch.int32)
    for stream in range(b):
        for start in (m // 2 + stream, m, m + 1 + stream, m + q // 2, m + q - 1):
            first_BQ[stream, own_Q >= start] = start
    return first_BQ


@pytest.mark.parametrize("b, q, m, window", CASES, ids=[f"B{b}-Q{q}-M{m}-w{w}" for b, q, m, w in CASES])
@pytest.mark.parametrize("limits", [module._ON_CPU, module._ON_GPU], ids=["cpu", "gpu"])
def test_documents_equal_reference(b, q, m, window, limits, monkeypatch):
    """By the tiles of a CPU, which leave out keys that no query sees, and by those that a GPU gets, which do not."""
    monkeypatch.setattr(module, "_ON_CPU", limits)
    if limits is module._ON_GPU:
        monkeypatch.setattr(module, "_narrowed", lambda tiles, _: tiles)
    tensors, options = inputs(b, q, m), {"window": window, "first_BQ": document_starts(b, q, m)}
    want = results(relative_attention_reference, tensors, **options)
    got = results(relative_attention, tensors, **options)
    for name in NAMES:  # of a query that sees itself alone nothing but the value has a gradient
        if want[name].abs().max() < 1e-12:
            assert got.pop(name).abs().max() < 1e-12
            del want[name]
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_document_sees_no_bit_of_others(dtype):
    """Documents start at keys 0, 45 and 80, queries at key 7; the first and the last document are changed."""
    tensors = inputs(2, 130, 7, dtype=dtype)
    middle = slice(45 - 7, 80 - 7)
    first_BQ = torch.zeros(2, 130, dtype=torch.int32)
    first_BQ[:, middle], first_BQ[:, middle.stop :] = 45, 80
    changed = [x.detach().clone() for x in tensors]
    for x, start in zip(changed[:3], (7, 0, 0), strict=True):
        x[:, : 45 - start] *= 1.5
        x[:, 80 - start :] *= -2
    out, other = (relative_attention(*x, scale=0.5, first_BQ=first_BQ) for x in (tensors, changed))
    assert torch.equal(out[:, middle], other[:, middle])
    assert not torch.isclose(out[:, middle.stop :], other[:, middle.stop :]).any(-1).all()
    plain, mixed = (relative_attention(*x, scale=0.5) for x in (tensors, changed))
    assert not torch.equal(plain[:, middle], mixed[:, middle])  # without first keys they do
    grads = torch.autograd.grad(out[:, middle].square().sum(), tensors[:3])
    for grad, start in zip(grads, (7, 0, 0), strict=True):
        assert grad[:, : 45 - start].eq(0).all()
        assert grad[:, 80 - start :].eq(0).all()
        assert grad[:, 45 - start : 80 - start].ne(0).any()


def test_document_example():
    zero, value = torch.zeros(1, 5, 1, 4), torch.tensor([1.0, 2, 4, 8, 16]).view(1, 5, 1, 1).expand(1, 5, 1, 4)
    first_BQ = torch.tensor([[0, 3, 3]], dtype=torch.int32)
    nothing = torch.zeros(1, 4)
    out = relative_attention(zero[:, 2:], zero, value, zero[0], nothing, nothing, scale=1.0, first_BQ=first_BQ)
    assert out[0, :, 0, 0].tolist() == pytest.approx([7 / 3, 8, 12])


def test_first_keys_of_zero_change_no_bit():
    tensors = inputs(2, 70, 5, dtype=torch.float32)
    first_BQ = torch.zeros(2, 70, dtype=torch.int32)
    got, want = (results(relative_attention, tensors, **options) for options in ({"first_BQ": first_BQ}, {}))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_precision_of_documents(dtype, tolerance):
    tensors, first_BQ = inputs(1, 130, 3, dtype=dtype), document_starts(1, 130, 3)
    want = results(relative_attention_reference, tensors, first_BQ=first_BQ)
    assert_close(results(relative_attention, tensors, first_BQ=first_BQ), want, tolerance)


def test_the_tiles():
    """fp32, 22 streams, 512 queries, 1,024 keys: 128 queries and 4 streams to 2 MiB; on a GPU a head is one tile."""
    size = {"item_bytes": 4, "gpu": False}
    assert module.tile_shape(22, 512, 1024, **size) == (4, 128)
    assert module.tile_shape(3, 512, 1024, **size) == (3, 128)
    assert module.tile_shape(22, 80, 2180, **size) == (3, 80)  # 80 x 2,180 x 4 = 0.7 MB
    assert module.tile_shape(22, 512, 1024, item_bytes=2, gpu=False) == (4, 256)
    assert module.tile_shape(22, 512, 1024, item_bytes=4, gpu=True) == (22, 512)
    assert module.tile_shape(64, 512, 1024, item_bytes=4, gpu=True) == (32, 512)  # 32 x 2 MiB


# fp32: sums of up to 133 terms, each rounded to 6e-8. bf16: scores and weights are rounded to 4e-3 each.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_precision(dtype, tolerance):
    tensors = inputs(1, 130, 3, dtype=dtype)  # fp32 blocks hold 128 queries
    want = results(relative_attention_reference, tensors)
    assert_close(results(relative_attention, tensors), want, tolerance)


@pytest.mark.parametrize("window, first", [(None, None), (2, None), (None, (1, 3, 3)), (2, (1, 1, 3))])
def test_gradcheck(window, first):
    first_BQ = None if first is None else torch.tensor([first], dtype=torch.int32)

    def function(*tensors):
        return relative_attention(*tensors, scale=0.7, window=window, first_BQ=first_BQ)

    assert torch.autograd.gradcheck(function, inputs(1, 3, 2, w=2))


def test_no_grad_gives_the_same():
    tensors = inputs(2, 70, 5)
    want = relative_attention(*tensors, scale=0.5)
    with torch.no_grad():
        assert torch.equal(relative_attention(*tensors, scale=0.5), want)


@pytest.mark.parametrize("index", range(6), ids=NAMES)
def test_negative_control(index):
    tensors = inputs(2, 7, 5)
    want = results(relative_attention_reference, tensors)
    with torch.no_grad():
        tensors[index][0] *= 1.001  # of r only the encoding of distance 0
    got = results(relative_attention, tensors)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(got, want, 1e-6)


def test_scores_do_not_overflow():
    tensors = [x.detach().float() * 100 for x in inputs(1, 7, 5)]
    assert relative_attention(*tensors, scale=1.0).isfinite().all()


def test_dropout_zeroes_weights_and_keeps_the_mean():
    query, key, value, r, u, v = (x.detach() for x in inputs(3, 70, 6))
    value = torch.eye(76, dtype=torch.float64)[None, :, None].expand(3, 76, 2, 76).contiguous()
    pad = [0, 72]  # the weights themselves are the output: head width 76
    query, key, r, u, v = (torch.nn.functional.pad(x, pad) for x in (query, key, r, u, v))
    plain = relative_attention(query, key, value, r, u, v, scale=0.5)
    torch.manual_seed(3)
    dropped = relative_attention(query, key, value, r, u, v, scale=0.5, dropout=0.25)
    seen = plain > 0
    kept = dropped > 0
    assert torch.allclose(dropped[kept], plain[kept] / 0.75)
    assert kept[seen].double().mean().item() == pytest.approx(0.75, abs=0.02)  # 20,000 draws: 0.003


@pytest.mark.parametrize("first", [None, (1, 3, 3)])
def test_dropout_gradients(first):
    first_BQ = None if first is None else torch.tensor([first], dtype=torch.int32)

    def function(*tensors):
        torch.manual_seed(3)  # the same mask in every evaluation
        return relative_attention(*tensors, scale=0.7, dropout=0.4, first_BQ=first_BQ)

    assert torch.autograd.gradcheck(function, inputs(1, 3, 2, w=2))


def test_shifted_example():
    tile = module._Tile(0, slice(0, 1), slice(0, 2), slice(0, 3), (1, 2, 3), 0)
    buffer = torch.full((8 + module._ALIGN,), 99)
    buffer[15:23] = torch.tensor([2, 1, 0, -1, 2, 1, 0, -1])  # by key it starts at a multiple of 16
    by_distance, by_key = module._shifted(buffer, tile)
    assert by_distance.tolist() == [[[2, 1, 0, -1], [2, 1, 0, -1]]]
    assert by_key.tolist() == [[[1, 0, -1], [2, 1, 0]]]


def test_refuses_what_does_not_fit():
    query, key, value, r, u, v = inputs(2, 7, 5)
    with pytest.raises(ValueError, match="do not fit"):
        relative_attention(query, key[:, 1:], value, r, u, v, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        relative_attention(query, key, value, r[1:], u, v, scale=1.0)
    with pytest.raises(ValueError, match="window=0"):
        relative_attention(query, key, value, r, u, v, scale=1.0, window=0)
    with pytest.raises(ValueError, match=r"first_BQ has the shape \(2, 6\) of torch.int32: must be \(2, 7\)"):
        relative_attention(query, key, value, r, u, v, scale=1.0, first_BQ=torch.zeros(2, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match="int64: must be"):
        relative_attention(query, key, value, r, u, v, scale=1.0, first_BQ=torch.zeros(2, 7, dtype=torch.int64))


def test_without_dropout_no_random_number_is_drawn():
    before = torch.get_rng_state()
    results(relative_attention, inputs(2, 7, 5), window=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # PyTorch 2.14's
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("first", [None, (0, 4, 4, 6, 6)], ids=["all keys", "documents"])
def test_opcheck(dropout, first):
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 8, 4), (2, 3, 8, 4), (2, 9, 4)
    operands = [torch.randn(size, generator=generator, requires_grad=True) for size in sizes]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    tests += [] if dropout else ["test_aot_dispatch_static"]  # draws at each call
    first_BQ = None if first is None else torch.tensor([first] * 3, dtype=torch.int32)
    arguments = *operands, first_BQ, None, dropout, True
    torch.library.opcheck(torch.ops.foreroute.relative_attention, arguments, test_utils=tests)


def test_documents_are_traced_whole_and_once():
    """Other first keys need no other graph; the bits are those of the eager call."""

    def call(first_BQ, *tensors):
        return relative_attention(*tensors, scale=0.5, first_BQ=first_BQ)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(call, fullgraph=True, backend=counter)
    tensors, outputs = inputs(2, 7, 5, dtype=torch.float32), []
    for first_BQ in (document_starts(2, 7, 5), torch.zeros(2, 7, dtype=torch.int32)):
        got, want = (
            [out, *torch.autograd.grad(out.square().sum(), tensors)]
            for out in (call_(first_BQ, *tensors) for call_ in (traced, call))
        )
        assert all(map(torch.equal, got, want))
        outputs.append(got[0])
    assert counter.frame_count == 1 and not torch.equal(*outputs)
