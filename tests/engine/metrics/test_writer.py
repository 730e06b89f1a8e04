"""Every sink gets every name: metrics.jsonl, and a W&B offline log that is parsed back record by record."""

import json
import math
import mmap
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from foreroute.engine.config import WandbConfig, WandbMode
from foreroute.engine.errors import RunFailed
from foreroute.engine.metrics.host_memory import memory_bytes, peak_memory_bytes
from foreroute.engine.metrics.names import METRICS, WANDB_ID
from foreroute.engine.metrics.writer import Metrics
from foreroute.launch.testing.wandb_log import Offline, offline_runs


def open_metrics(folder: Path, wandb: WandbConfig | None = None, **options: Any) -> Metrics:
    return Metrics(folder, wandb or WandbConfig(), name="r", config_plain={"moe": {"experts": 7}}, **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_complete_while_the_run_goes_on(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    metrics.log(20, {"loss": 1.5, "k": 4})
    assert lines(tmp_path) == [{"step": 20, "loss": 1.5, "k": 4}]
    metrics.close()


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    values = {"loss": math.nan, "grad_norm": math.inf, "bpc": -math.inf, "k": 2}
    metrics.log(1, {**values, "expert_rows": [[math.nan, 1.0], [2.0, math.inf]]})
    metrics.close()
    null = {"loss": None, "grad_norm": None, "bpc": None, "k": 2}
    assert lines(tmp_path) == [{"step": 1, **null, "expert_rows": [[None, 1.0], [2.0, None]]}]


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    with pytest.raises(KeyError, match="no such metric: los, x"):
        metrics.log(1, {"x": 1.0, "loss": 1.0, "los": 1.0})
    metrics.close()
    assert lines(tmp_path) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = open_metrics(tmp_path)
    with pytest.raises(RunFailed, match=r"cannot write .*metrics.jsonl: .*No space left"):
        metrics.log(1, {"loss": 1.0})
    metrics.close()  # tries again, and does not hide the line


def test_no_step_twice_after_resuming(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    for step in (10, 20, 30):
        metrics.log(step, {"loss": float(step)})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')  # the crash
    metrics = open_metrics(tmp_path, resume_step=20)
    metrics.log(30, {"loss": 0.5})
    metrics.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(10, 10.0), (20, 20.0), (30, 0.5)]
    open_metrics(tmp_path).close()  # a new run of the same name
    assert lines(tmp_path) == []
    open_metrics(tmp_path / "new", resume_step=5).close()  # nothing there yet
    assert lines(tmp_path / "new") == []


def test_memory_is_in_bytes() -> None:
    before = memory_bytes()
    with mmap.mmap(-1, 80_000_000) as block:  # new memory, whatever the process has freed and kept
        block.write(b"x" * 80_000_000)
        assert 60_000_000 < memory_bytes() - before < 160_000_000
        assert peak_memory_bytes() >= memory_bytes() - 1_000_000


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    assert all(metric.unit and metric.meaning for metric in METRICS.values())
    axes = {(), ("rank",), ("layer",), ("layer", "expert"), ("rank", "peer")}
    assert {metric.axes for metric in METRICS.values()} == axes
    assert {"loss", "bpc", "k", "tokens_per_second", "wire_bytes", "mfu"} <= set(METRICS)


OFFLINE = """
import sys
from pathlib import Path
from foreroute.engine.config import WandbConfig, WandbMode
from foreroute.engine.metrics.names import METRICS
from foreroute.engine.metrics.writer import Metrics
wandb = WandbConfig(mode=WandbMode.offline, project="study", group="hashed", tags=["a", "b"], notes="n")
SIZES = {"rank": int(sys.argv[2]), "peer": 2, "layer": 2, "expert": 3}
def value(number, axes):
    if not axes:
        return number
    return [value(number + place, axes[1:]) for place in range(SIZES[axes[0]])]
config = {"moe": {"experts": 7}, "facts": {"ranks": 2}}
with Metrics(Path(sys.argv[1]), wandb, name="r", config_plain=config) as metrics:
    for step in range(1, 41):  # more than one block of the log
        metrics.log(step, {name: value(step + i / 64, about.axes) for i, (name, about) in enumerate(METRICS.items())
            if "valid" not in name})
    metrics.log(40, {"valid_bpc": 1.5, "valid_loss": 1.0, "k": 99, "tokens": 5, "flops": 7})
    metrics.log(41, {"loss": float("nan"), "rank_own_ms": [float("inf"), 1.0]})
    metrics.summarise({"test_bpc/k4": 1.25})
    if len(sys.argv) > 3:
        raise KeyError("a bug")
"""


def offline(folder: Path, ranks: int, *more: str) -> tuple[subprocess.CompletedProcess[str], Offline]:
    """Run the script above in a process of its own, so that all its output is seen."""
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(folder), str(ranks), *more], capture_output=True, text=True, timeout=600
    )
    (found,) = offline_runs(folder)
    return done, found


