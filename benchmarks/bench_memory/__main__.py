"""One large n-gram table with planned rows against the public ways to train one: `python -m benchmarks.bench_memory`;
about ten minutes on two quiet cores, at most 10 GB of memory.

* bytes_ratio: what 8 simulated ranks of 2,048 tokens send in a step, over what the public protocol sends on the same
  batches: a request for each token, duplicates included, counts and ids. Planned: distinct rows, their gradients, and
  the ids that the hosts exchange ahead. Bytes with n = 3 and byte pairs (8,192) with n = 2; rows of 128 numbers, fp32.
* step_ratio: a step of the table alone (read, backward, update) on 4 ranks of 2,048 tokens, over the fastest of the
  other systems (benchmarks/bench_memory/systems.py): on loopback, and 2 and 2 ranks on simulated nodes whose link has
  200 Mbit/s (benchmarks/machines/cluster.py; as root). The largest ratio of two sizes of table, n = 2 and 3, on bytes;
  step_ratio_bpe8k is the same on byte pairs. All systems are checked against each other first. TorchRec takes part
  where PYTHONPATH has the folder of `pip install --no-deps --target FOLDER torchrec==1.8.* fbgemm-gpu-cpu==1.8.*
  torchmetrics lightning-utilities tensordict cloudpickle pyvers importlib-metadata zipp pyre-extensions
  typing-inspect mypy-extensions`.
* host_wait_fraction, host_equals_device: 200 steps of a small model with its table in host memory, one rank: the share
  of step time in which it waits for its batch, and whether losses and gradient norms are bit for bit those of
  place=device.
* rows_flatness: the longest over the shortest step of that model with 10^4 to 2x10^7 rows of 32 numbers.

The text is a prefix of enwik8 (`--text`, or enwik8_prefix/enwik8.first4154394 in the folder FOREROUTE_DATA), or
Python's own sources where there is none. Times are of the fastest round, on the slowest rank.
"""

import argparse
import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.bench_memory.homes import show_homes
from benchmarks.bench_memory.problem import SEGMENT, STREAMS, TEXTS, Bytes, Table, count_bytes, read_text
from benchmarks.bench_memory.systems import SYSTEMS
from benchmarks.bench_memory.training import STEPS, host_figures, rows_flatness
from benchmarks.harness import environment, positive, print_result, print_table
from benchmarks.harness.against import parse
from benchmarks.harness.ranks import run_measuring
from benchmarks.machines.cluster import Cluster, one_node, two_nodes, why_not

RANKS, QUICK_RANKS, SIMULATED = 4, 2, 8
TABLES = [Table(1 << 16, 128, n) for n in (2, 3)] + [Table(1 << 20, 64, n) for n in (2, 3)]
QUICK_TABLES = [Table(1 << 12, 16, 2)]
COUNTED = {"bytes": 3, "bpe8k": 2}  # ids in the n-grams whose bytes are reported
COUNTED_STEPS = 4
LIMIT_S = 1500  # for one setting
Figures = dict[str, dict[str, dict[str, float]]]  # milliseconds by text, table and system


def bytes_of(kind: str, ngram: int, path: str | None) -> Bytes:
    """Return what some steps of the simulated ranks send."""
    text, table = read_text(kind, path), Table(1 << 20, 128, ngram)
    found = [
        count_bytes([text.rows(table, rank, SIMULATED, step) for rank in range(SIMULATED)], table)
        for step in range(COUNTED_STEPS)
    ]
    return Bytes(*map(sum, zip(*found, strict=True)))


def show_bytes(path: str | None) -> dict[str, float]:
    """Print the bytes of texts and n-grams; return the ratios that are reported."""
    rows, ratios = [], {}
    for kind in TEXTS:
        for ngram in (2, 3):
            found = bytes_of(kind, ngram, path)
            ratio = (found.planned + found.ids) / found.requested
            sizes = [f"{number / COUNTED_STEPS / 1e6:.2f}" for number in found]
            rows.append([kind, ngram, *sizes, f"{found.planned / found.requested:.3f}", f"{ratio:.3f}"])
            if COUNTED[kind] == ngram:
                ratios[kind] = ratio
    print_table([f"{SIMULATED} ranks", "n", "planned MB", "ids MB", "requested MB", "without ids", "ratio"], rows)
    print(flush=True)
    return ratios


