"""The static gate on one configuration of every kernel and architecture, and on launches that it must refuse."""

from dataclasses import replace
from itertools import chain

import pytest

from benchmarks.kernels_static import aot
from benchmarks.kernels_static.program import MANY_ROWS, Layer, bytes_over_minimum, describe, quick_builds, record_layer
from foreroute.kernels.launching import is_interpreted

pytestmark = pytest.mark.skipif(is_interpreted(), reason="TRITON_INTERPRET=1: kernels are interpreted, not compiled")


def recorded(kernel, shape=MANY_ROWS, arch="sm_80", **arguments):
    """The first launch of this kernel in a plain bf16 layer, with some arguments changed; BLOCK_ sizes, warps,
    stages."""
    forward, backward = record_layer(Layer(shape, "bf16", gated=False), arch)
    launch = next(launch for launch in forward + backward if launch.name == kernel)
    options = {name: arguments.pop(name, value) for name, value in launch.options.items()}
    return replace(launch, arguments={**launch.arguments, **arguments}, options=options)


def failures(launch, arch="sm_80"):
    return aot.failures(launch, arch, aot.compile_launch(launch, arch))


COMPILED = "gfx942"  # in every run of the tests; the others, up to half a minute each, in the slow set


@pytest.mark.parametrize(
    "arch", [arch if arch == COMPILED else pytest.param(arch, marks=pytest.mark.slow) for arch in aot.CHIPS]
)
def test_every_kernel_passes(arch):
    builds = quick_builds(arch)
    assert len({build.launch.name for build in builds}) == 9
    wrong = {f"{launch.name} {describe(launch)}": found for _, launch in builds if (found := failures(launch, arch))}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.CHIPS)
def test_gelu_with_a_gate_passes(arch):
    """The whole gate compiles the other activations."""
    passes = record_layer(Layer(MANY_ROWS, "bf16", gated=True, dropout=True, dweight=True, activation="gelu"), arch)
    launches = [launch for launch in chain(*passes) if "ACTIVATION" in launch.arguments]
    assert [launch.name for launch in launches] == ["_up_kernel", "_down_backward_kernel"]
    assert not [found for launch in launches for found in failures(launch, arch)]


def test_reports_spills():
    bad = recorded("_down_kernel", BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=4)
    assert any(failure.startswith("spill: ") for failure in failures(bad))


def test_reports_too_much_shared_memory():
    deep = recorded("_down_kernel", num_stages=8)
    (failure,) = [found for found in failures(deep) if found.startswith("shared memory: ")]
    assert failure.endswith("bytes of 166912")


@pytest.mark.parametrize("kernel", ["_up_kernel", "_down_kernel", "_weights_kernel", "_combine_kernel"])
def test_reports_narrow_accesses(kernel):
    unaligned = recorded(kernel, MANY_ROWS._replace(width=100))  # rows of 200 bytes: not a multiple of 16
    assert any(failure.startswith("not 128-bit: ") for failure in failures(unaligned))


def test_reports_lost_asynchronous_copies():
    unpipelined = recorded("_up_kernel", num_stages=1)
    found = failures(unpipelined)
    assert found and all(failure.startswith("not cp.async: ") for failure in found)


def test_reports_a_product_without_tensor_cores():
    launch = recorded("_up_kernel", arch="sm_90")
    resources = aot.compile_launch(launch, "sm_90")
    without = {n: c for n, c in resources.instructions.items() if n != "HGMMA"}
    assert aot.failures(launch, "sm_90", replace(resources, instructions=without)) == ["no tensor-core instruction"]


def test_blocks_stand_on_the_line_above_them():
    load = "@%p1 ld.global.b32 {{ %r1 }}, [ %rd3 + 0 ];"
    block = f"\t// begin inline asm\n{{}}\tmov.u32 %r1, 0x0;\n{{}}\t{load}\n\n\t// end inline asm\n"
    outside = "\t.loc\t1 38 13 // rows.py:38:13\n{}\t.loc\t1 41 9\n\tadd.s32 %r2, %r1, 1;\n{}"
    places = "\t.loc\t1 38 13 // rows.py:38:13\n", "\t.loc\t1 39 13 // rows.py:39:13\n"
    whole, split = block.format("", ""), block.format(*places)
    assert aot.true_lines(outside.format(split, split)) == outside.format(whole, whole)
    assert aot.true_lines(outside.format(whole, whole)) == outside.format(whole, whole)


def test_lines_alone_are_mended(tmp_path, monkeypatch):
    """Without it a kernel has the same instructions."""
    launch = recorded("_combine_kernel")
    mended = aot.compile_launch(launch, "sm_80")
    monkeypatch.setattr(aot, "CACHE", tmp_path)
    monkeypatch.setattr(aot, "true_lines", lambda ptx: ptx)
    assert replace(aot.compile_launch(launch, "sm_80"), rows=mended.rows) == mended


def test_refuses_the_interpreter(monkeypatch):
    monkeypatch.setattr(aot, "is_interpreted", lambda: True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"):
        aot.compile_launch(recorded("_up_kernel"), "sm_80")


def test_model_shapes_move_little_more_than_the_minimum(capsys):
    for ratios in bytes_over_minimum("sm_90").values():
        # indices, tile maps and biases come on top of the minimum
        assert 1.0 <= ratios["forward"] < 1.01
        assert 1.0 <= ratios["backward"] < 1.01
