"""Kill ranks of a small training run at random moments, restart it until it is done, and compare with the run never
killed.

    python -m benchmarks.bench_faults --trials 20

Two ranks of experiment=debug with a checkpoint every few steps. A trial kills a random rank with SIGKILL: in the middle
of training, inside the writing of a checkpoint, or in training and again while the restart starts up. Then it resumes.
Every tensor of the last checkpoint (weights, moments, memories, random state) must equal the uninterrupted run's, bit
for bit. Some runs are also stopped with SIGTERM. Ranks are copies of a process that has imported what they need, so
starts are short (benchmarks/harness/programs.py). `end` is the time from the signal until all ranks have ended; `lost`
is that and the time from the restart until the step in which the run was killed is done again: a start and steps done
twice. `inside` counts kills while a checkpoint's temporary folder was there.
"""

import argparse
import json
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.harness import environment, positive, print_result, print_table
from benchmarks.harness.programs import start_training
from foreroute.engine.testing.ranks import Program, rank_environments

RANKS, SAVE_EVERY, TIMEOUT_S = 2, 5, 120
PATIENCE_S = 1500.0  # for a start, a whole run or an end, on a machine that is busy with other things
KINDS = ("training", "checkpoint", "restart")
QUICK_KINDS = ("checkpoint", "restart")  # a restart begins with a kill in training
_LONGEST_WRITE_S = 0.02  # of a checkpoint here, on quiet cores


@dataclass(frozen=True, slots=True)
class Trial:
    """The outcome of one run that was killed or stopped."""

    kind: str
    rank: int  # killed first
    step: int  # finished when it was killed
    inside: bool  # a checkpoint was being written
    end_s: float  # from the signal until all ranks had ended
    lost_s: float  # and until the run was as far as before
    fault: str  # what went wrong; empty: nothing

    def row(self) -> list[object]:
        """Return the trial's row of the table."""
        return [
            self.kind,
            self.rank,
            self.step,
            "yes" if self.inside else "no",
            self.end_s,
            self.lost_s,
            self.fault or "identical",
        ]


class TrialFailed(Exception):
    """A trial that did not end as it must."""


class Job:
    """One training run in a folder of its own, over all its starts."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.processes: list[Program] = []
        self.last_words: list[str] = []
        folder.mkdir()

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.folder / "debug/checkpoints"

    @contextmanager
    def started(self) -> Iterator[None]:
        """Start the ranks; ranks that are still running at the end of the block are killed."""
        options = [
            "experiment=debug",
            "corpus=file",
            f"corpus.path={Path(__file__)}",
            f"corpus.cache_dir={self.folder.parent / 'cache'}",
            "train.resume=true",
            f"train.runs_dir={self.folder}",
            f"train.steps={self.steps}",
            "train.log_every=1",
            f"train.save_every={SAVE_EVERY}",
            f"parallel.expert_ranks={RANKS}",
            f"parallel.timeout_s={TIMEOUT_S}",
            "train.threads=1",
            "eval.k=[1]",
            "eval.max_symbols=256",
        ]
        with ExitStack() as until_end:
            self.processes = [
                until_end.enter_context(start_training(options, environ)) for environ in rank_environments(RANKS)
            ]
            yield

    def finished_steps(self) -> int:
        """Count the steps in metrics.jsonl."""
        try:
            return (self.folder / "debug/metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def metrics_file(self) -> int | None:
        """Identify metrics.jsonl; a resumed run replaces it by one without the steps that it does again."""
        try:
            return (self.folder / "debug/metrics.jsonl").stat().st_ino
        except FileNotFoundError:
            return None

    def is_writing(self, step: int | None = None) -> bool:
        """Return whether a checkpoint (of that step) is being written."""
        return any(self.checkpoints.glob(f".writing-{step or '*'}-*"))

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Return when reached() is true.

        Raises:
            TrialFailed: a rank ended, or it took too long.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            if not all(process.runs for process in self.processes):
                raise TrialFailed("a rank ended before it was killed")
            if time.monotonic() > deadline:
                raise TrialFailed(f"not reached in {PATIENCE_S:.0f} s")
            time.sleep(0.002)

    def ended(self) -> list[int]:
        """Wait for all ranks and return their exit codes.

        Raises:
            TrialFailed: a rank hangs.
        """
        try:
            found = [process.wait(PATIENCE_S) for process in self.processes]
        except TimeoutError:
            raise TrialFailed(f"a rank goes on {PATIENCE_S:.0f} s later") from None
        self.last_words = [line for _, out, err in found for line in f"{out}{err}".splitlines()[-3:]]
        return [code for code, _, _ in found]

    def go_to_the_end(self, step: int = 0) -> float:
        """Start the run and let it finish; return the seconds until `step` steps were done (again).

        Raises:
            TrialFailed: it does not finish.
        """
        begun, old = time.monotonic(), self.metrics_file()
        with self.started():
            self.wait_until(lambda: self.metrics_file() != old and self.finished_steps() >= step)
            seconds = time.monotonic() - begun
            codes = self.ended()
        if codes != [0] * RANKS:
            raise TrialFailed(f"exit codes {codes}: {' / '.join(self.last_words)}")
        return seconds

    def result(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the last step's checkpoint."""
        shards = sorted((self.checkpoints / f"step-{self.steps:08d}").glob("*.safetensors"))
        if len(shards) != RANKS:
            raise TrialFailed("no checkpoint of the last step")
        return {key: value for shard in shards for key, value in load_file(shard).items()}


