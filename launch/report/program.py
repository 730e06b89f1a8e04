"""One page about a run, several runs or a sweep: `python -m launch.report run=runs/NAME`.

The program reads the runs' folders (launch/report/run_data.py) and writes one HTML file, which needs no network and no
other file. A run may still be training, have failed, or be of an earlier version: the page names the files and metrics
that are missing.
"""

import json
import os
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreroute.engine.config.option import option, required
from foreroute.engine.errors import UserError, require
from foreroute.engine.sealed_files import replacing
from foreroute.launch.page.html_file import html
from foreroute.launch.page.parts import Page
from foreroute.launch.report.one_run import run_page
from foreroute.launch.report.run_data import plain_dict, read_run
from foreroute.launch.report.several_runs import Absent, several_page
from foreroute.launch.start.cli import run_program

_SWEEP = ".sweep.json"
_GENERATOR = "foreroute launch.report"


@dataclass
class ReportArgs:
    """Options."""

    run: Any = required(
        "A run's folder, or a list of them, or what a sweep is called: runs/NAME or runs/NAME.sweep.json."
    )
    out: str | None = option(
        None,
        "The file to write; None means report.html in the run's folder, beside several runs' folders, or "
        "runs/NAME.report.html.",
    )
    open: bool = option(False, "Show it in the browser.")

    def __post_init__(self) -> None:
        asked = self.runs
        require(
            bool(asked) and all(isinstance(name, str) and name for name in asked),
            f"run={self.run}: must be a folder of a run, or a list of such folders",
        )
        require(len(set(asked)) == len(asked), f"run={asked}: names a run twice")

    @property
    def runs(self) -> list[str]:
        """The runs that were asked for, as a list."""
        return list(self.run) if isinstance(self.run, Sequence) and not isinstance(self.run, str) else [self.run]


def report(args: ReportArgs) -> int:
    """Write the page; return the exit code."""
    asked = [Path(name) for name in args.runs]
    sweep = _sweep_file(asked[0]) if len(asked) == 1 else None
    if sweep is not None:
        page, out = _sweep_page(sweep), sweep.with_name(_name_of(sweep) + ".report.html")
    elif len(asked) == 1:
        page, out = run_page(read_run(asked[0])), asked[0] / "report.html"
    else:
        page = several_page("Comparison of runs", [read_run(folder) for folder in asked])
        out = asked[0].absolute().parent / "report.html"
    out = Path(args.out) if args.out else out
    _check_target(out)
    text = html(page, _GENERATOR)
    with replacing(out) as new:
        new.write_text(text, encoding="ascii")
    print(f"written: {out} ({len(text) / 1e6:.1f} MB)")
    if args.open:
        webbrowser.open(out.resolve().as_uri())
    return 0


def _sweep_file(asked: Path) -> Path | None:
    """Return the sweep's file if a sweep was asked for, else None."""
    if asked.name.endswith(_SWEEP):
        return asked
    beside = asked.with_name(asked.name + _SWEEP)
    return beside if not asked.is_dir() and beside.is_file() else None


def _name_of(sweep: Path) -> str:
    return sweep.name.removesuffix(_SWEEP)


def _sweep_page(sweep: Path) -> Page:
    try:
        listed = plain_dict(json.loads(sweep.read_text())).get("runs")
    except FileNotFoundError:
        raise UserError(f"run={sweep}: no such file") from None
    except ValueError as error:
        raise UserError(f"run={sweep}: is no file of a sweep: {error}") from error
    if not isinstance(listed, list) or not all(isinstance(plain_dict(run).get("name"), str) for run in listed):
        raise UserError(f"run={sweep}: is no file of a sweep: it lists no runs")
    runs, absent = [], []
    for run in listed:
        try:
            runs.append(read_run(sweep.parent / run["name"]))
        except UserError:
            absent.append(Absent(run["name"], str(run.get("state", "unknown"))))
    return several_page(f"Sweep {_name_of(sweep)}", runs, absent)


def _check_target(out: Path) -> None:
    """Refuse a target that cannot be written, or that holds anything but a report."""
    folder = out.absolute().parent
    require(not out.is_dir(), f"out={out}: is a folder; must be a file")
    require(
        folder.is_dir() and os.access(folder, os.W_OK), f"out={out}: {folder} is not a folder that can be written to"
    )
    if out.exists():
        with out.open(errors="replace") as file:
            start = file.read(4096)
        require(f'content="{_GENERATOR}"' in start, f"out={out}: exists, and is no report that launch.report wrote")


def main() -> None:
    """Run the program."""
    run_program("report", ReportArgs, report)


if __name__ == "__main__":
    main()
