"""Records the routes of a trained run: `python -m launch.record run=runs/NAME split=train out=routes.npy`.

The run has a live router (learned, frozen). Its newest checkpoint evaluates the whole split, and the experts of each
token in each layer, with their weights, go into the files beside `out` (engine/routing/planned/given.py). `moe.router=
given` replays them. Prints the bits per symbol of the split, which a replay at the recorded weights has too.
"""

from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from foreroute.engine.checkpoint.trained_run import open_saved
from foreroute.engine.config import Split
from foreroute.engine.config.option import check, option, required
from foreroute.engine.evaluation.route_record import record_to
from foreroute.launch.runs.folder import TextArgs, read_run
from foreroute.launch.start.cli import run_program
from foreroute.launch.start.console import Stages
from foreroute.launch.start.process import set_up
from foreroute.launch.start.rank_variables import find_device, find_place


@dataclass
class RecordArgs:
    """Options."""

    run: str = required("Folder of the run.")
    out: str = required("File of the routes, NAME.npy; NAME.weights.npy and NAME.json are written beside it.")
    split: Split = Split.train
    k: int | None = option(None, "Active experts of a token; None means schedule.k_max.", at_least=1)
    threads: int = option(0, "CPU threads of PyTorch; 0 leaves its default.")
    corpus: TextArgs = field(default_factory=TextArgs)

    def __post_init__(self) -> None:
        check("", self)


def record(args: RecordArgs) -> int:
    """Record; returns the exit code."""
    set_up(args.threads)
    folder = Path(args.run)
    config = read_run(folder, args.corpus)
    device = find_device(find_place())
    saved = open_saved(folder, config, print, device)
    k = config.schedule.k_max if args.k is None else args.k
    with closing(Stages()) as progress:
        found = record_to(Path(args.out), saved, args.split, k, progress=partial(progress, f"k = {k}"), device=device)
    print(f"{folder} at step {saved.step}, {args.split.name} split, k = {k}: {found.bpc:.4f} bits per symbol")
    print(f"written: {args.out}, routes of {found.symbols:,} symbols")
    return 0


def main() -> None:
    """Entry point."""
    run_program("record", RecordArgs, record)


if __name__ == "__main__":
    main()
