"""What MFU is measured against: said, looked up, or unknown; never guessed."""

from dataclasses import replace

import pytest
import torch

from foreroute.engine.config import KernelsConfig, TrainConfig
from foreroute.engine.config.enums import Backend, MatmulPrecision, Precision
from foreroute.engine.errors import UserError
from foreroute.engine.metrics.peak_flops import SHEETS, peak_of
from foreroute.engine.testing.tiny_run import tiny_config


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of this name, as far as a look-up goes."""

    def named(name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return torch.device("cuda", 0)

    return named


def with_formats(precision, products=MatmulPrecision.ieee):
    backend = Backend.triton if products is MatmulPrecision.tf32 else Backend.auto
    return replace(tiny_config().train, precision=precision), KernelsConfig(backend=backend, precision=products)


def test_a_known_gpu_in_the_number_format_of_the_run(gpu):
    device = gpu("NVIDIA H100 80GB HBM3")
    found = peak_of(*with_formats(Precision.bf16), device)
    assert found.flops == 989.5e12 and found.source == "NVIDIA H100 data sheet (SXM), dense bf16"
    assert peak_of(*with_formats(Precision.fp32), device).flops == 67e12
    assert peak_of(*with_formats(Precision.fp32, MatmulPrecision.tf32), device).flops == 494.5e12


def test_an_unknown_device_has_no_peak(gpu):
    """Also a part of a known one."""
    for name in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090", "NVIDIA H100"):
        found = peak_of(*with_formats(Precision.bf16), gpu(name))
        assert found.flops == 0 and name in found.source and "train.peak_tflops" in found.source
    assert peak_of(*with_formats(Precision.fp32), torch.device("cpu")).flops == 0


def test_what_the_run_says_counts(gpu):
    train, kernels = with_formats(Precision.bf16)
    train = replace(train, peak_tflops=0.5)
    for device in (gpu("NVIDIA H200"), torch.device("cpu")):
        assert peak_of(train, kernels, device) == (0.5e12, "train.peak_tflops")


def test_a_peak_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"train.peak_tflops=0.0: must be above 0"):
        TrainConfig(peak_tflops=0.0)


def test_figures_are_dense_ones():
    """Of all of these tensor cores, bf16 is twice tf32; a sparse figure in one column would not be."""
    for name, sheet in SHEETS.items():
        assert sheet.bf16 == pytest.approx(2 * sheet.tf32, rel=0.02), name
        assert sheet.fp32 < sheet.tf32, name


def test_figures_of_the_data_sheets():
    """TFLOP/s in fp32 outside of tensor cores, TF32 and BF16 without sparsity."""
    a100, h100, mi300x = (19.5, 156, 312), (67, 494.5, 989.5), (163.4, 653.7, 1307.4)
    assert {name: tuple(sheet[1:]) for name, sheet in SHEETS.items()} == {
        "NVIDIA A100-SXM4-40GB": a100,
        "NVIDIA A100-SXM4-80GB": a100,
        "NVIDIA A100-PCIE-40GB": a100,
        "NVIDIA A100 80GB PCIe": a100,
        "NVIDIA H100 80GB HBM3": h100,
        "NVIDIA H200": h100,
        "NVIDIA H100 PCIe": (51, 378, 756.5),
        "NVIDIA L40S": (91.6, 183, 362.05),
        "AMD Instinct MI300X": mi300x,
        "AMD Instinct MI300X OAM": mi300x,
    }
