"""Helpers for tests of launchers: the options of a run of seconds, its losses, its processes, and results of a
study."""

import argparse
import inspect
import json
import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

TRAIN_CODE = """
import foreroute.launch.train
from foreroute.launch.start.process import leaving_at_once
with leaving_at_once():
    foreroute.launch.train.main()
"""
"""launch.train as code of a `Program` (engine/testing/ranks.py)."""


def program_module(name: str) -> ModuleType:
    """Return the module of a program, which has its options and main(); for a package, its program.py."""
    module = import_module(f"foreroute.launch.{name}")
    return import_module(f"{module.__name__}.program") if hasattr(module, "__path__") else module


def small_run(folder: Path) -> list[str]:
    """Return the options of a run of seconds: experiment=debug on a text of 100 kB, which is written to the folder."""
    text = folder / "argparse"
    text.write_text(inspect.getsource(argparse))
    corpus = ["corpus=file", f"corpus.path={text}", f"corpus.cache_dir={folder}/cache"]
    short = ["model.dropout=0", "train.threads=1", "eval.k=[1]", "eval.max_symbols=512"]
    return ["experiment=debug", *corpus, *short, "parallel.timeout_s=40"]


def read_losses(runs: Path) -> dict[int, float]:
    """Return the losses of the run's logged steps, in nats, by step."""
    rows = (runs / "debug/metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, rows)}


def last_step(runs: Path) -> int:
    """Return the newest step logged; 0 if there is none yet."""
    try:
        return max(read_losses(runs), default=0)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def processes_of(runs: Path) -> list[psutil.Process]:
    """Return the processes with this folder on their command line."""
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


def study_result(
    arm: str, seed: int, points: list[tuple[float, float, float, float]], bpc: dict[str, float], **changes: Any
) -> dict[str, Any]:
    """Return a result file of a study as launch/study/results.py writes it, with made-up numbers.

    Args:
        points: of the curve: symbols, FLOPs, seconds, valid bpc.
        changes: of its entries.
    """
    dense = "dense" in bpc
    names = "symbols", "flops", "seconds", "valid_bpc"
    curve = [{"step": n, **dict(zip(names, point, strict=True))} for n, point in enumerate(points, 1)]
    return {
        "format": 1,
        "arm": arm,
        "seed": seed,
        "tries": None,
        "learning_rate": 0.002,
        "options": {"data.streams": 4, "data.segment": 32, "data.start": seed / 10, "train.seed": seed},
        "corpus": "file",
        "tokens": "bytes",
        "corpus_sha256": "ab" * 32,
        "router": "dense" if dense else "hashed",
        "experts": 0 if dense else 4,
        "k_max": None if dense else 2,
        "parameters": 1000,
        "active_parameters": None,
        "flops_per_symbol": None,
        "steps": len(points),
        "symbols_per_step": 128,
        "curve": curve,
        "split": "test",
        "bpc": bpc,
        "test_symbols": 500,
        "counting": {},
        "analysis": None,
        "measured": {
            "training_seconds": points[-1][2],
            "tokens_per_second": 1.0,
            "peak_memory_bytes": 1,
            "wall_seconds": None,
            "cores": 2,
            "torch": "",
        },
        **changes,
    }