def run(cluster: Cluster, tables: list[Table], systems: list[str], args: argparse.Namespace) -> Figures:
    """Time systems on the ranks of a cluster."""
    arguments = ["benchmarks.bench_memory.rank", "--rounds", str(args.rounds), "--systems", *systems]
    arguments += ["--tables", *(",".join(map(str, table)) for table in tables), "--texts", *TEXTS]
    arguments += [] if args.text is None else ["--text", args.text]
    ranks = QUICK_RANKS if args.quick else RANKS
    found: Figures = run_measuring(cluster, "bench_memory", arguments, ranks=ranks, seconds=LIMIT_S, warmed=args.quick)
    return found


def show(setting: str, figures: Figures, systems: list[str]) -> None:
    """Print the steps of one setting."""
    rows = []
    for kind, by_table in figures.items():
        for table, found in by_table.items():
            times = [f"{found[name]:.1f}" if name in found else "-" for name in systems]
            rows.append([kind, table, *times, f"{ratio_of(found):.2f}"])
    print_table([f"{setting}, ms", "rows,width,n", *systems, "ratio"], rows)
    print(flush=True)


def ratio_of(found: Mapping[str, float]) -> float:
    """Return our step over the fastest other one."""
    return found["planned"] / min(value for name, value in found.items() if name != "planned")


def largest(figures: Figures | None, kind: str) -> float | None:
    """Return the largest ratio of a text's tables."""
    return None if figures is None else max(map(ratio_of, figures[kind].values()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=20)
    parser.add_argument("--quick", action="store_true", help="small sizes and 2 ranks, to see that it runs")
    parser.add_argument("--homes", action="store_true", help="count moving homes of rows, and nothing else")
    parser.add_argument("--text", help="a file of text")
    args = parse(parser)
    if args.homes:
        print_result(show_homes(args.text))
        return
    ranks = QUICK_RANKS if args.quick else RANKS
    print(f"{environment()}, {ranks} ranks with one thread each, {STREAMS * SEGMENT} tokens a rank\n", flush=True)
    bytes_ratio = show_bytes(args.text)

    systems = list(SYSTEMS)
    if importlib.util.find_spec("torchrec") is None:
        systems = [name for name in systems if not name.startswith("torchrec")]
        print("NOT MEASURED: TorchRec, which is not installed (torchrec and fbgemm-gpu-cpu of torch's version)\n")
    settings: dict[str, AbstractContextManager[Cluster]] = {"loopback": one_node()}
    if reason := why_not():
        print(f"NOT MEASURED: 2 nodes x 2 ranks: {reason}\n")
    else:
        settings["200mbit"] = two_nodes("200mbit")
    figures: dict[str, Figures] = {}
    for setting, make in settings.items():
        with make as cluster:
            figures[setting] = run(cluster, QUICK_TABLES if args.quick else TABLES, systems, args)
        show(setting, figures[setting], systems)

    host = host_figures(args.text, steps=20 if args.quick else 200)
    numbers, steps = ([10**4, 10**5], 12) if args.quick else ([10**4, 10**5, 10**6, 2 * 10**7], STEPS)
    result: dict[str, Any] = {
        "bytes_ratio": bytes_ratio,
        "step_ratio": {name: largest(figures.get(name), "bytes") for name in ("200mbit", "loopback")},
        "step_ratio_bpe8k": {name: largest(figures.get(name), "bpe8k") for name in ("200mbit", "loopback")},
        "host_wait_fraction": host.wait_fraction,
        "host_equals_device": host.equals_device,
        "rows_flatness": rows_flatness(args.text, numbers, steps=steps),
    }
    print_result(result)


if __name__ == "__main__":
    main()
