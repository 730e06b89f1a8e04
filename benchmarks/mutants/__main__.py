"""Count the mutants that the tests notice: `python -m benchmarks.mutants --count 150 --seed 1`.

The last line is a JSON object: `tried`, `noticed`, `equivalent` (drawn and left out, see equivalent.toml), `survivors`.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.harness import print_result, print_table
from benchmarks.mutants.equivalent import read_list
from benchmarks.mutants.pool import HEAVY, Worker, copy_tree
from benchmarks.mutants.rooms import ROOMS
from benchmarks.mutants.trial import Trial

_ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Try mutants and print a table by room."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=150, help="mutants to try")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS), help="to draw from")
    parser.add_argument("--workers", type=int, default=2, help="mutants tried at a time")
    options = parser.parse_args()
    rooms = {room: ROOMS[room] for room in options.rooms}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"  # as it is now: somebody may go on working
        copy_tree(_ROOT, tree)
        workers = [Worker(tree, Path(folder) / str(i), HEAVY) for i in range(options.workers)]
        try:
            trial = Trial(tree, _ROOT / ".cache" / "mutants", workers, rooms, read_list())
            verdicts, left_out = trial.run(options.count, options.seed)
        finally:
            for worker in workers:
                worker.close()
    tried = Counter(verdict.mutant.room for verdict in verdicts)
    noticed = Counter(verdict.mutant.room for verdict in verdicts if verdict.noticed)
    print_table(["room", "noticed", "of"], [[room, noticed[room], count] for room, count in tried.items()])
    survivors = [f"{verdict.said}  [{verdict.by}]" for verdict in verdicts if not verdict.noticed]
    summary = {"tried": len(verdicts), "noticed": noticed.total(), "equivalent": len(left_out), "survivors": survivors}
    print_result(summary)


if __name__ == "__main__":
    main()
