"""Read the log of an offline W&B run, for tests: wandb has no public reader of its log.

The log is LevelDB's record format after a header of 7 bytes. A block has 32 KiB; a record in it is (crc32, length,
type) and a payload. Type 1 is a whole record, 2 a first, 3 a middle and 4 a last part. The last bytes of a block are
padding if they are too few for a record's head. A payload is a protocol buffer of wandb's.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Offline:
    """One offline run."""

    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by step
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)  # that was set, not what W&B makes of the history
    metrics: dict[str, Any] = field(default_factory=dict)  # MetricRecord of each that was defined
    run: Any = None  # RunRecord
    exit_code: int | None = None


def offline_runs(folder: Path) -> list[Offline]:
    """Read the runs of a run's folder, the oldest first."""
    return [_read(file) for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _records(file: Path) -> Iterator[bytes]:
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


def _items(items: Any) -> dict[str, Any]:
    """Merge items into one dict; a histogram comes field by field, under [its name, the field's]."""
    found: dict[str, Any] = {}
    for item in items:
        *outer, name = list(item.nested_key) or [item.key]
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[name] = json.loads(item.value_json)
    return found


def _read(file: Path) -> Offline:
    from wandb.proto import wandb_internal_pb2

    found = Offline()
    for data in _records(file):
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= _items(record.run.config.update)
        elif kind == "history":
            items = _items(record.history.item)
            found.history[items["_step"]] = items
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found
