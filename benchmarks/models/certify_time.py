"""The error of the certificate's time model against measured steps, for benchmarks/bench_certify.py.

The measured runs have 2 and 4 ranks on two simulated nodes (benchmarks/machines/cluster.py) whose link has three
speeds, with several ways to train one model. benchmarks/calibrate.py describes the cluster: its one-rank runs have
other shapes, and the links are measured by all-to-alls. Fastest steps are compared, and the way that the model
recommends is compared with the fastest one measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.calibrate import (
    WARM_STEPS,
    Calibrated,
    calibrate,
    inside_link,
    measure_links,
    print_fit,
    small_run,
    step_seconds,
)
from benchmarks.harness import print_table
from benchmarks.machines.cluster import Cluster, two_nodes, why_not
from benchmarks.models.replayed_ranks import count_steps
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.time.cluster import ClusterConfig, LinkConfig, SharingConfig
from foreroute.engine.certificate.time.step_time import StepTime
from foreroute.engine.config import Config, ParallelConfig
from foreroute.engine.config.enums import Builder, ExchangeKind

RATES = "200mbit", "500mbit", "1gbit"
NODES = 2
RUN = small_run(streams=16, width=160, heads=5, experts=16, expert_width=256, k=8, steps=10)


@dataclass(frozen=True, slots=True)
class Compared:
    """One way to train, on one cluster."""

    rate: str
    ranks: int
    name: str
    predicted: StepTime
    measured_s: float

    @property
    def error(self) -> float:
        """The relative error of the prediction."""
        return abs(self.predicted.total - self.measured_s) / self.measured_s


def ways(ranks: int) -> Iterator[tuple[str, Config]]:
    """Return named ways to train RUN on so many ranks."""
    sizes = [size for size in (1, 2, 4) if size <= ranks]
    for size in sizes:
        kinds = [("tokens", 1, None), ("tokens", 4, None), ("gather", 1, None), ("tokens", 1, 16 // size)]
        for kind, chunks, pack in kinds if size > 1 else kinds[:1]:
            name = f"group {size} {kind}" if size > 1 else "no groups"
            name += f", {chunks} chunks" if chunks > 1 else ""
            name += ", packed" if pack else ""
            builder = Builder.packed if pack else Builder.balanced
            yield (
                name,
                replace(
                    RUN,
                    moe=replace(RUN.moe, builder=builder, pack=pack),
                    parallel=ParallelConfig(expert_ranks=size, exchange=ExchangeKind[kind], chunks=chunks),
                ),
            )


def linked(cluster: ClusterConfig, nodes: Cluster, *, per_node: int) -> ClusterConfig:
    """Measure the link between two nodes: its rate in one direction, and the share that can be hidden."""
    found = measure_links(nodes, per_node=per_node)
    crossing = per_node * per_node * found["bytes"]
    link = LinkConfig(gb_per_s=crossing / found["bytes_s"] / 1e9, message_us=found["message_us"])
    return replace(cluster, between=link, overlap=found["overlap"])


def compare(machine: Calibrated, per_node: int, rates: Sequence[str], limit: int | None = None) -> list[Compared]:
    """Predict and measure on two nodes of so many ranks, at each speed of their link.

    Args:
        machine: this one, with the links of as many ranks; that between the nodes is measured here.
        limit: try so many ways only.
    """
    ranks = NODES * per_node
    found = machine.links[ranks]
    shared = [SharingConfig(per_node, found["slowdown"])]  # simulated nodes share the cores
    described = replace(machine.cluster, ranks_per_node=per_node, inside=inside_link(found, ranks), sharing=shared)
    chosen = list(ways(ranks))[:limit]
    configs = [config for _, config in chosen]
    results = []
    for rate in rates:
        with two_nodes(rate) as nodes:
            here = linked(described, nodes, per_node=per_node)
            predicted = [
                count_steps(Layout(config, Placement(ranks, config.parallel.expert_ranks, per_node)), WARM_STEPS).time(
                    here
                )
                for config in configs
            ]
            measured = step_seconds(configs, nodes, per_node=per_node)
        results += [
            Compared(rate, ranks, name, time, seconds)
            for (name, _), time, seconds in zip(chosen, predicted, measured, strict=True)
        ]
    return results


def time_model_error(limit: int | None = None) -> float | None:
    """Calibrate, compare on all clusters and print; return the median error, None where nodes cannot be simulated.

    Args:
        limit: try so many ways on the smaller cluster, on its fastest link only, after a quick calibration.
    """
    if (reason := why_not()) is not None:
        print(f"the time model was not measured: {reason}")
        return None
    per_nodes, rates = ((1, 2), RATES) if limit is None else ((1,), RATES[-1:])
    machine = calibrate([NODES * per_node for per_node in per_nodes], quick=limit is not None)
    print("steps that the scales are fitted to; by the others: each left out of the fit")
    print_fit(machine.steps)
    found = [one for per_node in per_nodes for one in compare(machine, per_node, rates, limit)]
    print_table(*table(found))
    for name, regret in regrets(found).items():
        print(f"{name}: the recommended way takes {regret:.1%} longer than the fastest one measured")
    return median_error(found)


def median_error(found: Sequence[Compared]) -> float:
    """Return the median of the relative errors."""
    return median(one.error for one in found)


def regrets(found: Sequence[Compared]) -> dict[str, float]:
    """Return, for each cluster, how much longer the recommended way takes than the fastest, both measured."""
    clusters: dict[str, list[Compared]] = {}
    for one in found:
        clusters.setdefault(f"{one.ranks} ranks, {one.rate}", []).append(one)
    return {
        name: min(ways_here, key=lambda one: one.predicted.total).measured_s / min(one.measured_s for one in ways_here)
        - 1
        for name, ways_here in clusters.items()
    }


def table(found: Sequence[Compared]) -> tuple[list[str], list[list[object]]]:
    """Tabulate the comparison, with times in ms."""
    header = ["link", "ranks", "way", "measured", "model", "error", "compute", "exchange", "gradients", "optimizer"]
    rows: list[list[object]] = []
    for one in found:
        time = one.predicted
        parts = time.attention + time.experts + time.rest, time.exchange, time.gradients, time.optimizer
        values = [f"{1e3 * value:.1f}" for value in (one.measured_s, time.total)]
        rows.append([one.rate, one.ranks, one.name, *values, f"{one.error:.1%}", *(f"{1e3 * p:.1f}" for p in parts)])
    return header, rows