def attempt(kind: str, job: Job, wanted: dict[str, torch.Tensor], start_s: float, chance: random.Random) -> Trial:
    """Kill or stop one run, restart it, and compare its end with the expected one."""
    end_s, lost_s, step, inside = 0.0, 0.0, 0, False
    rank, fault = chance.randrange(RANKS), ""
    try:
        with job.started():
            wait_for_the_moment(kind, job, chance)
            step, inside = job.finished_steps(), job.is_writing()
            lost_s = end_s = end(job, rank, stop=kind == "SIGTERM")
        if kind == "restart":  # killed again before it trains, or as it begins to
            begun, wait_s, old = time.monotonic(), chance.uniform(0, start_s), job.metrics_file()
            with job.started():
                job.wait_until(lambda: time.monotonic() > begun + wait_s or job.metrics_file() != old)
                lost_s += time.monotonic() - begun + end(job, chance.randrange(RANKS))
        lost_s += job.go_to_the_end(step)
        found = job.result()
        differ = [key for key in wanted if key not in found or not torch.equal(found[key], wanted[key])]
        if differ or found.keys() != wanted.keys():
            fault = f"{len(differ)} of {len(wanted)} tensors differ"
    except TrialFailed as error:
        fault = str(error)
    return Trial(kind, rank, step, inside, end_s, lost_s, fault)


def wait_for_the_moment(kind: str, job: Job, chance: random.Random) -> None:
    """Return at a random moment of training, or inside the writing of a random checkpoint."""
    if kind == "checkpoint":
        step = SAVE_EVERY * chance.randrange(1, job.steps // SAVE_EVERY)
        job.wait_until(lambda: job.is_writing(step))
        time.sleep(chance.uniform(0, _LONGEST_WRITE_S))
    else:
        step = chance.randrange(1, job.steps - SAVE_EVERY)
        job.wait_until(lambda: job.finished_steps() >= step)
        time.sleep(chance.uniform(0, 0.1))


def end(job: Job, rank: int, *, stop: bool = False) -> float:
    """Kill (or stop) a rank and wait for all; return the seconds that this took.

    Raises:
        TrialFailed: the others do not end, or a stop does not end as it must.
    """
    begun = time.monotonic()
    job.processes[rank].send_signal(signal.SIGTERM if stop else signal.SIGKILL)
    codes = job.ended()
    seconds = time.monotonic() - begun
    if stop and codes != [128 + signal.SIGTERM] * RANKS:
        raise TrialFailed(f"exit codes {codes} after SIGTERM")
    if stop and json.loads((job.folder / "debug/state.json").read_text())["state"] != "stopped":
        raise TrialFailed("state.json does not say that it was stopped")
    return seconds


def main(arguments: list[str] | None = None) -> None:
    """Run the trials and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=positive, default=20)
    parser.add_argument("--stops", type=int, default=3, help="further runs, stopped with SIGTERM")
    parser.add_argument("--seed", type=int, default=0, help="chooses ranks and moments")
    parser.add_argument("--quick", action="store_true", help="two trials, one stop, few steps")
    args = parser.parse_args(arguments)
    trials, stops, steps = (len(QUICK_KINDS), 1, 20) if args.quick else (args.trials, args.stops, 40)
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        if not args.quick:
            Job(folder / "first", steps).go_to_the_end()  # fills the caches, so that the time of a start is without
        whole = Job(folder / "whole", steps)
        start_s = whole.go_to_the_end(1)
        wanted = whole.result()
        print(f"{environment()}; a start takes {start_s:.1f} s until the first step", flush=True)
        kinds = [kind for _, kind in zip(range(trials), cycle(QUICK_KINDS if args.quick else KINDS), strict=False)]
        done = []
        for number, kind in enumerate([*kinds, *["SIGTERM"] * stops]):
            trial = attempt(kind, Job(folder / f"{number}", steps), wanted, start_s, chance)
            print(f"trial {number + 1}: {' '.join(map(str, trial.row()))}", flush=True)
            done.append(trial)
    header = ["moment", "rank", "step", "inside", "end s", "lost s", "result"]
    print_table(header, [trial.row() for trial in done])
    killed, stopped = done[:trials], done[trials:]
    print_result(
        {
            "trials": trials,
            "identical": sum(not trial.fault for trial in killed),
            "inside_checkpoint": sum(trial.inside for trial in killed),
            "seconds_lost_median": statistics.median(trial.lost_s for trial in killed),
            "end_seconds_median": statistics.median(trial.end_s for trial in killed),
            "stops": stops,
            "stops_identical": sum(not trial.fault for trial in stopped),
            "sigterm_seconds_median": statistics.median([trial.end_s for trial in stopped] or [0]),
        }
    )


if __name__ == "__main__":
    main()
