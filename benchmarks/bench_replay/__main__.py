"""A replayed rank against real ones, and how long a replay takes: `python -m benchmarks.bench_replay`.

Runs of 2 and 4 ranks over gloo, at ZeRO-1 and 3, in chunks, with accumulation, n-gram tables and a growing k; each rank
is also replayed alone, all of them side by side as the real ones ran. `differences` are calls that are not the same: an
operator, the shapes of its tensors, the values of its indices, a collective; also the bytes sent to each rank.
`memory_error` is the largest relative difference of the allocator's peak in a step. `time_error` is the largest over
the ranks of the median over the steps of the main thread's processor time in this rank's own work; these are longer
steps, in processes of their own, and real and replayed ranks take turns, five steps each. Then runs that differ in k,
tables, text or placement are replayed, which must show.

`seconds_512`: one of 512 ranks at the published size of SMoE-Dropout with 64 experts, in expert groups of 64: the place
with most rows of 200 steps found and replayed. `--places N`: the certificate's memory against a replay at N random
places of a run on 64 ranks. Both are left out with `--compare-only`. `--steps`, `--timed`, `--cases`, `--counted` and
`--places` make it shorter; whole it takes about 15 minutes on two idle cores.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.bench_replay.compare import WAYS, Compared, case_of, compare, planted
from benchmarks.bench_replay.large import memory_errors, one_of_512
from benchmarks.harness import environment, positive, print_result, print_table


def _text(folder: Path) -> Path:
    path = folder / "text"
    path.write_bytes((np.random.default_rng(0).random(400_000) ** 2 * 64).astype(np.uint8).tobytes())
    return path


def _compare(text: Path, steps: int, timed: int, cases: int) -> tuple[int, float, float]:
    rows, found = [], list[Compared]()
    for ways in WAYS[:cases]:
        made = partial(case_of, ways, text, text.parent / "cache")
        both = compare(made(steps)), compare(made(timed, timed=True))
        for rank, (listed, other) in enumerate(zip(*both, strict=True)):
            errors = f"{listed.memory_error:.3%}", f"{other.time_error:+.1%}"
            rows.append([str(ways), rank, f"{listed.calls:,}", listed.differences + other.differences, *errors])
            found += [listed, other]
        print(f"{ways}: {sum(one.differences for one in found)} differences so far", flush=True)
    print_table(["run", "rank", "calls", "differences", "memory", "time"], rows)
    return (
        sum(one.differences for one in found),
        max(one.memory_error for one in found),
        max(abs(one.time_error) for one in found),
    )


def _planted(text: Path) -> None:
    found = planted(case_of(WAYS[0], text, text.parent / "cache", 3), 0)
    print_table(["planted change", "calls that differ"], [[name, f"{number:,}"] for name, number in found.items()])
    for name, number in found.items():
        if number == 0:
            raise RuntimeError(f"another {name} does not show")


@contextmanager
def _lasting(part: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    print(f"{part}: {time.perf_counter() - begin:.0f} s", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=100, help="steps that are compared")
    parser.add_argument("--timed", type=positive, default=25, help="longer steps that are timed")
    parser.add_argument("--cases", type=positive, default=len(WAYS), help="compare only the first so many runs")
    parser.add_argument("--counted", type=positive, default=200, help="steps of 512 ranks in which to look for a place")
    parser.add_argument("--places", type=positive, default=20, help="random places of a run on 64 ranks")
    parser.add_argument("--compare-only", action="store_true", help="leave the 512 and the 64 ranks out")
    args = parser.parse_args()
    print(environment())
    with tempfile.TemporaryDirectory() as folder:
        text = _text(Path(folder))
        with _lasting("compared"):
            differences, memory_error, time_error = _compare(text, args.steps, args.timed, args.cases)
        with _lasting("planted"):
            _planted(text)
        figures = {"differences": differences, "memory_error": memory_error, "time_error": time_error}
        if not args.compare_only:
            begin = time.perf_counter()
            large = one_of_512(text, args.counted)
            held = f"{large.apart.process_bytes / 2**30:.2f} GiB"
            print(f"512 ranks: place found in {large.found_s:.0f} s, replayed in {large.apart.seconds:.0f} s, {held}")
            figures["seconds_512"] = time.perf_counter() - begin
            with _lasting(f"{args.places} places"):
                errors = memory_errors(text, args.places, random.Random(0))
            middle, most = statistics.median(map(abs, errors)), max(map(abs, errors))
            print(
                f"64 ranks, {len(errors)} random places: certificate's memory off by {middle:.1%}, at most {most:.1%}"
            )
    print_result(figures)


if __name__ == "__main__":
    main()
