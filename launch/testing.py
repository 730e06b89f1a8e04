"""What tests of launchers share: a run of seconds, what it wrote, and which of its processes are there."""

import argparse
import inspect
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def small_run(folder: Path) -> list[str]:
    """Options of a run of seconds: experiment=debug on a text of 100 kB, which is written to the folder."""
    text = folder / "argparse"
    text.write_text(inspect.getsource(argparse))
    corpus = ["corpus=file", f"corpus.path={text}", f"corpus.cache_dir={folder}/cache"]
    short = ["model.dropout=0", "train.threads=1", "eval.k=[1]", "eval.max_symbols=512"]
    return ["experiment=debug", *corpus, *short, "parallel.timeout_s=40"]


def read_losses(runs: Path) -> dict[int, float]:
    """Of the run's logged steps, in nats, by step."""
    rows = (runs / "debug/metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, rows)}


def last_step(runs: Path) -> int:
    """The newest step logged; 0 if there is none yet."""
    try:
        return max(read_losses(runs), default=0)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def processes_of(runs: Path) -> list[psutil.Process]:
    """Processes with this folder on their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = any(str(runs) in argument for argument in process.cmdline())
        except psutil.Error:  # it ended meanwhile, or is defunct: its parent will see
            continue
        if ours and process.pid != os.getpid():
            found.append(process)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 200.0) -> None:
    """Return when the condition holds.

    Raises:
        TimeoutError: it did not hold in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not after {seconds:.0f} s")
        time.sleep(0.1)
