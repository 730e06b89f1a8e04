"""Compare a benchmark on this working tree with itself on another revision, in turn, in one run: `--against REV`.

    python -m benchmarks.bench_plan --steps 6 --against HEAD~1 --times 5

REV is checked out into a temporary git worktree, which is removed at the end. Both trees run the benchmark as it is in
this one, in child processes and in an order drawn anew for each round: only what lies outside benchmarks/ differs. A
benchmark that is to reach far back measures commands, such as `launch.train`, whose options last longer than functions
do.

A benchmark takes part when it reads its options with `parse` and ends with harness.print_result. Numbers in that last
line are compared by their minima over the rounds, so of those that are better when larger the ratio means little;
texts, such as a hash of all losses, must be the same in every round.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import interleave, positive, print_result, print_table

ROOT = Path(__file__).resolve().parents[2]
HERE = "this tree"
Figures = dict[str, float | str]


class Failed(RuntimeError):
    """A benchmark ended with an error, or without figures; one line says which."""


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options of the benchmark that runs; with --against compare it instead, and end the program."""
    parser.add_argument("--against", metavar="REV", help="run this benchmark on REV, too, in turn, and print ratios")
    parser.add_argument("--times", type=positive, default=3, help="rounds of --against; default 3")
    args = parser.parse_args()
    if args.against is None:
        return args
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=parser.allow_abbrev)
    own.add_argument("--against")
    own.add_argument("--times")
    _, arguments = own.parse_known_args()
    module = sys.modules["__main__"].__spec__
    assert module is not None  # started with -m
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the tree is removed
    try:
        found = compare(ROOT, args.against, [module.name, *arguments], args.times)
    except ValueError as error:
        parser.error(str(error))
    except Failed as error:
        sys.exit(str(error))
    print_comparison(found, args.against)
    sys.exit()


def compare(root: Path, rev: str, benchmark: Sequence[str], rounds: int) -> dict[str, list[Figures]]:
    """Run a benchmark in turn from the tree at root and from a revision of it.

    Args:
        root: a git checkout.
        benchmark: its module and arguments.

    Returns:
        The figures of every round, under HERE and under rev.

    Raises:
        ValueError: there is no such revision.
        Failed: the benchmark failed in one of the trees.
    """
    with worktree(root, rev) as other:
        if (root / "foreroute").is_dir() and not (other / "foreroute").is_dir():
            raise Failed(f"--against {rev}: is older than foreroute/, and would import what is installed")
        shutil.rmtree(other / "benchmarks", ignore_errors=True)
        shutil.copytree(root / "benchmarks", other / "benchmarks")
        found: dict[str, list[Figures]] = {HERE: [], rev: []}
        trees = {HERE: root, rev: other}

        def run(name: str) -> None:
            found[name].append(figures(trees[name], name, benchmark))

        interleave({name: lambda name=name: run(name) for name in trees}, rounds, warmup=0)  # type: ignore[misc]
        return found


@contextmanager
def worktree(root: Path, rev: str) -> Iterator[Path]:
    """Check a revision out into a temporary folder until the block ends.

    Raises:
        ValueError: there is no such revision, or root is no git checkout.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)

    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}")
    if commit.returncode != 0:
        raise ValueError(f"--against {rev}: no such revision of {root}")
    with tempfile.TemporaryDirectory(prefix="foreroute-against-") as folder:
        tree = Path(folder) / "tree"
        try:
            added = git("worktree", "add", "--quiet", "--detach", str(tree), commit.stdout.strip())
            if added.returncode != 0:
                raise ValueError(f"--against {rev}: {added.stderr.strip()}")
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def figures(tree: Path, name: str, benchmark: Sequence[str]) -> Figures:
    """Run a benchmark in a tree; return the numbers and texts of its last line, by path such as "layer_ratio.4".

    Raises:
        Failed: it ended with an error, or its last line is no JSON object.
    """
    done = subprocess.run(
        [sys.executable, "-m", *benchmark],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"{benchmark[0]} on {name} ended with {done.returncode}: {last}")
    try:
        return dict(_leaves(json.loads(done.stdout.splitlines()[-1])))
    except (IndexError, ValueError, AttributeError) as error:
        raise Failed(f"{benchmark[0]} on {name}: its last line is no JSON object") from error


def _leaves(found: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float | str]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        elif isinstance(value, int | float | str) and not isinstance(value, bool):
            yield above + name, value


def print_comparison(found: Mapping[str, Sequence[Figures]], rev: str) -> None:
    """Print the minima of both trees and their ratio, below 1 where this tree has less; then all of them as one JSON
    line."""
    both = [name for name in found[HERE][0] if name in found[rev][0]]
    minima: dict[str, dict[str, float]] = {HERE: {}, rev: {}}
    same = {}
    for name in both:
        values = {tree: [one[name] for one in rounds] for tree, rounds in found.items()}
        numbers = {tree: [v for v in some if not isinstance(v, str)] for tree, some in values.items()}
        if all(numbers.values()):
            for tree in minima:
                minima[tree][name] = min(numbers[tree])
        else:
            same[name] = len({*values[HERE], *values[rev]}) == 1
    ratio = {name: least / minima[rev][name] for name, least in minima[HERE].items() if minima[rev][name]}
    rows = [[name, minima[HERE][name], minima[rev][name], ratio[name]] for name in ratio]
    rows += [[name, "", "", "same" if equal else "DIFFERS"] for name, equal in same.items()]
    print_table(["least", HERE, rev, "ratio"], rows)
    print_result({"against": rev, "rounds": len(found[rev]), "minima": minima, "ratio": ratio, "same": same})
