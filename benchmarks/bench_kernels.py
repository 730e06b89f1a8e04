"""Time of the expert layer, forward and backward, over one dense feed-forward of equal FLOPs, and over its peers.

    python -m benchmarks.bench_kernels [--rounds N] [--device cpu|cuda] [--quick]

Ours (kernels.moe_ffn) gets routing tables that were made beforehand, as in training, where they are planned. Peers
(benchmarks/systems/peers.py) sort at every step, except those named _planned. A case whose output or gradients differ
from those in fp64 is not timed. On the CPU the cases of a dtype take turns and every round has a new routing, like the
batches of a training; fastest rounds are compared. A GPU is measured at the sizes of five models, as
benchmarks/gpu_check/speed.py describes.

Letters: see benchmarks/systems/peers.py; s bytes of a number.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from benchmarks.harness import (
    GradCase,
    SavedBytes,
    environment,
    interleave,
    minima_ms,
    passing,
    positive,
    print_result,
    print_table,
    saved_bytes,
)
from benchmarks.harness.against import parse
from benchmarks.systems import peers
from benchmarks.systems.layer_cases import DTYPES, LOADS, TOLERANCE, dense, ours
from benchmarks.systems.peers import Problem, Shape, choose, make_problem, truth
from foreroute.launch.start.process import keep_freed_memory

THREADS = 2
SHAPE = Shape(tokens=4096, width=512, hidden=512, experts=16, k=2)
QUICK = Shape(tokens=256, width=64, hidden=128, experts=16, k=2)
AHEAD = 0.97  # a peer that takes less than this share of our time is ahead

Truth = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Measured:
    """The cases of one dtype on the CPU."""

    ms: dict[str, float]
    saved: dict[str, SavedBytes]
    failed: list[str]

    def ratio(self, name: str) -> float | None:
        """Time relative to the dense layer of equal FLOPs; None for a case that was not timed."""
        base = "dense_all" if name in ("all", "dense_all") else "dense"
        return self.ms[name] / self.ms[base] if name in self.ms else None


def routed_cases(problem: Problem, load: str) -> dict[str, GradCase]:
    """Return ours and the peers' cases of a problem."""
    made = {"fast": ours(problem, "fast"), "lean": ours(problem, "lean"), **peers.peers(problem)}
    return {f"{name} {load}": one for name, one in made.items()}


def rounds_of(
    shape: Shape, dtype: torch.dtype, problems: Mapping[str, Problem], rounds: int
) -> dict[str, Callable[[], object]]:
    """Return the routed cases as calls, each with a routing of its own."""
    calls: dict[str, list[GradCase]] = {}
    for i, load in product(range(rounds), LOADS):
        generator = torch.Generator().manual_seed(1 + i)
        expert_TK = choose(shape, generator, skewed=load == "skewed")
        problem = replace(problems[load].cast(dtype), expert_TK=expert_TK)
        for name, one in routed_cases(problem, load).items():
            calls.setdefault(name, []).append(one)
    turns = {name: iter(ones) for name, ones in calls.items()}
    return {name: lambda turn=turn: next(turn)() for name, turn in turns.items()}  # type: ignore[misc]


def cpu_cases(
    shape: Shape, dtype: torch.dtype, problems: Mapping[str, Problem], truths: Mapping[str, Truth]
) -> tuple[dict[str, GradCase], dict[str, Truth]]:
    """Return the cases of a dtype, and the truth of each case that is not dense."""
    tokens, width, hidden, experts, _ = shape
    cases = {
        "dense": dense(shape.rows, width, hidden, dtype),
        "dense_product": dense(shape.rows, width, hidden, dtype, bias=False),
        "dense_all": dense(tokens, width, experts * hidden, dtype),
    }
    case_truths: dict[str, Truth] = {"all": truths["all"]}
    for load in LOADS:
        made = routed_cases(problems[load].cast(dtype), load)
        cases |= made
        case_truths |= dict.fromkeys(made, truths[load])
    cases["all"] = ours(problems["all"].cast(dtype), "lean", masked=True)
    return cases, case_truths


