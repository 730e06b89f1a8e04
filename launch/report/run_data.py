"""Read a run's folder for a report: complete or cut short, running or failed, of this version or an earlier one.

A missing file, line or name raises no error; RunData lists what is missing. Numbers become series over steps, symbols,
arithmetic or seconds, thinned to the resolution of a screen.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np

from foreroute.engine.config.option import by_full_name
from foreroute.engine.errors import UserError
from foreroute.engine.metrics.names import JSONL, read_lines, steps_between
from foreroute.launch.runs.folder import CONFIG, FACTS, STATE, SUMMARY
from foreroute.launch.start.config_files import read_plain

POINTS = 500  # of a line, at most
_COLUMNS, _CELLS = 150, 40_000  # of a heat map, at most


@dataclass(frozen=True, slots=True, order=True)
class Quality:
    """Bits per symbol and their source. A held-out result at the end of a run orders before every other source."""

    order: int
    bpc: float  # nan if there is none
    source: str


@dataclass(frozen=True, slots=True)
class RunData:
    """The contents of a run's folder."""

    folder: Path
    name: str
    lines: list[dict[str, Any]]  # of training steps; with "seconds" of training until then
    valid: list[dict[str, Any]]  # of validations; "tokens", "flops" and "seconds" where known
    options: dict[str, Any]  # resolved, by SECTION.NAME; empty if unknown
    facts: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # what a reader should know is not there

    def last(self, name: str) -> float:
        """Return the newest finite value of a metric; nan if there is none."""
        return next((value for line in reversed(self.lines) if isfinite(value := number(line.get(name)))), nan)

    def mean(self, name: str) -> float:
        """Return the mean of a metric over all steps; nan if there is none."""
        found = [
            (steps, value)
            for steps, line in zip(steps_between(self.lines), self.lines, strict=True)
            if isfinite(value := number(line.get(name)))
        ]
        total = sum(steps for steps, _ in found)
        return sum(steps * value for steps, value in found) / total if total else nan

    def most(self, name: str) -> float:
        """Return the largest value of a metric; nan if there is none."""
        return max((value for line in self.lines if isfinite(value := number(line.get(name)))), default=nan)

    @property
    def bpc_by_k(self) -> dict[str, float]:
        """Held-out bits per symbol at each k (or "dense"), after the end; empty before."""
        return {str(k): bpc for k, bpc in plain_dict(self.summary.get("bpc")).items() if isfinite(number(bpc))}

    @property
    def quality(self) -> "Quality":
        """The best figure for what the run reached."""
        if self.bpc_by_k:
            best = min(self.bpc_by_k, key=lambda k: self.bpc_by_k[k])
            at = "dense" if best == "dense" else f"k = {best}"
            return Quality(0, self.bpc_by_k[best], f"{self.summary.get('split', 'held-out')} split, {at}")
        for order, lines, name, source in (
            (1, self.valid, "valid_bpc", "last validation"),
            (2, self.lines, "bpc", "last line of training"),
        ):
            found = [number(line.get(name)) for line in lines]
            if found and isfinite(found[-1]):
                return Quality(order, found[-1], source)
        return Quality(3, nan, "none yet")


def read_run(folder: Path) -> RunData:
    """Read a run's folder.

    Raises:
        UserError: the folder does not exist, or holds no run.
    """
    if not folder.is_dir():
        raise UserError(f"run={folder}: no such folder")
    if not any((folder / name).is_file() for name in (CONFIG, JSONL, STATE)):
        raise UserError(f"run={folder}: is no run folder, it holds none of {CONFIG}, {JSONL}, {STATE}")
    missing: list[str] = []
    found = _read_lines(folder / JSONL, missing)
    lines = [line for line in found if "step_ms" in line or "loss" in line]
    _add_seconds(lines)
    valid = [line for line in found if "valid_bpc" in line]
    _add_places(valid, lines)
    return RunData(
        folder,
        folder.resolve().name,
        lines,
        valid,
        _read_options(folder / CONFIG, missing),
        facts=_read_object(folder / FACTS, missing),
        summary=_read_object(folder / SUMMARY, missing),
        state=_read_object(folder / STATE, missing),
        missing=missing,
    )


