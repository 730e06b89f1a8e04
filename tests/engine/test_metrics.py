"""Every sink gets every name: metrics.jsonl, console, and a W&B offline log that is parsed back record by record."""

import json
import math
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import WandbConfig, WandbMode
from engine.errors import RunFailed
from engine.metrics import METRICS, WANDB_ID, Metrics, memory_bytes, peak_memory_bytes


def open_metrics(folder: Path, wandb: WandbConfig | None = None, **options: Any) -> Metrics:
    return Metrics(
        folder, wandb or WandbConfig(), name="r", config_plain={"moe": {"experts": 7}}, **options
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_complete_while_the_run_goes_on(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    metrics.log(20, {"loss": 1.5, "k": 4})
    assert lines(tmp_path) == [{"step": 20, "loss": 1.5, "k": 4}]
    metrics.close()


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    metrics.log(1, {"loss": math.nan, "grad_norm": math.inf, "bpc": -math.inf, "k": 2})
    metrics.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "bpc": None, "k": 2}]


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
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (10, 10.0),
        (20, 20.0),
        (30, 0.5),
    ]
    open_metrics(tmp_path).close()  # a new run of the same name
    assert lines(tmp_path) == []
    open_metrics(tmp_path / "new", resume_step=5).close()  # nothing there yet
    assert lines(tmp_path / "new") == []


def test_memory_is_in_bytes() -> None:
    before = memory_bytes()
    block = bytearray(b"x" * 80_000_000)
    assert 60_000_000 < memory_bytes() - before < 160_000_000
    assert peak_memory_bytes() >= memory_bytes() - 1_000_000
    assert len(block) == 80_000_000


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    assert all(metric.unit and metric.meaning for metric in METRICS.values())
    assert {"loss", "bpc", "k", "tokens_per_second", "wire_bytes", "mfu"} <= set(METRICS)


def _records(file: Path) -> Iterator[bytes]:
    """Parse W&B's record log: 7 bytes header, then 32 KiB blocks of (crc32, length, type) + payload.

    Type 1 is a whole record, 2 a first, 3 a middle and 4 a last part; a block's last bytes, if too few for a record's
    head, are padding.
    """
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        payload = data[position + 7 : position + 7 + length]
        assert zlib.crc32(bytes([kind]) + payload) == crc
        position += 7 + length
        parts = payload if kind in (1, 2) else parts + payload
        if kind in (1, 4):
            yield parts


def _offline_log(folder: Path) -> tuple[dict[int, dict[str, Any]], Any]:
    """The history of an offline run by step, and its run record."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history: dict[int, dict[str, Any]] = {}
    run = None
    for data in _records(file):
        record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            run = record.run
        if record.WhichOneof("record_type") == "history":
            items = {
                i.key or "/".join(i.nested_key): json.loads(i.value_json)
                for i in record.history.item
            }
            history[items["_step"]] = items
    return history, run


OFFLINE = """
import sys
from pathlib import Path
from engine.config import WandbConfig, WandbMode
from engine.errors import RunFailed
from engine.metrics import METRICS, Metrics
wandb = WandbConfig(mode=WandbMode.offline, project="study", group="hashed")
metrics = Metrics(Path(sys.argv[1]), wandb, name="r", config_plain={"moe": {"experts": 7}})
for step in range(1, 41):  # more than one block of the log
    metrics.log(step, {name: step + i / 64 for i, name in enumerate(METRICS)})
metrics.log(41, {"loss": float("nan")})
metrics.close()
"""


def test_offline_wandb_run_has_everything(tmp_path: Path) -> None:
    """In a process of its own, so that all its output is seen."""
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    history, run = _offline_log(tmp_path)
    assert sorted(history) == list(range(1, 42))
    for step in (1, 40):
        for i, name in enumerate(METRICS):
            assert history[step][name] == step + i / 64
    assert (run.project, run.run_group, run.display_name) == ("study", "hashed", "r")
    assert run.run_id == (tmp_path / WANDB_ID).read_text()
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["moe"] == {"experts": 7}
    assert len(lines(tmp_path)) == 41


def test_wandb_id_is_kept_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options))
    online = WandbConfig(mode=WandbMode.online, group="g")
    open_metrics(tmp_path, online)
    open_metrics(tmp_path, online, resume_step=5)
    open_metrics(tmp_path, online)
    ids = [call["id"] for call in calls]
    assert ids[0] == ids[1] != ids[2]
    assert all(call["resume"] == "allow" and call["mode"] == "online" for call in calls)
    assert all(call["group"] == "g" and Path(call["dir"]) == tmp_path for call in calls)


def test_disabled_wandb_is_not_even_imported(tmp_path: Path) -> None:
    code = (
        OFFLINE.replace("WandbMode.offline", "WandbMode.disabled")
        + "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=100)
    assert not (tmp_path / "wandb").exists() and not (tmp_path / WANDB_ID).exists()
