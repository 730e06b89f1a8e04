"""The access lists of kernels/testing/byte_counts.py against the addresses that interpreted kernels really touch."""

import dataclasses

import pytest
import torch
import triton

from foreroute.kernels import Dropout, combine, expert_ffn, moe_ffn, permute_rows, unpermute_rows
from foreroute.kernels.launching import recording
from foreroute.kernels.testing.byte_counts import accesses
from foreroute.kernels.testing.cases import make_case, run_layer
from foreroute.kernels.testing.interpreter import GuardError


@pytest.fixture(autouse=True)
def interpreted(watched):
    if watched is None:
        pytest.skip("a GPU does not tell which addresses were touched")


def row_tiles(launch, rows):
    """Tiles that hold rows, where the kernel has any."""
    block = launch.arguments.get("BLOCK_M")
    return None if block is None else sum(triton.cdiv(count, block) for count in rows.counts())


def compare(recorder, guard, rows):
    """Every launch: argument by argument, bytes read (distinct and in total) and written."""
    assert len(recorder.launches) == len(guard.launches) > 0
    for launch, touched in zip(recorder.launches, guard.launches, strict=True):
        listed = {
            access.argument: (
                access.read_bytes_distinct,
                access.read_bytes_total,
                access.written_bytes,
                access.written_bytes,
            )
            for access in accesses(launch, row_tiles=row_tiles(launch, rows))
        }
        real = {
            name: (t.read_bytes_distinct, t.read_bytes_total, t.written_bytes_distinct, t.written_bytes_total)
            for name, t in touched.touched.items()
            if any(dataclasses.astuple(t))
        }
        assert listed == real, launch.name


def layer_case(gated):
    case = make_case((37, 20, 40, 3, 2), gated=gated)
    assert min(case.rows.counts()) > 0 and case.rows.source_N.unique().numel() == 37
    return case


@pytest.mark.parametrize("gated", [False, True], ids=["relu", "swiglu"])
@pytest.mark.parametrize("dweight", [False, True], ids=["constant", "live"])
@pytest.mark.parametrize("rate", [0.0, 0.3], ids=["plain", "dropout"])
def test_layer(gated, dweight, rate, watched):
    case = layer_case(gated)
    dropout = Dropout(rate, 5, torch.arange(37)) if rate else None
    with recording() as recorder:
        run_layer(moe_ffn, case, torch.float16, backend="triton", dweight=dweight, dropout=dropout)
    compare(recorder, watched, case.rows)


@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["gelu", "geglu"])
def test_a_layer_that_saves_its_pre_activation(gated, watched):
    case, options = layer_case(gated), {"activation": "gelu", "dropout": Dropout(0.3, 5, torch.arange(37))}
    with recording() as recorder:
        run_layer(moe_ffn, case, torch.float16, backend="triton", **options)
    compare(recorder, watched, case.rows)


def test_parts(watched):
    case = layer_case(True)
    weights = case.weights._make(w.float().requires_grad_() for w in case.weights)
    weight = case.weight_N.float().requires_grad_()
    with recording() as recorder:
        y = expert_ffn(case.x_TD.float(), weights, case.rows, backend="triton")
        combine(y, weight, case.rows, backend="triton").sum().backward()
        order = torch.randperm(37)
        x = permute_rows(case.x_TD.float(), order, dtype=torch.float16, backend="triton")
        unpermute_rows(x, order, 37, backend="triton")
    compare(recorder, watched, case.rows)


def test_an_index_out_of_range_is_caught():
    case = layer_case(False)
    case.rows.source_N[3] = 37
    with pytest.raises(GuardError, match="outside every argument"):
        run_layer(moe_ffn, case, torch.float32, backend="triton")


def test_a_slot_written_twice_is_caught():
    x = torch.randn(4, 8)
    with pytest.raises(GuardError):
        unpermute_rows(x, torch.tensor([0, 1, 1, 2]), 4, backend="triton")
