"""The guard counts exactly and sees planted faults; bf16 is bf16; poison stays where none wrote."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before start", allow_module_level=True)

import torch
import triton
import triton.language as tl

from foreroute.kernels.testing.interpreter import (
    GuardError,
    Touched,
    TouchedLaunch,
    bf16_semantics,
    guarded,
    poisoned_empty,
)

UNTOUCHED = Touched(0, 0, 0, 0)


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)
    else:
        tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def gather_kernel(x_ptr, index_ptr, y_ptr, stride, D: tl.constexpr):
    """y[m] = x[index[m]]."""
    m = tl.program_id(0)
    row = tl.load(index_ptr + m)
    d = tl.arange(0, D)
    tl.store(y_ptr + m * D + d, tl.load(x_ptr + row * stride + d))


@triton.jit
def scatter_kernel(x_ptr, index_ptr, y_ptr, D: tl.constexpr):
    """y[index[m]] = x[m]."""
    m = tl.program_id(0)
    row = tl.load(index_ptr + m)
    d = tl.arange(0, D)
    tl.store(y_ptr + row * D + d, tl.load(x_ptr + m * D + d))


@triton.jit
def ones_kernel(y_ptr, DIVISOR: tl.constexpr, ATOMIC: tl.constexpr):
    i = tl.arange(0, 8) // DIVISOR
    one = tl.full((8,), 1.0, tl.float32)
    if ATOMIC:
        tl.atomic_add(y_ptr + i, one)
    else:
        tl.store(y_ptr + i, one)


@triton.jit
def _store_twice(y_ptr):
    tl.store(y_ptr, 1.0)
    tl.store(y_ptr, 2.0)


@triton.jit
def scalar_kernel(y_ptr):
    _store_twice(y_ptr + tl.program_id(0) + 2 * tl.program_id(1))


@triton.jit
def pair_kernel(pair, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(pair[1] + i, tl.load(pair[0] + i, mask=i < n), mask=i < n)


class TestGuard:
    def test_masked_copy_touches_each_byte_once(self):
        x, y = torch.randn(100), torch.empty(100)
        with guarded() as guard:
            copy_kernel[(4,)](x, y, 100, BLOCK=32, MASKED=True)
        assert torch.equal(x, y)
        touched = {"x_ptr": Touched(400, 400, 0, 0), "y_ptr": Touched(0, 0, 400, 400)}
        assert guard.launches == [TouchedLaunch("copy_kernel", (4, 1, 1), touched)]

    def test_rows_read_twice_count_once_in_distinct(self):
        x, index = torch.randn(3, 8).half(), torch.tensor([2, 0, 2])
        y = torch.empty(3, 8).half()
        with guarded() as guard:
            gather_kernel[(3,)](x, index, y, 8, D=8)
        assert torch.equal(y, x[index])
        assert guard.launches[0].touched == {
            "x_ptr": Touched(32, 48, 0, 0),  # rows 0 and 2 of 16 bytes; three rows in all
            "index_ptr": Touched(24, 24, 0, 0),
            "y_ptr": Touched(0, 0, 48, 48),
        }

    def test_each_launch_of_a_loop_is_recorded_and_may_store_again(self):
        x, y = torch.randn(8), torch.empty(8)
        with guarded() as guard:
            for n in (8, 3):
                copy_kernel[lambda meta: (triton.cdiv(8, meta["BLOCK"]),)](y_ptr=y, n=n, x_ptr=x, BLOCK=4, MASKED=True)
        assert [launch.grid for launch in guard.launches] == [(2, 1, 1), (2, 1, 1)]
        assert [launch.touched["y_ptr"].written_bytes_total for launch in guard.launches] == [32, 12]
        assert list(guard.launches[0].touched) == ["x_ptr", "y_ptr"]

    def test_zero_elements(self):
        x, y = torch.empty(0), torch.empty(0)
        with guarded() as guard:
            copy_kernel[(2,)](x, y, 0, BLOCK=4, MASKED=True)
            copy_kernel[(0,)](x, y, 0, BLOCK=4, MASKED=False)
        assert guard.launches[0].touched == {"x_ptr": UNTOUCHED, "y_ptr": UNTOUCHED}
        with guarded(), pytest.raises(GuardError, match="no tensor with elements"):
            copy_kernel[(1,)](x, y, 0, BLOCK=4, MASKED=False)

    def test_scalar_pointers_and_a_program_storing_again(self):
        y = torch.zeros(6)
        with guarded() as guard:
            scalar_kernel[(2, 3)](y)
        assert y.tolist() == [2.0] * 6
        assert guard.launches == [TouchedLaunch("scalar_kernel", (2, 3, 1), {"y_ptr": Touched(0, 0, 24, 48)})]

    def test_tensors_in_a_tuple(self):
        x, y = torch.randn(3), torch.empty(3)
        with guarded() as guard:
            pair_kernel[(1,)]((x, y), 3, BLOCK=4)
        touched = {"pair[0]": Touched(12, 12, 0, 0), "pair[1]": Touched(0, 0, 12, 12)}
        assert guard.launches[0].touched == touched

    def test_slices_of_one_storage_are_told_apart(self):
        both = torch.randn(4, 16)
        left, right = both[:, :8], both[:, 8:]
        with guarded() as guard:
            gather_kernel[(4,)](right, torch.arange(4), torch.empty(4, 8), 16, D=8)
            copy_kernel[(1,)](left, right, 8, BLOCK=8, MASKED=True)
        assert guard.launches[0].touched["x_ptr"] == Touched(128, 128, 0, 0)
        assert guard.launches[1].touched["x_ptr"] == Touched(32, 32, 0, 0)
        assert guard.launches[1].touched["y_ptr"] == Touched(0, 0, 32, 32)

    def test_missing_tail_mask(self):
        x, y = torch.randn(128), torch.empty(100)
        place = r"copy_kernel, program \(3, 0, 0\): store outside .* 28 of 32 lanes.* byte 400 of y_ptr"
        with guarded() as guard, pytest.raises(GuardError, match=place):
            copy_kernel[(4,)](x, y, 100, BLOCK=32, MASKED=False)
        assert guard.launches == []

    def test_overrun_inside_the_storage(self):
        x, y = torch.randn(200), torch.empty(128)
        with guarded(), pytest.raises(GuardError, match=r"load outside .* byte 400 of x_ptr"):
            copy_kernel[(4,)](x[:100], y, 100, BLOCK=32, MASKED=False)

    def test_overrun_into_the_gap_between_rows(self):
        x, y = torch.randn(4, 16), torch.empty(4, 16)
        with guarded(), pytest.raises(GuardError, match=r"16 lanes: the first at byte 32 of x_ptr"):
            gather_kernel[(4,)](x[:, :8], torch.arange(4), y, 16, D=16)

    def test_read_before_the_view(self):
        x, y = torch.randn(4, 8), torch.empty(1, 8)
        with guarded(), pytest.raises(GuardError, match="byte -32 of x_ptr"):
            gather_kernel[(1,)](x[1:], torch.tensor([-1]), y, 8, D=8)

    def test_two_programs_storing_one_row(self):
        x, y = torch.randn(3, 8), torch.zeros(3, 8)
        found = r"program \(2, 0, 0\): stores bytes of y_ptr that program \(0, 0, 0\)"
        with guarded(), pytest.raises(GuardError, match=found):
            scatter_kernel[(3,)](x, torch.tensor([1, 0, 1]), y, D=8)
        with guarded(races=False):
            scatter_kernel[(3,)](x, torch.tensor([1, 0, 1]), y, D=8)

    def test_two_lanes_storing_one_element(self):
        with guarded(), pytest.raises(GuardError, match="y_ptr from two lanes"):
            ones_kernel[(1,)](torch.zeros(8), DIVISOR=2, ATOMIC=False)

    def test_atomics_may_meet(self):
        y = torch.zeros(8)
        with guarded() as guard:
            ones_kernel[(3,)](y, DIVISOR=2, ATOMIC=True)
        assert y.tolist() == [6.0] * 4 + [0.0] * 4
        assert guard.launches[0].touched == {"y_ptr": Touched(16, 96, 16, 96)}

    def test_corrupted_scatter_index(self):
        x, y = torch.randn(3, 8), torch.zeros(3, 8)
        with guarded(), pytest.raises(GuardError, match=r"store outside .* byte 96 of y_ptr"):
            scatter_kernel[(3,)](x, torch.tensor([1, 3, 2]), y, D=8)

    def test_gone_after_the_context(self):
        with guarded() as guard:
            pass
        ones_kernel[(2,)](torch.zeros(8), DIVISOR=2, ATOMIC=False)
        assert guard.launches == []

    def test_refuses_without_the_interpreter(self, monkeypatch):
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        for context in (guarded(), bf16_semantics()):
            with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), context:
                pass


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    c = tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i))
    tl.store(c_ptr + i, c.to(c_ptr.dtype.element_ty))


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def elementwise_kernel(a_ptr, b_ptr, c_ptr, y_ptr, OPERATION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c = tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i)
    if OPERATION == "add":
        y = a + b
    elif OPERATION == "mul":
        y = a * b
    elif OPERATION == "negate":
        y = -a
    elif OPERATION == "abs":
        y = tl.abs(a)
    elif OPERATION == "divide":
        y = a / b
    elif OPERATION == "number":
        y = a * 1.7 + 1
    elif OPERATION == "fma":
        y = tl.fma(a, b, c)
    elif OPERATION == "where":
        y = tl.where(a < b, a, 0.5)
    elif OPERATION == "maximum":
        y = tl.maximum(a, b)
    elif OPERATION == "less":
        y = ((a < b) & (i < N - 1)).to(tl.float32)
    elif OPERATION == "equal":
        y = (a == b).to(tl.bfloat16) + (a == a)
    elif OPERATION == "max":
        y = tl.zeros((N,), tl.float32) + tl.max(a, axis=0)
    elif OPERATION == "cumsum":
        y = tl.cumsum(a, axis=0)
    elif OPERATION == "sum":
        y = tl.zeros((N,), tl.float32) + tl.sum(a, axis=0)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty))


def elementwise(operation, a, b, c):
    y = torch.empty_like(a)
    elementwise_kernel[(1,)](a, b, c, y, OPERATION=operation, N=a.numel())
    return y


def cast(x, dtype):
    y = torch.empty_like(x, dtype=dtype)
    cast_kernel[(1,)](x, y, N=x.numel())
    return y


def same(got, want):
    """Bit for bit, but every NaN alike."""
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(
        got.nan_to_num(nan=7.0).view(torch.int16), want.nan_to_num(nan=7.0).view(torch.int16)
    )


def fp32_samples():
    """Every bf16 value, and what lies above each: the tie, its neighbours, and some others."""
    high = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0x9ABC])
    bits = (high | low).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


OPERATIONS = {
    "add": lambda a, b, c: a + b,
    "mul": lambda a, b, c: a * b,
    "negate": lambda a, b, c: -a,
    "abs": lambda a, b, c: a.abs(),
    "divide": lambda a, b, c: (a.float() / b.float()).bfloat16(),
    "number": lambda a, b, c: a * torch.tensor(1.7).bfloat16() + 1,
    "fma": lambda a, b, c: (a.double() * b.double() + c.double()).bfloat16(),
    "where": lambda a, b, c: torch.where(a < b, a, 0.5),
    "maximum": lambda a, b, c: torch.maximum(a, b),
    "less": lambda a, b, c: ((a < b) & (torch.arange(a.numel()) < a.numel() - 1)).bfloat16(),
    "equal": lambda a, b, c: (a == b).bfloat16() + 1,
    "max": lambda a, b, c: a.max().expand_as(a),
    "cumsum": lambda a, b, c: a.float().cumsum(0).bfloat16(),
}


class TestBf16:
    @pytest.fixture
    def abc(self):
        a, b, c = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
        b[:16] = a[:16]
        a[-1], b[-1] = -1.0, 1.0
        return a, b, c

    def dot_error(self):
        """Largest error of a bf16 product, in roundings to bf16; 1e-5 is for the fp32 sum."""
        a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
        c, want = torch.empty(32, 32).bfloat16(), a.double() @ b.double()
        dot_kernel[(1,)](a, b, c, N=32)
        return float(((c.double() - want).abs() / (want.abs() * 2**-8 + 1e-5)).max())

    def test_dot_is_right_to_one_rounding(self):
        with bf16_semantics():
            assert self.dot_error() <= 1.0

    def test_dot_is_wrong_without(self):
        """When this fails, upstream computes on bf16 values: see what of bf16_semantics can go."""
        assert self.dot_error() > 1e6

    def test_cast_from_fp32_rounds_to_nearest_even(self):
        x = fp32_samples()
        with bf16_semantics():
            assert same(cast(x, torch.bfloat16), x.bfloat16())

    def test_cast_from_fp64_rounds_once(self):
        """1 + 2^-8 + 2^-40 is above the tie 1 + 2^-8; rounding to fp32 first would lose that."""
        tie, little = 2**-8, 2**-40
        x = [1 + tie + little, 1 + 3 * tie - little, -1 - tie - little, 1e300]
        with bf16_semantics():
            got = cast(torch.tensor(x, dtype=torch.float64), torch.bfloat16)
        assert got.tolist() == [1 + 2**-7, 1 + 2**-7, -1 - 2**-7, float("inf")]

    def test_cast_to_fp32_is_exact(self):
        x = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
        with bf16_semantics():
            assert torch.equal(cast(x, torch.float32).nan_to_num(nan=7.0), x.float().nan_to_num(nan=7.0))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32])
    def test_cast_to_and_fro(self, dtype):
        whole = torch.arange(-128, 128)
        with bf16_semantics():
            assert cast(whole.bfloat16(), dtype).tolist() == whole.tolist()
            assert cast(whole.to(dtype), torch.bfloat16).tolist() == whole.tolist()

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_elementwise_is_torch_bit_for_bit(self, operation, abc):
        with bf16_semantics():
            got = elementwise(operation, *abc)
        assert same(got, OPERATIONS[operation](*abc))

    def test_sum_refuses(self, abc):
        with bf16_semantics(), pytest.raises(Exception, match="widen with"):
            elementwise("sum", *abc)
        x = torch.ones(16)
        with bf16_semantics():
            assert elementwise("sum", x, x, x).tolist() == [16.0] * 16

    def test_fp32_is_left_alone(self):
        x, y, z = torch.randn(3, 64)
        with bf16_semantics():
            assert torch.equal(elementwise("mul", x, y, z), x * y)

    def test_gone_after_the_context(self):
        builder = triton.runtime.interpreter.interpreter_builder
        with bf16_semantics():
            assert set(vars(builder)) >= {"create_dot", "get_bf16"}
        assert not {"create_dot", "cast_impl", "binary_op", "get_bf16"} & set(vars(builder))

    def test_with_guard(self):
        x, y = torch.randn(64), torch.empty(64).bfloat16()
        with bf16_semantics(), guarded() as guard:
            cast_kernel[(1,)](x, y, N=64)
        assert torch.equal(y, x.bfloat16())
        assert guard.launches[0].touched["y_ptr"] == Touched(0, 0, 128, 128)


class TestPoison:
    def test_unwritten_rows_stay_nan(self):
        x = torch.ones(3, 8)
        with poisoned_empty():
            y = torch.empty(4, 8)
        scatter_kernel[(3,)](x, torch.tensor([0, 1, 3]), y, D=8)
        assert y.isnan().all(dim=1).tolist() == [False, False, True, False]
        assert torch.equal(y[[0, 1, 3]], x)

    def test_every_maker(self):
        like = torch.zeros(2, 3, dtype=torch.bfloat16)
        with poisoned_empty():
            made = [
                torch.empty(2, 3, requires_grad=True),
                torch.empty_like(like),
                torch.empty_strided((2, 3), (1, 2)),
                like.new_empty(2, 3),
                like.new_empty_strided((2, 3), (3, 1)),
            ]
        assert [bool(tensor.isnan().all()) for tensor in made] == [True] * 5
        assert made[0].is_leaf and made[0].requires_grad
        assert made[2].stride() == (1, 2)
        assert made[3].dtype == torch.bfloat16

    def test_integers_and_bool(self):
        with poisoned_empty():
            assert torch.empty(1, dtype=torch.int64).item() == 0x5555555555555555
            assert torch.empty(1, dtype=torch.int32).item() == 0x55555555
            assert torch.empty(1, dtype=torch.uint8).item() == 0x55
            assert torch.empty(1, dtype=torch.bool).item() is True

    def test_originals_come_back(self):
        before = torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty
        with pytest.raises(ZeroDivisionError), poisoned_empty():
            assert torch.empty is not before[0]
            raise ZeroDivisionError
        after = torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty
        assert after == before
        assert "new_empty" not in vars(torch.Tensor)
