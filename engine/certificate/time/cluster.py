"""A cluster as the time model sees it: a few rates. conf/cluster/ holds descriptions of real ones.

A rate is the one that a program reaches, where that was measured, and otherwise the data sheet's. `sources` names the
origin of each.
"""

from dataclasses import dataclass, field
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.config.option import check, option
from foreroute.engine.errors import require


@dataclass
class LinkConfig:
    """One level of the network."""

    gb_per_s: float = option(
        1.0,
        "1e9 bytes per second in one direction: inside a node what one rank sends, between nodes what one node sends.",
        above=0,
    )
    message_us: float = option(1.0, "Microseconds that a message costs whatever its size.", at_least=0)


@dataclass
class ScaleConfig:
    """How much longer parts of a step take than their products, bytes and operations at the rates of the cluster.

    1 where it was not measured; benchmarks/calibrate.py measures it.
    """

    attention: float = option(1.0, "Of attention.", at_least=0)
    experts: float = option(1.0, "Of experts.", at_least=0)
    rest: float = option(1.0, "Of all other products and bytes.", at_least=0)
    operations: float = option(1.0, "Of starting operations.", at_least=0)
    optimizer: float = option(1.0, "Of the optimizer.", at_least=0)

    def __post_init__(self) -> None:
        check("cluster.scale", self)


@dataclass
class SharingConfig:
    """Ranks that share the cores of one machine."""

    ranks: int = option(1, "Ranks on the machine.", at_least=1)
    slowdown: float = option(
        1.0, "Time of a computation on each of so many ranks at once, against one rank alone.", above=0
    )

    def __post_init__(self) -> None:
        check("cluster.sharing", self)


@dataclass
class ClusterConfig:
    """Machines of one kind."""

    name: str = "unnamed"
    ranks_per_node: int = option(8, "Ranks of a node.", at_least=1)
    device_memory_gb: float | None = option(None, "1e9 bytes that a rank may use; None if unknown.", above=0)
    product_fp32: list[list[float]] = option(
        [[1.0, 1.0]],
        "Rate of matrix products by their size: pairs of GFLOP of one product and TFLOP/s (with a decimal point), "
        "ascending; it is interpolated over the logarithm of the size.",
    )
    product_bf16: list[list[float]] = field(default_factory=lambda: [[1.0, 1.0]])
    memory_gb_per_s: float = option(
        100.0, "1e9 bytes per second that an elementwise operation reads and writes.", above=0
    )
    operation_us: float = option(5.0, "Microseconds that starting an operation costs whatever its size.", at_least=0)
    inside: LinkConfig = field(default_factory=LinkConfig)  # between ranks of a node
    between: LinkConfig = field(default_factory=LinkConfig)  # between nodes; all ranks of a node share its gb_per_s
    host_copies: bool = option(
        False,
        "Whether ranks run on CPUs: the processor that computes also starts operations and copies what is sent, so "
        "that only waiting for the link between nodes is hidden behind computation.",
    )
    overlap: float = option(
        1.0, "Share of the time that could be hidden behind computation that is.", at_least=0, at_most=1
    )
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    sharing: list[SharingConfig] = option([], "For ranks on CPUs, which share cores; interpolated.")
    sources: dict[str, str] = option({}, "Where each figure comes from.")

    def __post_init__(self) -> None:
        check("cluster", self)
        check("cluster.inside", self.inside)
        check("cluster.between", self.between)
        for name in ("product_fp32", "product_bf16"):
            curve = getattr(self, name)
            good = len(curve) > 0 and all(len(p) == 2 and min(p) > 0 and isfinite(sum(p)) for p in curve)
            require(
                good and [p[0] for p in curve] == sorted({p[0] for p in curve}),
                f"cluster.{name}={curve}: must be pairs [GFLOP, TFLOP/s] above 0, ascending",
            )

    def product_seconds(self, flops: NDArray[np.float64] | float, *, bf16: bool) -> NDArray[np.float64]:
        """Time of one product of so many floating-point operations (2 x rows x columns x depth)."""
        gflop, tflops = np.array(self.product_bf16 if bf16 else self.product_fp32).T
        flops = np.maximum(np.asarray(flops, np.float64), 1.0)
        rate = np.interp(np.log(flops / 1e9), np.log(gflop), tflops)
        # below the curve's first point a product takes as long as there: what it costs is being started
        seconds: NDArray[np.float64] = np.where(
            flops / 1e9 < gflop[0], gflop[0] / tflops[0] * 1e-3, flops / (rate * 1e12)
        )
        return seconds

    def memory_seconds(self, num_bytes: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Time of reading or writing so many bytes."""
        return np.asarray(num_bytes, np.float64) / (self.memory_gb_per_s * 1e9)

    def slowdown(self, ranks: int) -> float:
        """How much longer a computation takes when so many ranks run on the machine at once."""
        if not self.sharing:
            return 1.0
        known = sorted(self.sharing, key=lambda shared: shared.ranks)
        found = np.interp(ranks, [s.ranks for s in known], [s.slowdown for s in known])
        last = known[-1]
        return float(found * max(1.0, ranks / last.ranks))
