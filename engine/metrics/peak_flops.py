"""The peak FLOP/s of one device in the number format of a run's matrix products: the denominator of MFU.

It comes from train.peak_tflops, else from a table by the GPU's name, else it is unknown; it is never guessed. The table
has the figures for dense products of the makers' data sheets, which print some of them for 2:4 sparsity, twice as much.
"""

from typing import NamedTuple

import torch

from foreroute.engine.config import KernelsConfig, TrainConfig
from foreroute.engine.config.enums import MatmulPrecision, Precision


class Peak(NamedTuple):
    """The peak FLOP/s of a device."""

    flops: float  # FLOP/s; 0: unknown
    source: str


class _Sheet(NamedTuple):
    """TFLOP/s of dense products."""

    sheet: str
    fp32: float
    tf32: float
    bf16: float


_A100 = _Sheet("NVIDIA A100 data sheet", 19.5, 156.0, 312.0)
_H100 = _Sheet("NVIDIA H100 data sheet (SXM)", 67.0, 494.5, 989.5)
_H200 = _Sheet("NVIDIA H200 data sheet (SXM)", 67.0, 494.5, 989.5)
_MI300X = _Sheet("AMD Instinct MI300X data sheet", 163.4, 653.7, 1307.4)

SHEETS: dict[str, _Sheet] = {
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": _Sheet("NVIDIA H100 data sheet (PCIe)", 51.0, 378.0, 756.5),
    "NVIDIA H200": _H200,
    "NVIDIA L40S": _Sheet("NVIDIA L40S data sheet", 91.6, 183.0, 362.05),
    "AMD Instinct MI300X": _MI300X,
    "AMD Instinct MI300X OAM": _MI300X,
}
"""By the name that torch.cuda.get_device_name gives. A part of a GPU (MIG) has another name, and so no peak."""


def peak_of(train: TrainConfig, kernels: KernelsConfig, device: torch.device) -> Peak:
    """Find the peak of one of the run's devices."""
    if train.peak_tflops is not None:
        return Peak(train.peak_tflops * 1e12, "train.peak_tflops")
    if device.type != "cuda":
        return Peak(0.0, "unknown: python -m benchmarks.calibrate measures a CPU; set train.peak_tflops")
    name = torch.cuda.get_device_name(device)
    if name not in SHEETS:
        return Peak(0.0, f"unknown: no figure for {name}; set train.peak_tflops")
    sheet, number = SHEETS[name], number_format(train.precision, kernels.precision)
    return Peak(getattr(sheet, number) * 1e12, f"{sheet.sheet}, dense {number}")


def number_format(precision: Precision, matmul: MatmulPrecision) -> str:
    """Return the format in which a run multiplies: bf16, tf32 or fp32."""
    if precision is Precision.bf16:
        return "bf16"
    return "tf32" if matmul is MatmulPrecision.tf32 else "fp32"
