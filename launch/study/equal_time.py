"""Compute the steps of an arm that trains as long as another one (same_time_as), from the seconds per step of the runs
that tried learning rates.

The steps are computed once and kept in steps.json of the study's folder, so that a resumed study makes the same runs.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from foreroute.launch.study.preset import Job, Preset, with_steps
from foreroute.launch.study.results import Result

STEPS = "steps.json"


def waits_for(preset: Preset, arm: str) -> list[str]:
    """Return the arms whose runs that try rates must end before an arm can start."""
    chosen = preset.arms[arm]
    return [chosen.kin, *([chosen.same_time_as] if chosen.same_time_as else [])]


def read_steps(out: Path) -> dict[str, int]:
    """Read the steps that were computed earlier, by arm; empty if there are none."""
    path = out / STEPS
    found: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    return found


def take_steps(preset: Preset, jobs: Sequence[Job], steps: Mapping[str, int]) -> list[Job]:
    """Return the jobs with the steps of their arms, as far as these are known."""
    return [with_steps(preset, job, steps[job.arm]) if job.tries is None and job.arm in steps else job for job in jobs]


def equal_time_steps(preset: Preset, jobs: Sequence[Job], arm: str, tuning: Sequence[Result]) -> int:
    """Compute how many steps of an arm take as long as all steps of the arm that it names, in whole validations.

    The fastest of the runs that tried rates counts: they do equal work, and other work of the machine only slows a run.

    Args:
        tuning: results of the runs that tried rates with this arm's kin and with the arm that it names.
    """
    mine, other = waits_for(preset, arm)
    whole = next(job.config.train.steps for job in jobs if job.arm == other and job.tries is None)
    seconds: dict[str, float] = {
        name: min(r["measured"]["training_seconds"] / r["steps"] for r in tuning if r["arm"] == name)
        for name in (mine, other)
    }
    return max(1, round(whole * seconds[other] / seconds[mine] / preset.points)) * preset.points