def test_offline_wandb_run_has_everything(tmp_path: Path) -> None:
    done, found = offline(tmp_path, ranks=2)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(found.history) == list(range(1, 42))
    for step in (1, 40):
        row = found.history[step]
        for i, (name, about) in enumerate(METRICS.items()):
            number = step + i / 64
            if name.startswith("valid") or (step == 40 and name in ("tokens", "flops")):
                continue
            if not about.axes:
                assert row[name] == number, name
            elif about.axes == ("rank", "peer"):
                links = [row[f"{name}/{rank}/{peer}"] for rank in range(2) for peer in range(2)]
                assert links == [number, number + 1, number + 1, number + 2]
            elif about.axes != ("layer", "expert"):
                assert [row[f"{name}/{place}"] for place in range(2)] == [number, number + 1]
        rows = found.history[step]["expert_rows/1"]
        first = step + list(METRICS).index("expert_rows") / 64 + 1
        assert rows == {"_type": "histogram", "values": [first, first + 1, first + 2], "bins": [0, 1, 2, 3]}
    assert found.history[40]["valid_bpc"] == 1.5
    assert found.history[40]["k"] == 40 + list(METRICS).index("k") / 64  # the training line's
    assert not any(name.endswith("/2") for name in found.history[1])
    assert found.summary["test_bpc/k4"] == 1.25 and found.exit_code == 0
    assert len(lines(tmp_path)) == 42


def test_the_wandb_run_says_what_it_is(tmp_path: Path) -> None:
    """And a run that failed is shown as failed."""
    done, found = offline(tmp_path, 2, "fail")
    assert done.returncode == 1 and "KeyError: 'a bug'" in done.stderr and found.exit_code == 1
    run = found.run
    assert (run.project, run.run_group, run.display_name) == ("study", "hashed", "r")
    assert (run.job_type, list(run.tags), run.notes) == ("train", ["a", "b"], "n")
    assert run.run_id == (tmp_path / WANDB_ID).read_text().split()[0]
    assert found.config["moe"] == {"experts": 7} and found.config["facts"] == {"ranks": 2}
    for name in ("valid_loss", "valid_bpc"):
        definition = found.metrics[name]
        assert (definition.step_metric, definition.summary.min) == ("tokens", True)
    assert {"tokens", "flops"} <= set(found.metrics)


def test_many_ranks_are_three_series(tmp_path: Path) -> None:
    _, found = offline(tmp_path, ranks=65)
    first = 1 + list(METRICS).index("rank_rows") / 64
    row = {name: value for name, value in found.history[1].items() if name.startswith("rank_rows")}
    assert row == {"rank_rows/min": first, "rank_rows/median": first + 32, "rank_rows/max": first + 64}
    assert len(lines(tmp_path)[0]["rank_rows"]) == 65  # the file has all of them


def test_wandb_id_is_kept_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> MagicMock:
        calls.append(options)
        return MagicMock()

    monkeypatch.setattr(wandb, "init", init)
    online = WandbConfig(mode=WandbMode.online, group="g")
    for step in (None, 5, None):
        open_metrics(tmp_path, online, resume_step=step).close()
    ids = [call["id"] for call in calls]
    assert ids[0] == ids[1] != ids[2]
    assert (tmp_path / WANDB_ID).read_text() == f"{ids[2]}\nr\n"
    assert all(call["resume"] == "allow" and call["mode"] == "online" for call in calls)
    assert all(call["group"] == "g" and Path(call["dir"]) == tmp_path for call in calls)


def test_a_copied_folder_is_another_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write into the original's otherwise. The same folder goes on, also where an older version left the id
    alone."""
    wandb = pytest.importorskip("wandb")
    ids: list[str] = []
    monkeypatch.setattr(wandb, "init", lambda **options: ids.append(options["id"]) or MagicMock())
    online, notes = WandbConfig(mode=WandbMode.online), []
    for name, step in (("first", None), ("first", 5), ("copy", 5), ("copy", 6)):
        Metrics(tmp_path, online, name=name, config_plain={}, resume_step=step, note=notes.append).close()
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert notes == ["the folder is a copy of the run first: it becomes a W&B run of its own"]
    (tmp_path / WANDB_ID).write_text("0123456789ab")
    Metrics(tmp_path, online, name="copy", config_plain={}, resume_step=5).close()
    assert ids[4] == "0123456789ab"


def test_a_slow_wandb_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are handed to a thread, which W&B may hold up; they arrive in order. An error is one note, and the run goes
    on without."""
    wandb = pytest.importorskip("wandb")
    go_on, seen = threading.Event(), []

    def log(shown: dict[str, Any], step: int) -> None:
        assert go_on.wait(600)
        seen.append(step)
        if step == 3:
            raise BrokenPipeError("the service is gone")

    run, notes = MagicMock(log=log), []
    run.finish.side_effect = BrokenPipeError
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    metrics = open_metrics(tmp_path, WandbConfig(mode=WandbMode.offline), note=notes.append)
    for step in (1, 2, 3):
        metrics.log(step, {"loss": 1.0})
    assert seen == [] and len(lines(tmp_path)) == 3
    go_on.set()
    while not notes:
        metrics.log(4, {"loss": 1.0})
    metrics.log(5, {"loss": 1.0})
    metrics.summarise({"test_bpc/k4": 1.0})
    metrics.close()
    assert seen[:3] == [1, 2, 3] and 5 not in seen and run.finish.called
    assert notes == ["W&B is lost (the service is gone): the run goes on without it, metrics.jsonl has all numbers"]
    assert lines(tmp_path)[-1]["step"] == 5


def test_disabled_wandb_is_not_even_imported(tmp_path: Path) -> None:
    code = OFFLINE.replace("WandbMode.offline", "WandbMode.disabled") + "assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path), "2"], check=True, timeout=600)
    assert not (tmp_path / "wandb").exists() and not (tmp_path / WANDB_ID).exists()
