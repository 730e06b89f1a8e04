"""A finished run that is trained further, one that ends sooner, and what it then says of its schedules."""

import json

import pytest

from foreroute.engine.config import Decay, Growth, OptimConfig, ScheduleConfig
from foreroute.launch.runs.lengths import other_length
from foreroute.launch.testing.runs import small_run

FREE = ["optim.decay=constant", "schedule.growth=constant"]
"""Nothing depends on train.steps."""


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture
def train(run, tmp_path):
    options = [*small_run(tmp_path), "train.log_every=1", "optim.warmup_steps=0", f"train.runs_dir={tmp_path}"]

    def train(name, steps, *more):
        return run("train", *options, f"train.name={name}", f"train.steps={steps}", *more)

    return train


def test_a_finished_run_goes_on(train, tmp_path):
    """It is the longer run where nothing depends on the length, bit for bit; the first end's results stay."""
    assert train("long", 5, *FREE).returncode == 0
    assert train("run", 3, *FREE).returncode == 0
    first = json.loads((tmp_path / "run/summary.json").read_text())
    done = train("run", 5, *FREE, "train.resume=true")
    assert done.returncode == 0, done.stderr
    assert "train.steps=5, so far 3: nothing else depends on it, the run is the same as one of 5 steps" in done.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "long")
    last = json.loads((tmp_path / "run/summary.json").read_text())
    assert last["bpc"] == json.loads((tmp_path / "long/summary.json").read_text())["bpc"]
    assert json.loads((tmp_path / "run/summary-3.json").read_text()) == first
    assert json.loads((tmp_path / "run/facts.json").read_text())["lengths"] == [[0, 3], [3, 5]]
    again = train("run", 5, *FREE, "train.resume=true")
    assert again.returncode == 0 and "is complete" in again.stdout


def test_a_length_below_what_is_done_is_refused(train, tmp_path):
    assert train("run", 4).returncode == 0
    done = train("run", 2, "train.resume=true")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("train.steps=2: the run in " + str(tmp_path / "run") + " is at step 4 already")
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4


def test_what_becomes_of_the_schedules():
    def becomes(k_steps=None, **optim):
        schedule = ScheduleConfig(Growth.linear, 1, 4, k_steps)
        return other_length(OptimConfig(lr=1.0, final_lr=0.0, **optim), schedule, 100, before=100, now=200)

    assert (
        becomes()
        == "train.steps=200, so far 100: step 101 has learning rate 0.5 (so far 0) and k = 3 (so far 4), as in a run of"
        " 200 steps; the steps before it are those of a run of 100"
    )  # 1 + round(3 / 2), half to even
    assert "k = 4 (so far 4)" in becomes(50)
    assert "the same as one of 200 steps" in becomes(50, decay=Decay.constant)
