"""A bar on a terminal, lines elsewhere; colours on a terminal alone."""

import fcntl
import io
import os
import select
import struct
import subprocess
import sys
import termios
from contextlib import contextmanager
from pathlib import Path

import pytest

from foreroute.launch.page.parts import Page
from foreroute.launch.page.terminal import print_top
from foreroute.launch.runs.summary import result_table, training_totals
from foreroute.launch.start.console import Console, Stages, clock, styled, table

ROOT = Path(__file__).resolve().parents[3]
RED = "\x1b[31m"


@contextmanager
def terminal(columns=80, lines=24):
    """A terminal to write to, and a function that gives what was written."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    with os.fdopen(writer, "w") as out:

        def written():
            out.flush()
            parts = []
            while select.select([reader], [], [], 0.2)[0]:  # what is written arrives in parts
                parts.append(os.read(reader, 100_000))
            return b"".join(parts).decode()

        yield out, written
    os.close(reader)


def show(columns, lines, monkeypatch):
    with terminal(columns, lines) as (out, written):
        monkeypatch.setattr(sys, "stdout", out)
        console = Console(10)
        console.step(5)
        console.metrics(5, {"loss": 1.0, "bpc": 1.5, "k": 4, "tokens_per_second": 1234.0}, 3.0)
        console.step(6)
        console.close()
        return written()


@pytest.mark.parametrize(("columns", "lines", "bar"), [(80, 24, True), (0, 24, False), (80, 0, False), (40, 24, True)])
def test_a_terminal_without_a_size_gets_lines(monkeypatch, columns, lines, bar):
    """mpirun gives its processes one when its own output goes to a file; a bar would be empty there."""
    written = show(columns, lines, monkeypatch)
    assert ("%|" in written) == bar and ("step 5/10  loss 1.000" in written) != bar


def test_the_bar_says_where_the_run_stands(monkeypatch):
    last = show(80, 24, monkeypatch).strip().split("\r")[-1]
    for word in ("6/10", "<", "loss 1.000", "bpc 1.500", "k 4", "tok/s 1,234"):
        assert word in last, last


def test_a_narrow_terminal_keeps_the_time_left_and_never_wraps(monkeypatch):
    lines = show(40, 24, monkeypatch).strip().split("\r")
    assert all(len(line) <= 40 for line in lines), lines
    assert "6/10 [" in lines[-1] and "<" in lines[-1] and "tok/s" not in lines[-1]


def test_a_file_gets_plain_lines(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    console = Console(10)
    console.step(5)
    console.metrics(5, {"loss": 1.0, "bpc": 1.5, "k": 4, "tokens_per_second": 1234.0}, 75.0)
    console.close()
    assert out.getvalue() == "step 5/10  loss 1.000 bpc 1.500 k 4 tok/s 1,234  left 1:15\n"
    assert clock(3725) == "1:02:05"


def go_through_stages(progress):
    for done in range(5):
        progress("k = 2", done, 4)
    for done in range(2):
        progress("bzip2 -9", done, 1)


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        (1, ["k = 2     4/4  took 0:04", "bzip2 -9  1/1  took 0:01"]),
        (7, ["k = 2     2/4  left 0:14", "k = 2     4/4  took 0:28", "bzip2 -9  1/1  took 0:07"]),
    ],
    ids=["fast", "slow"],
)
def test_stages_get_lines_in_a_file(monkeypatch, seconds, lines):
    """One at the end of each, and some on the way of a long one; each part takes `seconds`."""
    out, time = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stdout", out)
    progress = Stages(now=lambda: time[0])

    def part(stage, done, total):
        time[0] += seconds if done else 0
        progress(stage, done, total)

    go_through_stages(part)
    assert out.getvalue().splitlines() == lines


def test_stages_get_a_bar_that_is_gone_at_the_end(monkeypatch):
    with terminal() as (out, written):
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr("foreroute.launch.start.console.tqdm.monitor_interval", 0)
        progress = Stages()
        progress("k = 2", 0, 4)
        first = written()
        assert "k = 2" in first and "0/4 [" in first and "<" in first
        go_through_stages(progress)
        progress.close()
        last = written()
        assert "bzip2 -9" in last and "0/1 [" in last and "took" not in last
        assert last.split("\r")[-2].strip() == ""


def test_other_ranks_show_no_stages(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    go_through_stages(Stages(enabled=False))
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
    ids=str,
)
def test_colours_are_for_terminals(monkeypatch, variables, coloured):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = "foreroute: " + "a long line that is not wrapped " * 8
    page = Page("Title", "A lead.", [], [])
    with terminal() as (out, written):
        assert styled(line, "red", out) == (f"{RED}{line}\x1b[0m" if coloured else line)
        print_top(page, out)
        assert ("\x1b[" in written()) == coloured
    file = io.StringIO()
    assert styled(line, "red", file) == line
    print_top(page, file)
    assert file.getvalue().startswith("Title\n")


def test_a_table_is_as_wide_as_its_cells(monkeypatch):
    """Whatever the terminal: no cell is wrapped, cut off or read as markup."""
    monkeypatch.setenv("COLUMNS", "20")
    header = ["a", "a longer header", "reason"]
    rows = [["[red]x", "1", ":smile: " * 30 + "end"], ["y" * 70, "12,345.6", ""]]
    head, *lines = table(header, rows).splitlines()
    assert head.split("  ", 1)[0] == "a" and head.endswith("reason")
    for line, (name, number, reason) in zip(lines, rows, strict=True):
        assert line == f"{name:<70}  {number:>15}  {reason:>243}".rstrip()
    assert table(header, []).split() == ["a", "a", "longer", "header", "reason"]


def test_an_error_is_red_on_a_terminal_and_one_line_however_narrow():
    """tests/launch/start/test_cli.py has the plain line elsewhere."""
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    with terminal(30) as (out, written):
        done = subprocess.run(
            [sys.executable, "-m", "launch.dashboard", "apply=true"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=out,
        )
        assert done.returncode == 2
        line = "foreroute: entity is missing: apply=true needs entity=TEAM (or your user name)"
        assert written() == f"{RED}{line}\x1b[0m\r\n"


def test_the_summary_says_what_the_training_took(tmp_path):
    lines = [
        '{"step": 2, "step_ms": 500, "outside_ms": 50, "tokens": 200, "flops": 1e9}',
        '{"step": 2, "valid_bpc": 3.0}',
        '{"step": 3, "step_ms": 1000, "outside_ms": 100, "tokens": 300, "flops": 1.5e9, "peak_device_memory_bytes": 0}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    totals = training_totals(tmp_path / "metrics.jsonl")
    assert totals == {"tokens_per_second": 150.0, "training_seconds": 2.0, "outside_fraction": 0.1, "flops": 1.5e9}
    summary = {
        "bpc": {"1": 3.0, "2": 2.0},
        "order2_bpc": 4.0,
        "order3_bpc": 5.0,
        "bzip2_bpc": 1.0,
        "split": "test",
        "steps": 3,
        "parameters": 12345,
        "peak_memory_bytes": 2.5e9,
        **totals,
    }
    written = result_table(summary).splitlines()
    assert written[0].split() == ["test", "split", "bpc", "to", "best"]
    assert written[1].split() == ["k", "=", "1", "3.000", "+50.0%"]
    assert written[3].split() == ["counting,", "no", "network", "bpc", "to", "best"]
    assert written[4].split() == ["order", "2", "4.000", "+100.0%"]
    assert written[7:] == [
        "training  3 steps, 300 symbols, 12,345 parameters",
        "time      0:02, 150 symbols/s, 10.0% outside forward, backward and optimizer",
        "memory    2.50 GB at most (rank 0)",
        "compute   1.5 GFLOP",
    ]
    del summary["flops"]
    assert "FLOP" not in result_table(summary)
    assert "evaluation" not in result_table(summary) and "counting  " not in result_table(summary)
    summary |= {"evaluation_seconds": 65.4, "counted_symbols": 12300}
    assert "and optimizer; evaluation 1:05" in result_table(summary)
    assert "counting  order 2 and 3 know the first 12,300 training symbols only" in result_table(summary)
    summary["peak_device_memory_bytes"] = 3e9
    assert "2.50 GB at most, 3.00 GB on the GPU (rank 0)" in result_table(summary)


FAILING = """
import os, sys
from foreroute.launch.start.console import lasting
{0}
with lasting() if {1} else open(os.devnull):
    for _ in range(9):
        print("a line", flush=True)
        print("another", file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""
READERS = {
    "a full disk": "for n in (1, 2): os.dup2(os.open('/dev/full', os.O_WRONLY), n)",
    "head": "r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.dup2(w, 2)",
    "a terminal that is gone": "m, s = os.openpty(); os.close(m); os.dup2(s, 1); os.dup2(s, 2)",
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("lasts", [True, False])
def test_a_console_that_fails_ends_nothing(tmp_path, reader, lasts):
    code = FAILING.format(reader, lasts)
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "end"], cwd=ROOT, capture_output=True)
    assert (tmp_path / "end").exists() == lasts
    assert (done.returncode == 0) == lasts
