"""The result files of a study: results/NAME.json in its folder, one for each finished run, small enough to be
committed.

`collect` makes one from a run folder; `read_results` reads all of them. Numbers that depend on the machine, such as
times, are in the curve's seconds and under "measured". All other numbers are the same however often the study was
stopped.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foreroute.engine.errors import UserError, require
from foreroute.engine.metrics.names import JSONL, read_lines
from foreroute.launch.runs.folder import ANALYSIS, FACTS, SUMMARY
from foreroute.launch.study.preset import Job, with_rate

FORMAT = 1
# counted_symbols: where the models had less than all of the training text
_COUNTING = "order2_bpc", "order3_bpc", "bzip2_bpc", "counted_symbols"
Result = dict[str, Any]
_SAME = ("corpus_sha256", "tokens", "data.streams", "data.segment", "data.start", "train.seed", "test_symbols")
"""Properties in which the runs of one seed must agree to be compared."""


@dataclass(frozen=True, slots=True)
class Results:
    """The result files of a study, by arm and seed."""

    tuning: list[Result]  # one for each arm and learning rate that was tried
    runs: dict[str, dict[int, Result]]  # by arm and seed

    def seeds_of(self, arm: str) -> dict[int, Result]:
        """Return the runs of an arm by seed."""
        return self.runs.get(arm, {})

    def first_of(self, arm: str) -> Result:
        """Return one run of an arm that has any."""
        return next(iter(self.runs[arm].values()))


def collect(job: Job, rate: float | None, folder: Path, wall_seconds: float | None) -> Result:
    """Make the result of a finished run from its folder.

    Args:
        folder: the run's.
        wall_seconds: from the start of its first process to the end of its last; None if it was stopped in between.
    """
    tuned = with_rate(job, rate)
    config = tuned.config
    summary, facts = _json(folder / SUMMARY), _json(folder / FACTS)
    rows = read_lines(folder / JSONL)
    return {
        "format": FORMAT,
        "arm": job.arm,
        "seed": job.seed,
        "tries": job.tries,
        "learning_rate": config.optim.lr,
        "options": tuned.chosen_options,
        "corpus": config.corpus.name.name,
        "tokens": config.corpus.tokens.name,
        "corpus_sha256": summary["corpus_sha256"],
        "router": config.moe.router,
        "experts": 0 if config.moe.dense else config.moe.experts,
        "k_max": None if config.moe.dense else config.schedule.k_max,
        "parameters": summary["parameters"],
        "active_parameters": facts.get("active_parameters"),
        "code": facts.get("code"),
        "flops_per_symbol": facts.get("flops_per_symbol"),
        "steps": summary["steps"],
        "symbols_per_step": config.symbols_per_step,
        "curve": curve(rows),
        "split": summary["split"],
        "bpc": summary["bpc"],
        "test_symbols": summary["symbols"],
        "counting": {name: summary[name] for name in _COUNTING if name in summary},
        "analysis": _json(folder / ANALYSIS) or None,
        "measured": {
            "training_seconds": float(training_seconds(rows)[1][-1]),
            "tokens_per_second": summary["tokens_per_second"],
            "peak_memory_bytes": summary["peak_memory_bytes"],
            "wall_seconds": wall_seconds,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
    }


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
    """Return the validations of a run: bpc at k_max, with symbols, FLOPs and seconds of training up to each.

    FLOPs are None if the run did not record them.

    Args:
        rows: the lines of the run's metrics.jsonl.
    """
    steps, seconds = training_seconds(rows)
    return [
        {
            "step": row["step"],
            "symbols": row["tokens"],
            "flops": row.get("flops"),
            "seconds": float(np.interp(row["step"], steps, seconds)),
            "valid_bpc": row["valid_bpc"],
        }
        for row in rows
        if row.get("valid_bpc") is not None
    ]


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return logged steps, the start among them, and the seconds of training up to each.

    Seconds are the sum of processor_ms over the steps, which other work of the machine changes less; of step_ms on a
    GPU, whose time is not the processor's, and in runs without processor_ms. Validations, checkpoints and work that a
    kill lost are not in them.
    """
    logged = [row for row in rows if "step_ms" in row]
    of_processor = all("processor_ms" in row and not row.get("peak_device_memory_bytes") for row in logged)
    steps = np.array([0, *(row["step"] for row in logged)])
    milliseconds = np.diff(steps) * np.array([row["processor_ms" if of_processor else "step_ms"] for row in logged])
    return steps, np.concatenate([[0.0], np.cumsum(milliseconds)]) / 1e3


def read_results(folder: Path) -> list[Result]:
    """Read every result file.

    Raises:
        UserError: one is damaged or was written by another version.
    """
    return [read_result(path) for path in sorted(folder.glob("*.json"))]


def read_result(path: Path) -> Result:
    """Read a result file; raises as read_results."""
    try:
        found = json.loads(path.read_text())
        version = found["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no result of a study ({error})") from error
    require(version == FORMAT, f"{path}: format {version}, this version reads {FORMAT}")
    assert isinstance(found, dict)
    return found


def arrange(results: list[Result]) -> Results:
    """Sort result files by arm and seed, and check that the runs of one seed, and the seeds of one arm, can be
    compared.

    Raises:
        UserError: they were trained or tested on other text, or in another order; or an arm's seeds have several
            learning rates.
    """
    runs: dict[str, dict[int, Result]] = {}
    for result in results:
        if result["tries"] is None:
            runs.setdefault(result["arm"], {})[result["seed"]] = result
    for by_seed in runs.values():
        check_alike(list(by_seed.values()))
    for seed in sorted({seed for by_seed in runs.values() for seed in by_seed}):
        check_same([by_seed[seed] for by_seed in runs.values() if seed in by_seed])
    return Results([result for result in results if result["tries"] is not None], runs)


def check_same(results: list[Result]) -> None:
    """Refuse runs that read other text or another order, or were tested on other symbols.

    Raises:
        UserError: names the two arms and the difference.
    """
    first = results[0]
    for other in results[1:]:
        for name in _SAME:
            a, b = ({**run["options"], **run}.get(name) for run in (first, other))
            require(
                a == b,
                f"seed {other['seed']}: {first['arm']} has {name}={a}, {other['arm']} has {b}; such runs cannot be"
                " paired",
            )


def check_alike(results: list[Result]) -> None:
    """Refuse runs of one arm that differ in more than their seed.

    Raises:
        UserError: names the arm, the two seeds and the difference.
    """
    first = results[0]
    for other in results[1:]:
        for name in ("learning_rate", "steps"):
            a, b = first[name], other[name]
            require(
                a == b,
                f"{first['arm']}: seed {first['seed']} has {name}={a}, seed {other['seed']} has {b}; the seeds of an"
                " arm must be alike: remove the result files of one of them and run the study again",
            )


def best_rate(results: list[Result], arm: str) -> float | None:
    """Return the learning rate with the lowest bpc on the valid split among those that were tried with an arm; None if
    none was tried."""
    tried = [r for r in results if r["arm"] == arm and r["tries"] is not None]
    return min(tried, key=own_bpc)["tries"] if tried else None


def own_bpc(result: Result) -> float:
    """Return bits per symbol at the arm's own largest k in training; a dense model has one value."""
    return bpc_at(result, result["k_max"] or 0)


def bpc_at(result: Result, k: int) -> float:
    """Return bits per symbol at k; a dense model has one value for every k.

    Raises:
        KeyError: the run was not evaluated at k.
    """
    bpc: Mapping[str, float] = result["bpc"]
    return bpc["dense"] if "dense" in bpc else bpc[str(k)]


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; empty if there is no such file."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found