def measure(
    label: str,
    cases: Mapping[str, GradCase],
    truths: Mapping[str, Truth],
    rounds: int,
    turns: Mapping[str, Callable[[], object]],
) -> Measured:
    """Check the cases, count the bytes that they keep for backward, time them (routed cases by their turns), and print
    the table."""
    passed, failed = passing(label, cases, truths, TOLERANCE[label])
    print(f"\n{label}: {len(truths) - len(failed)} of {len(truths)} cases pass their check")
    saved = {name: saved_bytes(one) for name, one in passed.items()}
    timed = {name: turns.get(name, one) for name, one in passed.items()}
    seconds = interleave(timed, rounds, warmup=0)  # the check has warmed up
    measured = Measured(minima_ms(seconds), saved, failed)
    print_table(
        ("case", "ms", "ratio", "saved MB", "without indices"),
        [
            (name, ms, measured.ratio(name), sum(saved[name]) / 1e6, saved[name].numbers / 1e6)
            for name, ms in measured.ms.items()
        ],
    )
    return measured


def compare(measured: Mapping[str, Measured]) -> None:
    """Print whether a peer is faster than ours."""
    shares = {
        f"{name} ({label} {load})": one.ms[f"{name} {load}"] / one.ms[f"fast {load}"]
        for label, one in measured.items()
        for load in LOADS
        for name in peers.NAMES
        if f"{name} {load}" in one.ms and f"fast {load}" in one.ms
    }
    ahead = [f"{name} takes {share:.3f}" for name, share in shares.items() if share < AHEAD]
    print(f"\npeers more than 3% ahead of ours (fast): {', '.join(ahead) or 'none'}")
    if shares:
        name = min(shares, key=lambda name: shares[name])
        print(f"closest peer: {name} takes {shares[name]:.3f} of our time")


def print_bounds(shape: Shape, size: int, index_bytes: int) -> int:
    """Print the bytes kept for backward that formulas predict; return the bound of lean with its indices."""
    tokens, width, hidden, experts, _ = shape
    lean = size * (tokens * width + shape.rows * hidden)
    scatter = lean + size * shape.rows * (hidden + width)
    bounds = {
        "lean: s(TD + NF)": lean,
        "lean with its indices": lean + index_bytes,
        "masked dense: s(TD + TEF)": size * tokens * (width + experts * hidden),
        "ScatterMoE: s(TD + 2NF + ND)": scatter,
        "and with a permute: 2ND more": scatter + 2 * size * shape.rows * width,
    }
    print("\nkept for backward by formula, fp32")
    print_table(("bound", "MB"), [(name, count / 1e6) for name, count in bounds.items()])
    return lean + index_bytes


def run_cpu(rounds: int, shape: Shape) -> int:
    """Measure on the CPU; return the exit code."""
    print(environment(), shape)
    problems = {load: make_problem(shape, skewed=load == "skewed") for load in LOADS}
    problems["all"] = make_problem(shape._replace(k=shape.experts))
    truths = {load: truth(problem) for load, problem in problems.items()}
    measured, index_bytes = {}, 0
    for label in ("fp32", "bf16"):
        cases, case_truths = cpu_cases(shape, DTYPES[label], problems, truths)
        turns = rounds_of(shape, DTYPES[label], problems, rounds)
        measured[label] = measure(label, cases, case_truths, rounds, turns)
        index_bytes = sum(table.nbytes for table in cases["lean uniform"].tables)
    bound = print_bounds(shape, 4, index_bytes)
    compare(measured)
    own = {"uniform": "fast uniform", "skewed": "fast skewed", "all": "all", "lean": "lean uniform"}
    lean = measured["fp32"].saved.get("lean uniform")
    print_result(
        {
            **{label: {key: one.ratio(name) for key, name in own.items()} for label, one in measured.items()},
            "peers": {name: _peer_ratios(measured, name) for name in peers.NAMES},
            "saved_bytes": None if lean is None else sum(lean),
            "saved_bytes_bound": bound,
        }
    )
    return 1 if any(one.failed for one in measured.values()) else 0


def _peer_ratios(measured: Mapping[str, Measured], name: str) -> dict[str, float | None]:
    return {
        label + suffix: one.ratio(f"{name} {load}")
        for load, suffix in zip(LOADS, ("", "_skewed"), strict=True)
        for label, one in measured.items()
    }


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=10, help="default 10")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small shape; times mean nothing")
    args = parse(parser)
    keep_freed_memory()  # as every program of launch/ does
    if args.device == "cpu":
        torch.set_num_threads(THREADS)
        return run_cpu(args.rounds, QUICK if args.quick else SHAPE)
    if not torch.cuda.is_available():
        print("--device cuda: PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    from benchmarks.gpu_check import speed

    found = speed.measure({"quick": QUICK} if args.quick else speed.SHAPES, tuple(DTYPES), LOADS, rounds=args.rounds)
    print_result(found)
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
