"""Our exchange against DeepSpeed's, on one node and across a slow link: `python -m benchmarks.bench_exchange`.

Four expert layers (width 256, 16 experts x 512, 8 active), forward and backward, 1,024 tokens on each of 4 ranks; the
same weights and the same routing for all systems (benchmarks/systems/exchange_systems.py), which are checked against
each other before anything is timed. Ranks lie on this machine's loopback, or 2 and 2 on simulated nodes
(benchmarks/machines/cluster.py) whose link is shaped to 1 Gbit/s or 200 Mbit/s. `spread` tables balance single experts
(builder balanced); `packed` ones have blocks of 8 experts, those of one node.

* bytes: what leaves a rank for another, and what of it crosses the nodes' link, summed over the ranks. Counted in the
  collectives and, beforehand, from plans and routes; a difference ends the benchmark.
* step: forward and backward of all layers. exchange: the step's collectives alone, one after the other. exposed: step
  less the same step without sending anything. All are times of the slowest rank, fastest of interleaved rounds.
* live_ratio: our step over that of the same layers whose plan is made in the forward pass from the same choices: what
  it is worth to know them ahead. Its bytes are without the counts.
* hidden_fraction: of the smaller of exchange and computation, what 4 chunks hide at 200 Mbit/s.

Simulated nodes need root and iproute2; without them their figures are null and a line says why. Most of the ten minutes
that it takes are the slow link's.
"""

import argparse
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.harness import environment, positive, print_result, print_table
from benchmarks.harness.against import parse
from benchmarks.harness.ranks import run_measuring
from benchmarks.machines.cluster import Cluster, one_node, two_nodes, why_not
from benchmarks.models.traffic import KINDS
from benchmarks.systems.exchange_problem import (
    BUILDERS,
    PUBLISHED,
    QUICK,
    Shape,
    autoep_bytes,
    make_problem,
    moe_bytes,
    planned_bytes,
)

RANKS, QUICK_RANKS = 4, 2
SYSTEMS = {
    "ours": "foreroute",
    "parts": "foreroute, 4 chunks",
    "live": "foreroute, planned in the step",
    "moe": "DeepSpeed MOELayer",
    "autoep": "DeepSpeed AutoEP",
}
LIMIT_S = 1500  # for one setting; none takes a fifth of it
Figures = dict[str, dict[str, dict[str, float]]]  # by tables, system and name


def run(cluster: Cluster, systems: list[str], args: argparse.Namespace) -> Figures:
    """Run systems on the ranks of a cluster."""
    nodes = len(cluster.nodes)
    ranks = QUICK_RANKS if args.quick and nodes > 1 else RANKS
    per_node = ranks // nodes
    arguments = ["benchmarks.systems.exchange_rank", "--rounds", str(args.rounds), "--per-node", str(per_node)]
    arguments += ["--quick"] * args.quick + ["--systems", *systems]
    found: Figures = run_measuring(
        cluster, "bench_exchange", arguments, ranks=ranks, seconds=LIMIT_S, warmed=args.quick
    )
    return found


def show(setting: str, figures: Figures) -> None:
    """Print one setting."""
    header = [setting, "tables", "MB sent", "MB crossing", "step ms", "exchange ms", "exposed ms"]
    header.append("compute ms")
    rows = []
    for tables, by_system in figures.items():
        for system, found in by_system.items():
            sizes = [found["left"] / 1e6, found["crossed"] / 1e6]
            times = [found["step_ms"]]
            if system != "live":
                step, compute, exchange = (found[f"{kind}_ms"] for kind in KINDS)
                times += [exchange, step - compute, compute]
            rows.append([SYSTEMS[system], tables, *(f"{x:.1f}" for x in sizes + times), *[""] * (4 - len(times))])
    print_table(header, rows)
    print(flush=True)


def show_eight_ranks(shape: Shape) -> None:
    """Print what 8 ranks would send, counted from plans and routes."""
    rows = []
    for tables in BUILDERS:
        problem = make_problem(shape, tables, 8)
        for system, count in (("ours", planned_bytes), ("moe", moe_bytes), ("autoep", autoep_bytes)):
            found = count(problem, 4)
            rows.append([SYSTEMS[system], tables, f"{found.left / 1e6:.1f}", f"{found.crossed / 1e6:.1f}"])
    print_table(["8 ranks on 2 nodes, counted", "tables", "MB sent", "MB crossing"], rows)
    print(flush=True)


def ratio(figures: Figures | None, tables: str, other: str, name: str) -> float | None:
    """Return one figure of ours over another system's."""
    if figures is None or other not in figures[tables]:
        return None
    return figures[tables]["ours"][name] / figures[tables][other][name]


def hidden(found: dict[str, float]) -> float:
    """Return the share of the smaller of exchange and computation that runs at the same time as the other."""
    step, compute, exchange = (found[f"{kind}_ms"] for kind in KINDS)
    return (exchange + compute - step) / min(exchange, compute)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes and one link, to see that it runs")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), help="beside ours")
    args = parse(parser)
    shape = QUICK if args.quick else PUBLISHED
    for tables in BUILDERS:
        make_problem(shape, tables, RANKS)  # fills the cache that all ranks read
    print(f"{environment()}, {RANKS} ranks with one thread each, {shape}\n", flush=True)

    settings: dict[str, AbstractContextManager[Cluster]] = {"loopback": one_node()}
    if reason := why_not():
        print(f"NOT MEASURED: 2 nodes x 2 ranks: {reason}\n")
    else:
        settings |= {rate: two_nodes(rate) for rate in ("1gbit", "200mbit")[args.quick :]}
    figures: dict[str, Figures] = {}
    for setting, make in settings.items():
        with make as cluster:
            systems = [name for name in SYSTEMS if name == "ours" or name in args.systems]
            systems = [name for name in systems if name != "parts" or args.quick or setting == "200mbit"]
            systems = [name for name in systems if name != "live" or setting != "1gbit"]
            figures[setting] = run(cluster, systems, args)
        show(setting, figures[setting])
    show_eight_ranks(shape)

    slow = figures.get("200mbit")
    result: dict[str, Any] = {
        "bytes_ratio": {t: ratio(figures["loopback"], t, "autoep", "left") for t in BUILDERS},
        "step_ratio": {
            name: ratio(figures.get(name), "spread", "moe", "step_ms") for name in ("loopback", "1gbit", "200mbit")
        }
        | {"200mbit_packed": ratio(figures.get("200mbit"), "packed", "moe", "step_ms")},
        "live_ratio": {name: ratio(figures.get(name), "spread", "live", "step_ms") for name in ("loopback", "200mbit")},
        "hidden_fraction": hidden(slow["spread"]["parts"]) if slow and "parts" in slow["spread"] else None,
        "planned_equals_measured": True,  # exchange_rank ends with an error otherwise
    }
    print_result(result)


if __name__ == "__main__":
    main()
