"""A study from end to end with real runs of seconds: two arms, two seeds; killed and started again; and its page."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from foreroute.engine.errors import UserError
from foreroute.launch.study.program import StudyArgs
from foreroute.launch.testing.runs import processes_of, wait_until

ROOT = Path(__file__).resolve().parents[3]
PRESET = {
    "arms": {
        "dense": {"experiment": "debug", "options": ["moe.router=dense"], "kin": "dense"},
        "frozen": {"experiment": "debug", "options": ["moe.router=frozen"]},
    },
    "seeds": [1, 2],
    "options": ["train.log_every=1", "eval.max_symbols=256"],
    "k": [1, 2, 4],
    "points": 4,
    "valid_symbols": 128,
    "checkpoints": 4,
    "analysed_symbols": 128,
}
NAMES = {"dense-seed1", "dense-seed2", "frozen-seed1", "frozen-seed2"}


def start(tmp_path, out, text, *more, **preset):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**PRESET, **preset}))
    options = [
        f"preset={file}",
        "corpus=file",
        f"corpus.path={text}",
        f"corpus.cache_dir={tmp_path}/cache",
        f"out={out}",
        f"docs={tmp_path}/docs",
        *more,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.study", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finished(process, code=0):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output
    return output


def results(out):
    return {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}


def untimed(result):
    """A result without what depends on the machine."""
    rest = {name: value for name, value in result.items() if name != "measured"}
    points = [{name: value for name, value in point.items() if name != "seconds"} for point in rest["curve"]]
    return {**rest, "curve": points}


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_as_if_it_never_was(tmp_path, text):
    """One study runs through; another is killed in the middle of a run, with that run, and started again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(start(tmp_path, whole, text, "jobs=2"))
    expected = results(whole)
    assert set(expected) == NAMES

    process = start(tmp_path, killed, text, "jobs=1")
    log = killed / "runs/frozen-seed1/metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 8, seconds=600)
    for running in processes_of(killed):
        running.kill()
    process.communicate()
    wait_until(lambda: not processes_of(killed))
    assert set(results(killed)) < NAMES
    line = finished(start(tmp_path, killed, text, "jobs=2"))
    assert {name: untimed(run) for name, run in results(killed).items()} == {
        name: untimed(run) for name, run in expected.items()
    }
    assert "[1/4] runs are done" in line and "frozen-seed1: goes on" in line
    assert untimed(expected["frozen-seed1"]) != untimed(expected["frozen-seed2"])  # the comparison sees something

    check_results(expected)
    output = finished(start(tmp_path, whole, text, "report=true"))
    page = (tmp_path / "docs/tiny.md").read_text()
    assert "4 of 4" in page and f"written: {tmp_path}/docs/tiny.md" in output
    found = json.loads((tmp_path / "docs/tiny.json").read_text())
    assert found["arms"]["frozen"]["2"]["n"] == 2 and len(found["results"]) == 4


def check_results(found):
    """What must hold whatever the numbers are."""
    for name, run in found.items():
        assert [point["step"] for point in run["curve"]] == [5, 10, 15, 20], name
        assert all(a["seconds"] < b["seconds"] for a, b in zip(run["curve"], run["curve"][1:], strict=False))
        assert run["curve"][-1]["seconds"] == pytest.approx(run["measured"]["training_seconds"])
        assert set(run["bpc"]) == ({"dense"} if run["arm"] == "dense" else {"1", "2", "4"})
    assert found["dense-seed1"]["analysis"] is None
    analysis = found["frozen-seed1"]["analysis"]
    assert analysis["symbols"] == 128 and analysis["routes"]["4"]["load_max_over_mean"] == 1
    assert abs(analysis["weight_similarity"]["start"]) < 0.05 < analysis["weight_similarity"]["end"]
    between = analysis["routing_change"]["between"]
    assert [(c["from"], c["to"]) for c in between] == [(0, 5), (5, 10), (10, 15), (15, 20), (0, 20)]
    assert between[0]["share"] > 0  # a frozen router reads hidden states, which training changes


@pytest.mark.slow
def test_a_rate_is_tried_for_each_kin_and_taken(tmp_path, text):
    """A rate of 0 learns nothing, so the other one is taken; SIGTERM ends a study with its code, and it goes on."""
    more = {"learning_rates": [0.0, 0.01], "tuning_steps": 8, "seeds": [1], "arms": {**PRESET["arms"]}}
    more["arms"]["frozen"] = {**more["arms"]["frozen"], "kin": "frozen"}
    process = start(tmp_path, tmp_path / "out", text, "jobs=2", **more)
    folder = tmp_path / "out/results"
    wait_until(lambda: len(list(folder.glob("tune-*.json"))) >= 2, seconds=600)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on from here" in finished(process, code=143)
    finished(start(tmp_path, tmp_path / "out", text, "jobs=2", **more))
    found = results(tmp_path / "out")
    tuning = {f"tune-{arm}-lr{rate:g}" for arm in ("dense", "frozen") for rate in (0, 0.01)}
    assert set(found) == {*tuning, "dense-seed1", "frozen-seed1"}
    assert found["dense-seed1"]["learning_rate"] == found["frozen-seed1"]["learning_rate"] == 0.01
    assert {run["split"] for name, run in found.items() if name.startswith("tune")} == {"valid"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["jobs=0"], "jobs=0: must be at least 1"),
        (["time_limit_minutes=0"], "time_limit_minutes=0.0: must be above 0"),
        (["preset=none_such"], "preset=none_such: must be one of"),
        (["corpus=file", "corpus.path=/does/not/exist"], "/does/not/exist: no such file"),
        (["report=true", "out=/does/not/exist", "docs=/neither/does/this"], "no result file"),
        (["jbos=2"], "jbos"),
    ],
)
def test_wrong_options_are_one_line(run, tmp_path, options, words):
    done = run("study", f"out={tmp_path}/out", *options)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_arm_that_is_wrong_is_refused_before_anything_runs(run, tmp_path, text):
    file = tmp_path / "wrong.yaml"
    for arm, words in (
        ({"experiment": "debug", "options": ["moe.exprts=2"]}, "moe.exprts"),
        ({"experiment": "none_such"}, "none_such"),
        ({"experiment": "debug", "options": ["train.steps=7"]}, "points=4: must divide train.steps=7"),
    ):
        file.write_text(yaml.safe_dump({**PRESET, "arms": {"a": arm}}))
        done = run(
            "study",
            f"preset={file}",
            "corpus=file",
            f"corpus.path={text}",
            f"corpus.cache_dir={tmp_path}/cache",
            f"out={tmp_path}/out",
        )
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out/runs").exists()


def test_the_folder_follows_the_preset():
    assert StudyArgs(preset="a/b/mine.yaml").folder == Path("runs/study_mine")
    with pytest.raises(UserError, match="jobs=-1"):
        StudyArgs(jobs=-1)