def number(value: Any) -> float:
    """Return a value of a file as a float; nan if it is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else nan


def plain_dict(value: Any) -> dict[str, Any]:
    """Return a value of a file as a dict; an empty one if it is not an object."""
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True)
class MetricSeries:
    """A metric over another quantity; each point is the mean of `lines` neighbouring lines."""

    x: list[float]
    mean: list[float]
    most: list[float]
    lines: int = 1


def metric_series(lines: Sequence[dict[str, Any]], name: str, x: str = "step", points: int = POINTS) -> MetricSeries:
    """Return a metric over another one, thinned to at most `points` means of neighbouring lines; empty if the metric is
    missing."""
    pairs = [(number(line.get(x)), number(line.get(name))) for line in lines]
    pairs = [(place, value) for place, value in pairs if isfinite(place)]
    if not any(isfinite(value) for _, value in pairs):
        return MetricSeries([], [], [])
    each = -(-len(pairs) // points)
    groups = [pairs[start : start + each] for start in range(0, len(pairs), each)]
    kept = [[value for _, value in group if isfinite(value)] for group in groups]
    return MetricSeries(
        [sum(place for place, _ in group) / len(group) for group in groups],
        [sum(values) / len(values) if values else nan for values in kept],
        [max(values, default=nan) for values in kept],
        each,
    )


@dataclass(frozen=True, slots=True)
class MetricGrid:
    """A metric with axes over steps."""

    steps: list[float]  # of the columns
    values: np.ndarray  # [column, *axes]; means of the lines of a column

    def __bool__(self) -> bool:
        return self.values.size > 0


def metric_grid(run: RunData, name: str, axes: int) -> MetricGrid:
    """Return a metric with axes, thinned by means to the resolution of a heat map; empty if the metric is missing.

    Lines of another shape than the last line's are left out: the run was resumed on other ranks. Of two axes the lists
    may be of unequal lengths; what a shorter one lacks is nan.
    """
    found = [
        (number(line.get("step")), np.array(_filled(line[name], axes), np.float32))
        for line in run.lines
        if _is_regular(line.get(name), axes)
    ]
    found = [(step, value) for step, value in found if value.shape == found[-1][1].shape]
    if not found:
        return MetricGrid([], np.zeros(0, np.float32))
    columns = max(2, min(_COLUMNS, _CELLS // max(1, found[0][1].size)))
    each = -(-len(found) // columns)
    groups = [found[start : start + each] for start in range(0, len(found), each)]
    steps = [sum(step for step, _ in group) / len(group) for group in groups]
    return MetricGrid(steps, np.stack([np.mean([value for _, value in group], 0) for group in groups]))


def _filled(value: list[Any], axes: int) -> list[Any]:
    """Return two axes with lists of equal lengths."""
    if axes == 1:
        return value
    most = max(map(len, value))
    return [[*part, *(most - len(part)) * [None]] for part in value]


def _is_regular(value: Any, axes: int) -> bool:
    """Check for lists within lists, of numbers or null."""
    if not isinstance(value, list) or not value:
        return False
    if axes == 1:
        return all(part is None or isinstance(part, int | float) for part in value)
    return all(isinstance(part, list) and _is_regular(part, axes - 1) for part in value)


def _read_lines(file: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Read all complete lines. A killed run, or one that is writing, can leave a part of its last line."""
    damaged: list[str] = []
    try:
        lines: list[Any] = read_lines(file, damaged)
    except OSError:
        missing.append(f"{JSONL} (no line of training was logged yet)")
        return []
    if damaged:
        missing.append(f"{len(damaged)} line{'s' if len(damaged) > 1 else ''} of {JSONL} (cut short)")
    return [line for line in lines if isinstance(line, dict) and isfinite(number(line.get("step")))]


def _read_object(file: Path, missing: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except OSError:
        missing.append(file.name)
        return {}
    except ValueError:
        missing.append(f"{file.name} (not readable)")
        return {}
    return plain_dict(value)


def _read_options(file: Path, missing: list[str]) -> dict[str, Any]:
    try:
        plain = read_plain(file)
    except UserError:
        missing.append(file.name)
        return {}
    return by_full_name({section: plain_dict(options) for section, options in plain.items()})


def _add_seconds(lines: list[dict[str, Any]]) -> None:
    seconds = 0.0
    for line, steps in zip(lines, steps_between(lines), strict=True):
        step_ms = number(line.get("step_ms"))
        seconds += steps * step_ms / 1e3 if isfinite(step_ms) else 0.0
        line["seconds"] = seconds if isfinite(step_ms) else None


def _add_places(valid: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Set the places of a validation that does not have its own to those of the newest line of training before it."""
    at = 0
    for found in valid:
        while at < len(lines) and lines[at]["step"] <= found["step"]:
            at += 1
        before = lines[at - 1] if at else {}
        for name in ("tokens", "flops", "seconds"):
            found.setdefault(name, before.get(name))
