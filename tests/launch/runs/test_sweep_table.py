"""Sweeps: a run that fails does not stop the others, a signal does, and a table tells how each ended, the best on
top."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import foreroute.launch.train
from foreroute.launch.runs.sweep_table import report_sweep, sweep_table
from foreroute.launch.start.jobs import Outcome
from foreroute.launch.start.options import swept_name
from foreroute.launch.testing.runs import wait_until

ROOT = Path(__file__).resolve().parents[3]
ROUTERS, K_MAX = ("hashed", "frozen", "learned"), ("1", "2", "4")


def options(tmp_path, text, *more):
    """The example grid, small."""
    return [
        "experiment=debug",
        "sweep=router_k_max",
        "corpus=file",
        f"corpus.path={text}",
        f"corpus.cache_dir={tmp_path / 'cache'}",
        f"train.runs_dir={tmp_path / 'runs'}",
        "train.name=grid",
        "train.steps=2",
        "train.log_every=1",
        "train.threads=1",
        "eval.max_symbols=256",
        *more,
    ]


def sweep_of(tmp_path):
    return json.loads((tmp_path / "runs/grid.sweep.json").read_text())["runs"]


def cells(runs, *names):
    return [tuple(run["options"][name] for name in names) for run in runs]


@pytest.mark.slow
def test_the_example_grid_with_failures(run, tmp_path, text, monkeypatch):
    """A wrong option in some runs, a bug in others: all of the rest are trained."""
    original = foreroute.launch.train.build_routers

    def build_routers(config, *arguments):
        if config.moe.router == "frozen":
            raise KeyError("a bug")
        return original(config, *arguments)

    monkeypatch.setattr(foreroute.launch.train, "build_routers", build_routers)
    done = run("train", *options(tmp_path, text, "schedule.k_max=9,4"))
    assert done.returncode == 2
    assert done.stderr.count("foreroute: schedule.k_max=9: must be at most moe.experts=4") == 3
    assert done.stderr.count("KeyError: 'a bug'") == 1
    runs = sweep_of(tmp_path)
    assert sorted(cells(runs, "moe.router", "schedule.k_max")) == sorted(
        (router, k) for router in ROUTERS for k in ("9", "4")
    )
    reasons = {run["reason"] for run in runs}
    assert reasons == {None, "schedule.k_max=9: must be at most moe.experts=4", "a bug: KeyError: 'a bug'"}
    assert all(reason in done.stdout for reason in reasons - {None})
    good = [run for run in runs if run["state"] == "complete"]
    assert runs[:2] == good and {run["state"] for run in runs[2:]} == {"failed"}
    assert {run["exit_code"] for run in runs} == {0, 1, 2}
    assert [run["best_bpc"] for run in good] == sorted(run["best_bpc"] for run in good)
    for entry in good:  # what the table says is what each run's own folder says
        summary = json.loads((tmp_path / "runs" / entry["name"] / "summary.json").read_text())
        assert entry["bpc"] == summary["bpc"] and entry["best_bpc"] == min(summary["bpc"].values())
        assert entry["tokens_per_second"] == summary["tokens_per_second"]
    header, *rows = done.stdout.splitlines()[-9:-2]
    assert header.split() == [
        "moe.router",
        "schedule.k_max",
        "best",
        "bpc",
        "at",
        "k",
        "tok/s",
        "state",
        "run",
        "reason",
    ]
    assert [tuple(row.split()[:2]) for row in rows] == cells(runs, "moe.router", "schedule.k_max")
    assert done.stdout.splitlines()[-2:] == [
        f"6 runs, 2 complete: {tmp_path}/runs/grid.sweep.json",
        f"python -m launch.report run={tmp_path}/runs/grid makes a page of them",
    ]


@pytest.mark.slow
def test_the_example_grid_is_whole():
    """Without a run: the options of each job, as Hydra composes them."""
    command = [sys.executable, "-m", "launch.train", "sweep=router_k_max", "--cfg", "hydra"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for line in (f"moe.router: {','.join(ROUTERS)}", f"schedule.k_max: {','.join(K_MAX)}", "mode: MULTIRUN"):
        assert line in done.stdout


@pytest.mark.slow
def test_a_signal_stops_the_sweep(run, tmp_path, text, monkeypatch):
    monkeypatch.setattr(foreroute.launch.train, "slimming_curve", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    done = run("train", *options(tmp_path, text, "moe.router=hashed", "schedule.k_max=2,4"))
    assert done.returncode == 143, done.stderr
    runs = sweep_of(tmp_path)
    assert [(run["options"]["schedule.k_max"], run["state"]) for run in runs] == [
        ("2", "stopped"),
        ("4", "not started"),
    ]
    folder = tmp_path / "runs" / runs[0]["name"]
    assert json.loads((folder / "state.json").read_text()) == {"state": "stopped", "step": 2}
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", sys.argv)  # `run` sets it
    again = options(tmp_path, text, "moe.router=hashed", "schedule.k_max=2,4", "train.resume=true")
    assert run("train", *again).returncode == 0
    assert {entry["state"] for entry in sweep_of(tmp_path)} == {"complete"}


@pytest.mark.slow
def test_the_joblib_launcher(tmp_path, text):
    """Two processes side by side, one of whose jobs fail."""
    more = ["moe.router=hashed", "schedule.k_max=9,1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-m", "launch.train", *options(tmp_path, text, *more)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == ["foreroute: schedule.k_max=9: must be at most moe.experts=4"]
    runs = sweep_of(tmp_path)
    assert [run["state"] for run in runs] == ["complete", "complete", "failed"]
    assert sorted(run["options"]["schedule.k_max"] for run in runs[:2]) == ["1", "2"]
    for entry in runs[:2]:
        assert (tmp_path / "runs" / entry["name"] / "checkpoints").is_dir()


@pytest.mark.slow
def test_a_killed_process_does_not_end_the_sweep(tmp_path, text):
    """As by the system when memory is short: joblib ends the other process, too, and gives up."""
    more = ["moe.router=hashed", "schedule.k_max=1,2,3,4", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-m", "launch.train", *options(tmp_path, text, *more)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as sweep:
        try:
            wait_until(lambda: list((tmp_path / "runs").glob("*/config.yaml")))
            workers = [p for p in psutil.Process(sweep.pid).children() if "LokyProcess" in " ".join(p.cmdline())]
            workers[0].kill()
            _, err = sweep.communicate(timeout=600)
        finally:
            sweep.kill()
    assert sweep.returncode == 1 and "Traceback" not in err, err
    runs = {run["options"]["schedule.k_max"]: run for run in sweep_of(tmp_path)}
    assert [runs[k]["state"] for k in "34"] == ["complete"] * 2
    lost = [run for run in runs.values() if run["state"] == "failed"]
    assert len(runs) == 4 and 1 <= len(lost) <= 2
    assert {run["reason"] for run in lost} == {
        "a process of the sweep was killed, and this run with it; train.resume=true goes on"
    }


def entry(bpc, code, **changed):
    number = {"best_bpc": bpc, "best_k": bpc and "2", "tokens_per_second": bpc and 1234.4}
    return {"name": "n", "options": {"a": "1", **changed}, "state": f"code {code}", **number}


def test_the_table_shows_options_that_differ():
    lines = sweep_table([entry(1.25, 0, b="x"), entry(None, 1, b="y"), entry(None, 1)]).splitlines()
    assert [line.split() for line in lines] == [
        ["b", "best", "bpc", "at", "k", "tok/s", "state", "run"],
        ["x", "1.250", "2", "1,234", "code", "0", "n"],
        ["y", "code", "1", "n"],
        ["code", "1", "n"],
    ]


def test_a_sweep_without_outcomes_says_nothing(capsys):
    report_sweep([])
    assert capsys.readouterr().out == ""


def test_an_earlier_sweep_of_the_same_name_stays_in_the_record(tmp_path, capsys):
    """As long as its folders are there; a run that was made again is there once."""
    config = {"train": {"runs_dir": str(tmp_path), "name": "x"}}
    for name in ("x-a=1", "x-a=2"):
        (tmp_path / name).mkdir()
    report_sweep([Outcome(i, {"a": str(i)}, {"a": str(i)}, config, 1) for i in (1, 2, 3)])
    report_sweep([Outcome(0, {"a": "2"}, {"a": "2"}, config, 130)])
    found = json.loads((tmp_path / "x.sweep.json").read_text())["runs"]
    assert {run["name"]: run["state"] for run in found} == {"x-a=2": "stopped", "x-a=1": "failed"}
    assert "2 runs, 0 complete" in capsys.readouterr().out


def test_a_killed_run_is_not_started(tmp_path, capsys):
    config = {"train": {"runs_dir": str(tmp_path), "name": "x"}}
    report_sweep([Outcome(0, {}, {}, config, 1), Outcome(1, {}, {"a": "1"}, config, None)])
    found = json.loads((tmp_path / "x.sweep.json").read_text())["runs"]
    assert [run["state"] for run in found] == ["failed", "not started"]
    assert "2 runs, 0 complete" in capsys.readouterr().out


def test_different_values_never_share_a_folder():
    values = ["a b", "a_b", "a/b", "ä", "ö", "世", "x" * 300, "x" * 301, "[1,2]", "[12]", "1"]
    names = [swept_name("n", {"corpus.path": value}) for value in values]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name.encode()) < 220 for name in names)
    assert swept_name("n", {"moe.spread": "1"}) == "n-moe.spread=1"
    assert swept_name("n", {"a": "ä"}) == "n-a=ä" and swept_name("n", {}) == "n"


def test_names_have_what_varies_alone(run, tmp_path, text, monkeypatch):
    """However many other options there are; and -m may stand anywhere."""
    seen = []
    named = foreroute.launch.train._named_in_sweep
    monkeypatch.setattr(foreroute.launch.train, "train", lambda args: seen.append(named(args.alone())) or 0)
    monkeypatch.setattr(foreroute.launch.train, "report_sweep", lambda outcomes: None)
    base = [
        "experiment=debug",
        "train.name=n",
        f"train.runs_dir={tmp_path / 'runs'}",
        "train.steps=2",
        "optim.clip=0.5",
    ]
    done = run("train", *base, "-m", "train.threads=1,2", "wandb.notes=a b,'c,d'")
    assert done.returncode == 0, done.stderr
    names = [config.train.name for config in seen]
    assert [config.wandb.notes for config in seen] == ["a b", "c,d"] * 2
    assert len(set(names)) == 4 and all(name.startswith("n-train.threads=") for name in names)
    assert not any("clip" in name or "steps" in name for name in names)
    done = run("train", *base, "-m", "moe.spread=1")
    assert done.returncode == 0 and "no option has several values" in done.stdout
    assert seen[-1].train.name == "n"
