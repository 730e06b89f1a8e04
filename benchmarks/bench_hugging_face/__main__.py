"""A Qwen3-MoE on foreroute's experts against transformers' own: `python -m benchmarks.bench_hugging_face`.

Four layers (width 256, 16 experts x 512, 4 active), 512 tokens on each of 4 ranks, forward, backward and Adam, the same
weights and ids for all systems, whose first losses are compared before anything is timed:

* replayed, live: replace_experts over 4 ranks, with recorded routes and with their own routers; DeepSpeed, ZeRO-1.
* own: transformers' experts, all of them on every rank, whose gradients DeepSpeed reduces; ZeRO-1.
* expert_parallel: transformers' experts over 4 ranks by its all-to-all, the rest on its FSDP2; torch's Adam.

Ranks lie on this machine's loopback, or 2 and 2 on simulated nodes whose link is shaped to 200 Mbit/s
(benchmarks/machines/cluster.py; needs root and iproute2). A time is that of the slowest rank, fastest of interleaved
rounds. It needs `make hf`.
"""

import argparse
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.harness import environment, positive, print_result, print_table
from benchmarks.harness.against import parse
from benchmarks.harness.ranks import run_measuring
from benchmarks.machines.cluster import Cluster, one_node, two_nodes, why_not

RANKS, QUICK_RANKS, LIMIT_S = 4, 2, 1500
SYSTEMS = {
    "replayed": "foreroute, replayed routes",
    "live": "foreroute, their routers",
    "own": "transformers, own experts",
    "expert_parallel": "transformers, expert parallel",
}
Figures = dict[str, dict[str, float | None]]


def run(cluster: Cluster, args: argparse.Namespace) -> Figures:
    """Run the systems on the ranks of a cluster."""
    names = [name for name in SYSTEMS if name == "live" or name in args.systems]
    arguments = ["benchmarks.bench_hugging_face.rank", "--rounds", str(args.rounds)]
    arguments += ["--quick"] * args.quick + ["--systems", *names]
    ranks = QUICK_RANKS if args.quick else RANKS
    found: Figures = run_measuring(
        cluster, "bench_hugging_face", arguments, ranks=ranks, seconds=LIMIT_S, warmed=args.quick
    )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes and 2 ranks, to see that it runs")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), help="beside live")
    args = parse(parser)
    ranks = QUICK_RANKS if args.quick else RANKS
    print(f"{environment()}, {ranks} ranks with one thread each\n", flush=True)
    settings: dict[str, AbstractContextManager[Cluster]] = {"loopback": one_node()}
    if reason := why_not():
        print(f"NOT MEASURED: 2 nodes x 2 ranks: {reason}\n")
    else:
        settings["200mbit"] = two_nodes("200mbit")
    result: dict[str, Any] = {}
    for setting, make in settings.items():
        with make as cluster:
            figures = run(cluster, args)
        rows = []
        for name, found in figures.items():
            size = "" if found["bytes"] is None else f"{found['bytes'] / 1e6:.2f}"
            rows.append([SYSTEMS[name], f"{found['step_ms']:.1f}", size])
        print_table([setting, "step ms", "MB of a rank's exchange"], rows)
        print(flush=True)
        best = figures.get("replayed", figures["live"])["step_ms"]
        assert best is not None
        result[setting] = {name: best / found["step_ms"] for name, found in figures.items() if found["step_ms"]}
    print_result({"step_ratio": result})


if __name__ == "__main__":
    main()
