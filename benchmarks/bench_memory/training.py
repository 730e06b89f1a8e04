"""Measure a table in the training of a small model, for benchmarks/bench_memory: host memory, and numbers of rows.

Runs follow each other in one process of benchmarks/models/step_rank.py on one rank.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench_memory.problem import PREFIX
from benchmarks.harness import print_table
from foreroute.engine.config import (
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoEConfig,
    NgramTablesConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    to_plain,
)

LIMIT_S = 1200
HEADS = 2  # of each of two orders
_LARGE = 10**6  # rows
STEPS = 60  # of a run whose fastest step counts
MODEL = ModelConfig(3, 128, heads=4, head_width=32, memory=64, dropout=0.0, pre_norm=True)
Steps = list[dict[str, float]]


class HostFigures(NamedTuple):
    """A table in host memory beside one on the device."""

    wait_fraction: float
    equals_device: bool


def case(text: str | None, rows: int, steps: int, **table: Any) -> dict[str, Any]:
    """Return the plain options of a run of the study's size with a table of about so many rows in all."""
    found = text or Path(os.environ.get("FOREROUTE_DATA", "")) / PREFIX
    known = Path(found).exists()
    config = Config(
        corpus=CorpusConfig(Corpus.file, str(found)) if known else CorpusConfig(),
        data=DataConfig(streams=16, segment=64),
        model=MODEL,
        moe=MoEConfig(router="dense", dense_width=512),
        ngram_tables=NgramTablesConfig(rows=-(-rows // (2 * HEADS)), orders=[2, 3], heads=HEADS, width=32, **table),
        schedule=ScheduleConfig(k_min=1, k_max=1),
        optim=OptimConfig(lr=3e-3, clip=0.5, warmup_steps=10),
        train=TrainConfig(steps=steps, valid_every=0, save_every=0),
        eval=EvalConfig(k=[1]),
    )
    plain: dict[str, Any] = to_plain(config)
    return plain


def run(cases: list[dict[str, Any]]) -> list[Steps]:
    """Train one case after the other in a process of their own; return the metrics of each one's steps."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.json"
        path.write_text(json.dumps(cases))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.models.step_rank", str(path), folder],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    if done.returncode != 0:
        sys.exit(f"bench_memory: runs ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: list[Steps] = json.loads(done.stdout.splitlines()[-1])
    return found


def host_figures(text: str | None, *, steps: int) -> HostFigures:
    """Train with a table of 10^5 rows in host memory and on the device."""
    device, host = run([case(text, 10**5, steps, place=place) for place in ("device", "host")])
    waited, total = (sum(step[name] for step in host[1:]) for name in ("plan_wait_ms", "step_ms"))
    same = all(a[name] == b[name] for a, b in zip(device, host, strict=True) for name in ("loss", "grad_norm"))
    return HostFigures(waited / total, same)


def rows_flatness(text: str | None, numbers: list[int], *, steps: int) -> float:
    """Return the longest over the shortest step among numbers of rows, each the fastest of its run.

    Large tables have processes of their own: the memory of one would not hold two of the largest.
    """
    cases = {rows: case(text, rows, steps) for rows in numbers}
    small = [rows for rows in numbers if rows < _LARGE]
    found = dict(zip(small, run([cases[rows] for rows in small]), strict=True)) if small else {}
    found |= {rows: run([cases[rows]])[0] for rows in numbers if rows >= _LARGE}
    times = [min(step["step_ms"] for step in found[rows][3:]) for rows in numbers]
    print_table(["rows", "step ms"], [[rows, ms] for rows, ms in zip(numbers, times, strict=True)])
    print(flush=True)
    return max(times) / min(times)
