"""Measure this machine for the time model: `python -m benchmarks.calibrate` writes conf/cluster/this_machine.yaml.

    product_*       products of square matrices from 16 to 1,024 rows, one thread
    memory, start   adding two arrays of 32 MB, and of one number
    scale           steps of small one-rank runs through the engine, and of single ranks of larger runs, replayed
                    (benchmarks/models/replayed_ranks.py), fitted by non-negative least squares on relative errors
    inside          all-to-alls between ranks of this machine, all at once (benchmarks/models/link_rank.py)
    sharing         a computation on 1, 2 and 4 ranks at once

It prints how well the one-rank runs alone predict the replayed ranks, and how well all other steps do. Its last lines
say what to set train.peak_tflops to on this machine, for the metric mfu: the rate of the fastest product.

None of the runs has the shape of one whose time benchmarks/bench_certify.py predicts. The link between nodes is not
measured, as there is one machine: it is written as this machine's own; edit it, or take it from a preset.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from benchmarks.harness import fastest, print_table
from benchmarks.machines.cluster import ROOT, Cluster, Finished, one_node
from benchmarks.models.replayed_ranks import CountedSteps, count_steps, of_rank_0, replayed_seconds
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.time.cluster import ClusterConfig, LinkConfig, ScaleConfig, SharingConfig
from foreroute.engine.config import (
    Config,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    to_plain,
)
from foreroute.launch.start.config_files import write_config

WARM_STEPS = 4  # of every run, not counted
TARGET = ROOT / "conf" / "cluster" / "this_machine.yaml"


def small_run(
    *,
    streams: int = 4,
    segment: int = 64,
    layers: int = 2,
    width: int = 128,
    heads: int = 4,
    memory: int = 64,
    experts: int = 8,
    expert_width: int = 128,
    k: int = 2,
    dropout: float = 0.0,
    steps: int = 12,
    stage: int = 1,
) -> Config:
    """Return the configuration of a run of the quickstart's text with a hashed router, without masked products."""
    return Config(
        corpus=CorpusConfig(cache_dir=str(ROOT / ".cache")),
        data=DataConfig(streams=streams, segment=segment),
        model=ModelConfig(layers, width, heads=heads, head_width=width // heads, memory=memory, dropout=dropout),
        moe=MoEConfig(experts=experts, expert_width=expert_width, ngram=2, rows=4096),
        schedule=ScheduleConfig(k_min=k, k_max=k),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(steps=WARM_STEPS + steps, zero_stage=stage),
        eval=EvalConfig(k=[1]),
        kernels=KernelsConfig(masked_from_k=experts + 1),
    )


RUNS: list[Config] = [
    small_run(),
    small_run(layers=1, width=96, heads=2),
    small_run(layers=4, width=64),
    small_run(streams=8, segment=32, memory=128, k=4),
    small_run(streams=2, segment=96, memory=96, expert_width=512),
    small_run(streams=16, segment=48, width=96, k=1),
    small_run(streams=8, segment=96, width=192, heads=6, k=3),
    small_run(layers=1, streams=24, segment=64, width=128, expert_width=384, k=6),
    small_run(experts=16, expert_width=320, width=192, heads=6, k=5),
    small_run(layers=3, width=96, heads=3, experts=16, expert_width=64, k=12),
    small_run(layers=1, width=256, heads=8, expert_width=512),
    small_run(layers=2, streams=6, segment=128, memory=128, width=96, heads=6),
]
"""Runs on one rank that the scales are fitted to."""
REPLAYED: list[Layout] = [
    Layout(small_run(streams=32, experts=16), Placement(8, 8)),
    Layout(small_run(streams=16, width=192, heads=6, experts=16, expert_width=256, k=4), Placement(4, 4)),
    Layout(small_run(streams=64, segment=32, layers=1, width=256, heads=8, k=1), Placement(16, 8)),
    Layout(small_run(streams=16, segment=96, width=96, experts=32, expert_width=64, k=6), Placement(8, 4)),
]
"""Runs of which rank 0 is replayed."""

SIZES = 16, 32, 64, 128, 256, 512, 1024


def product_rates(dtype: torch.dtype, sizes: Sequence[int] = SIZES) -> list[list[float]]:
    """Measure products of square matrices; return pairs of GFLOP and TFLOP/s."""
    curve = []
    for size in sizes:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        repeats = max(1, 2**20 // size**2 // 4)

        def case(a: torch.Tensor = a, b: torch.Tensor = b, repeats: int = repeats) -> None:
            for _ in range(repeats):
                torch.mm(a, b)

        flop = 2.0 * size**3
        curve.append([flop / 1e9, flop * repeats / fastest(case) / 1e12])
    return [[float(f"{value:.4g}") for value in point] for point in curve]


def peak_lines() -> list[str]:
    """Measure the largest rate of a product, by one thread and by PyTorch's own number of them; return the lines that
    tell how to set it."""
    lines = []
    for threads in sorted({1, torch.get_num_threads()}):  # in the end as many as before
        torch.set_num_threads(threads)
        rates = {
            precision: max(rate for _, rate in product_rates(dtype))
            for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
        lines += [
            f"peak of a rank of {threads} threads in {precision}, for the metric mfu: train.peak_tflops={rate}"
            for precision, rate in rates.items()
        ]
    return lines


def device(sizes: Sequence[int] = SIZES) -> ClusterConfig:
    """Measure the rates of one thread.

    Args:
        sizes: of matrices.
    """
    torch.set_num_threads(1)
    large, other, tiny = torch.zeros(8 << 20), torch.zeros(8 << 20), torch.zeros(1)

    def start_operations() -> None:
        for _ in range(1000):
            tiny.add_(1.0)

    return ClusterConfig(
        name=f"this machine: {psutil.cpu_count()} cores",
        ranks_per_node=psutil.cpu_count() or 1,
        device_memory_gb=round(psutil.virtual_memory().total / (psutil.cpu_count() or 1) / 1e9, 1),
        product_fp32=product_rates(torch.float32, sizes),
        product_bf16=product_rates(torch.bfloat16, sizes),
        memory_gb_per_s=round(3 * large.nbytes / fastest(lambda: large.add_(other)) / 1e9, 2),
        operation_us=round(fastest(start_operations) * 1e3, 3),
        host_copies=True,
    )


def outputs(done: Sequence[Finished]) -> str:
    """Return the last line that rank 0 printed.

    Raises:
        SystemExit: a rank failed; names the rank and its output.
    """
    for rank, process in enumerate(done):
        if process.code != 0:
            raise SystemExit(f"rank {rank} ended with {process.code}:\n{process.err[-2000:]}")
    return done[0].out.strip().splitlines()[-1]


def step_seconds(configs: Sequence[Config], cluster: Cluster, *, per_node: int, seconds: float = 900) -> list[float]:
    """Run configurations one after the other on all ranks of a cluster; return the fastest step of each."""
    with tempfile.TemporaryDirectory() as folder:
        cases = Path(folder) / "cases.json"
        cases.write_text(json.dumps([to_plain(config) for config in configs]))
        arguments = ["-m", "benchmarks.models.step_rank", str(cases), folder]
        env = {"OMP_NUM_THREADS": "1"}
        found = json.loads(outputs(cluster.run_ranks(arguments, per_node=per_node, seconds=seconds, env=env)))
    return [min(row["step_ms"] for row in rows[WARM_STEPS:]) / 1e3 for rows in found]


def parts_of(steps: CountedSteps, cluster: ClusterConfig) -> NDArray[np.float64]:
    """Model the seconds of a step that each scale multiplies."""
    names = [f.name for f in fields(ScaleConfig)]
    zero = dict.fromkeys(names, 0.0)
    return np.array([steps.time(replace(cluster, scale=ScaleConfig(**{**zero, name: 1.0}))).total for name in names])


def fit(parts: NDArray[np.float64], measured: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fit measured = parts @ scales with scales >= 0, minimising the squared relative errors."""
    found, _ = nnls(parts / measured[:, None], np.ones(len(measured)))
    return np.asarray(found)


class Fitted(NamedTuple):
    """A step that the scales were fitted to, in milliseconds."""

    ranks: int  # of the run
    replayed: bool
    measured: float
    fitted: float
    by_others: float  # by scales that were fitted without it
    by_runs: float  # by scales that were fitted to the other runs on one rank alone


def scales(
    cluster: ClusterConfig, steps: Sequence[CountedSteps], measured: Sequence[float]
) -> tuple[ScaleConfig, list[Fitted]]:
    """Fit the scales to measured seconds; return them and each step."""
    parts, seconds = np.stack([parts_of(one, cluster) for one in steps]), np.array(measured)

    def fitted_to(chosen: list[int]) -> NDArray[np.float64]:
        return fit(parts[chosen], seconds[chosen])

    everything = list(range(len(steps)))
    on_one_rank = [number for number in everything if steps[number].network]
    found = fitted_to(everything)
    rows = []
    for number, one in enumerate(steps):
        others = [fitted_to([i for i in some if i != number]) for some in (everything, on_one_rank)]
        times = [1e3 * float(s) for s in (seconds[number], *(parts[number] @ x for x in (found, *others)))]
        rows.append(Fitted(one.layout.placement.world_size, not one.network, *times))
    names = [f.name for f in fields(ScaleConfig)]
    return ScaleConfig(**{name: round(float(value), 4) for name, value in zip(names, found, strict=True)}), rows


def print_fit(steps: Sequence[Fitted]) -> None:
    """Print the steps, and how well the replayed ranks are predicted without and with other replayed ranks."""
    print_table(
        ["ranks", "replayed", "ms", "fitted", "by the others", "by one-rank runs"], [list(one) for one in steps]
    )
    print("\n".join(error_lines(steps)))


def error_lines(steps: Sequence[Fitted]) -> list[str]:
    """Return a line for each way to predict the replayed ranks: by which steps, and the errors."""
    replayed, lines = [one for one in steps if one.replayed], []
    for words, name in (("one-rank runs alone", "by_runs"), ("all others", "by_others")):
        errors = [abs(getattr(one, name) / one.measured - 1) for one in replayed]
        lines.append(f"replayed ranks by {words}: median error {median(errors):.1%}, largest {max(errors):.1%}")
    return lines


def measure_links(cluster: Cluster, *, per_node: int) -> dict[str, float]:
    """Run benchmarks/models/link_rank.py on all ranks of a cluster."""
    env = {"OMP_NUM_THREADS": "1"}
    done = cluster.run_ranks(["-m", "benchmarks.models.link_rank"], per_node=per_node, seconds=300, env=env)
    found: dict[str, float] = json.loads(outputs(done))
    return found


def inside_link(found: dict[str, float], ranks: int) -> LinkConfig:
    """Turn the measured all-to-alls of a node's ranks into a link."""
    return LinkConfig(
        gb_per_s=round((ranks - 1) * found["bytes"] / found["bytes_s"] / 1e9, 4),
        message_us=round(found["message_us"], 2),
    )


class Calibrated(NamedTuple):
    """This machine as measured."""

    cluster: ClusterConfig
    steps: list[Fitted]  # that its scales were fitted to
    links: dict[int, dict[str, float]]  # by the number of ranks


def calibrate(rank_numbers: Sequence[int] = (2, 4), *, quick: bool = False) -> Calibrated:
    """Measure this machine.

    Args:
        quick: by half of the runs, one replayed rank and small products.
    """
    runs = RUNS[::2] if quick else RUNS
    cluster = device(SIZES[:4] if quick else SIZES)
    with one_node() as node:
        measured = step_seconds(runs, node, per_node=1)
        links = {ranks: measure_links(node, per_node=ranks) for ranks in rank_numbers}
    replayed = REPLAYED[:1] if quick else REPLAYED
    steps = [*(count_steps(Layout(config), WARM_STEPS) for config in runs), *map(of_rank_0, replayed)]
    scale, fitted = scales(cluster, steps, [*measured, *replayed_seconds(replayed)])
    shared = [SharingConfig(ranks, round(found["slowdown"], 3)) for ranks, found in links.items()]
    first = rank_numbers[0]
    link = inside_link(links[first], first)
    today = f"measured by benchmarks/calibrate.py, {date.today():%Y-%m}"
    sources = dict.fromkeys(
        ("product_fp32", "product_bf16", "memory_gb_per_s", "operation_us", "scale", "inside", "sharing"), today
    )
    sources["between"] = "not measured: this machine's own ranks"
    found = replace(
        cluster, scale=scale, inside=link, between=link, sharing=[SharingConfig(1, 1.0), *shared], sources=sources
    )
    return Calibrated(found, fitted, links)


def main() -> None:
    """Measure this machine and write its description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TARGET, help="file to write")
    args = parser.parse_args()
    peaks = peak_lines()
    cluster, steps, _ = calibrate()
    print_fit(steps)
    write_config(cluster, args.out)
    print("\n".join(peaks))
    print(f"written to {args.out}: cluster={args.out.stem}")


if __name__ == "__main__":
    main()
