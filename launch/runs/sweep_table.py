"""The results of a sweep: a table of its runs in the terminal, the best first, and the same in runs/NAME.sweep.json."""

import json
from pathlib import Path
from typing import Any

from foreroute.launch.runs.folder import SUMMARY, write_json
from foreroute.launch.start.console import table
from foreroute.launch.start.jobs import Outcome
from foreroute.launch.start.options import command_option, swept_name


def report_sweep(outcomes: list[Outcome]) -> None:
    """Print and write the end and the result of each run; runs without a result come last.

    Runs of earlier sweeps of the same name stay, as long as their folders exist.
    """
    if not outcomes:
        return
    train = outcomes[0].config["train"]
    file = Path(train["runs_dir"]) / f"{train['name']}.sweep.json"
    now = [_run(outcome) for outcome in outcomes]
    runs = sorted([*now, *_earlier(file, now)], key=lambda run: run["best_bpc"] or float("inf"))
    print(sweep_table(runs))
    write_json(file, {"runs": runs})
    print(f"{len(runs)} runs, {sum(run['state'] == 'complete' for run in runs)} complete: {file}")
    asked = command_option("run", file.with_name(train["name"]))
    print(f"python -m launch.report {asked} makes a page of them")


def _earlier(file: Path, now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs of the file that are not of this sweep."""
    if not file.exists():
        return []
    again = {run["name"] for run in now}
    found: list[dict[str, Any]] = json.loads(file.read_text())["runs"]
    return [run for run in found if run["name"] not in again and (file.parent / run["name"]).is_dir()]


def _run(outcome: Outcome) -> dict[str, Any]:
    """Return the facts about one run."""
    train = outcome.config["train"]
    name = swept_name(train["name"], outcome.swept)
    summary: dict[str, Any] = {}
    if outcome.exit_code == 0:
        summary = json.loads((Path(train["runs_dir"]) / name / SUMMARY).read_text())
    bpc = summary.get("bpc", {})
    best_k = min(bpc, key=lambda k: bpc[k]) if bpc else None
    return {
        "name": name,
        "options": outcome.options,
        "state": _state(outcome.exit_code),
        "exit_code": outcome.exit_code,
        "reason": outcome.reason,
        "bpc": bpc,
        "best_k": best_k,
        "best_bpc": bpc.get(best_k),
        "tokens_per_second": summary.get("tokens_per_second"),
    }


def _state(exit_code: int | None) -> str:
    if exit_code is None:
        return "not started"
    return "complete" if exit_code == 0 else "stopped" if exit_code >= 128 else "failed"


def sweep_table(runs: list[dict[str, Any]]) -> str:
    """Lay out runs, with a column for each option in which they differ."""
    names = list(dict.fromkeys(name for run in runs for name in run["options"]))
    differ = [name for name in names if len({run["options"].get(name) for run in runs}) > 1]
    reasons = any(run.get("reason") for run in runs)
    rows = [
        [
            *(run["options"].get(name, "") for name in differ),
            "" if run["best_bpc"] is None else f"{run['best_bpc']:.3f}",
            run["best_k"] or "",
            "" if run["tokens_per_second"] is None else f"{run['tokens_per_second']:,.0f}",
            run["state"],
            run["name"],
            *([run.get("reason") or ""] if reasons else []),
        ]
        for run in runs
    ]
    last = ["run", "reason"] if reasons else ["run"]
    return table([*differ, "best bpc", "at k", "tok/s", "state", *last], rows)
