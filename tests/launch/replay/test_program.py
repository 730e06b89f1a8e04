"""`launch.replay` as a person starts it."""

import json

import pytest

from foreroute.engine.config import MoEConfig, NgramTablesConfig
from foreroute.engine.errors import UserError
from foreroute.launch.replay.program import ReplayArgs

TABLES = "ngram_tables.rows=50", "ngram_tables.width=4", "ngram_tables.place=host"


def options(tmp_path, *more):
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 96)) * 400)
    return [
        "experiment=debug",
        "corpus=file",
        f"corpus.path={text}",
        f"corpus.cache_dir={tmp_path / 'cache'}",
        f"out={tmp_path / 'out'}",
        "data.streams=8",
        "world_size=8",
        "expert_group=4",
        *more,
    ]


def test_a_dense_run_is_refused():
    with pytest.raises(UserError, match=r"moe\.router=dense: launch.replay picks its places by expert rows"):
        ReplayArgs(moe=MoEConfig(router="dense"), ngram_tables=NgramTablesConfig(rows=50))


@pytest.mark.slow
def test_places_are_run_and_written(run, tmp_path):
    done = run(
        "replay", *options(tmp_path, "step=3:4", "cluster=cpu_2_cores", *TABLES, f"trace={tmp_path / 't.csv.gz'}")
    )
    assert done.returncode == 0, done.stderr
    assert "Rows and bytes as certified" in done.stdout
    found = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert {step["step"] for place in found for step in place["steps"]} == {3, 4}
    for place in found:
        assert place["as_certified"]
        for step, certified in zip(place["steps"], place["certified"], strict=True):
            assert step["computed_ym"] == certified["computed_ym"] and step["bytes_y"] == certified["bytes_y"]
            assert sum(step["sent_bytes_P"]) == sum(step["bytes_y"])
            assert step["landed_t"] == certified["landed_t"] and step["sent_t"] == certified["sent_t"]
            assert step["table_bytes_1"] == certified["table_bytes_1"] and step["table_bytes_1"] > [0]
        assert all(size > 0 for held in place["memory"] for size in held["peak_bytes"].values())
    page = (tmp_path / "out" / "replay.html").read_text()
    assert "What it is not" in page and "a model of cpu_2_cores" in page
    assert (tmp_path / "t.csv.gz").stat().st_size > 0


@pytest.mark.slow
def test_a_batch_is_found_by_running_it(run, tmp_path):
    done = run("replay", *options(tmp_path, "step=3", "rank=2", "find=batch", "device_memory_gb=0.0012"))
    assert done.returncode == 0, done.stderr
    *tried, answer = [line for line in done.stdout.splitlines() if "streams" in line]
    held = {int(line.split()[0]): float(line.split(": ")[-1].split()[0]) for line in tried if "GB" in line}
    most = int(answer.split()[2])
    assert held[most] <= 0.0012 < held[most + 1]
