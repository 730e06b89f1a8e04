"""facts.json of real runs against what is known of them from elsewhere; and the same run in W&B."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

import foreroute.launch.runs.facts
from foreroute.engine.data.corpus import prepare
from foreroute.engine.metrics.names import METRICS, WANDB_ID
from foreroute.engine.model.build import build_model
from foreroute.launch.start.config_files import read_config
from foreroute.launch.testing.wandb_log import offline_runs

ROOT = Path(__file__).resolve().parents[3]


def options(tmp_path, text, *more):
    return [
        "experiment=debug",
        "corpus=file",
        f"corpus.path={text}",
        f"corpus.cache_dir={tmp_path / 'cache'}",
        f"train.runs_dir={tmp_path / 'runs'}",
        "train.steps=4",
        "train.log_every=2",
        "train.threads=1",
        "eval.k=[1,4]",
        "eval.max_symbols=256",
        *more,
    ]


def facts_of(folder):
    return json.loads((folder / "facts.json").read_text())


def test_a_run_held_to_a_certificate(run, tmp_path, text):
    """Certified bytes per step are 0 on one rank; the numbers of a k come from that k's part of the certificate."""
    folder = tmp_path / "certificate"
    assert run("certify", *options(tmp_path, text), f"out={folder}").returncode == 0
    done = run("train", *options(tmp_path, text), f"certificate={folder}", "train.peak_tflops=0.5")
    assert done.returncode == 0, done.stderr
    here = tmp_path / "runs/debug"
    facts, config = facts_of(here), read_config(here / "config.yaml")
    corpus = prepare(config.corpus)
    model = build_model(config, corpus.vocab.size)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert list(facts["active_parameters"]) == list(facts["flops_per_symbol"]) == ["1", "2", "3", "4"]
    assert facts["active_parameters"]["4"] == facts["parameters"]
    assert facts["symbols_per_step"] == 128 and facts["steps"] == 4
    assert (facts["ranks"], facts["expert_ranks"], facts["nodes"], facts["router"]) == (1, 1, 1, "hashed")
    assert facts["corpus"] == {"name": "file", "symbols": len(corpus.ids), "sha256": corpus.sha256, "tokens": "bytes"}
    assert (facts["peak_flops"], facts["peak_source"]) == (0.5e12, "train.peak_tflops")
    assert facts["versions"]["torch"] == torch.__version__
    certified = json.loads((folder / "certificate.json").read_text())["by_k"]
    assert facts["certificate"]["path"] == str(folder / "certificate.json")
    assert facts["certificate"]["wire_bytes_by_k"] == {str(part["k"]): 0.0 for part in certified}
    (started,) = facts["started"]
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(started)).total_seconds()) < 600
    last = json.loads((here / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["active_parameters"] == facts["active_parameters"][str(last["k"])]


def test_certified_bytes_are_a_mean_over_the_steps_of_a_k(run, tmp_path, text):
    folder = tmp_path / "certificate"
    args = options(tmp_path, text), "world_size=2", "expert_group=2", f"out={folder}"
    assert run("certify", *args[0], *args[1:]).returncode == 0
    written = foreroute.launch.runs.facts.Written(
        folder / "certificate.json", json.loads((folder / "certificate.json").read_text())
    )
    found = foreroute.launch.runs.facts._of_certificate(written)["wire_bytes_by_k"]
    ranks = [written.of_rank(rank) for rank in range(2)]
    steps = {"1": [0], "2": [1], "3": [2, 3]}  # linear growth over four steps
    sections = {str(part["k"]): part["steps"] for part in written.facts["by_k"]}
    assert sections == {k: len(chosen) for k, chosen in steps.items()}
    for k, chosen in steps.items():
        sent = [sum(int(rank.bytes_uy[rank.find(step)].sum()) for rank in ranks) for step in chosen]
        assert found[k] == pytest.approx(sum(sent) / len(chosen)) and sum(sent) > 0


def test_a_dense_run(run, tmp_path, text):
    done = run("train", *options(tmp_path, text, "moe.router=dense"))
    assert done.returncode == 0, done.stderr
    facts = facts_of(tmp_path / "runs/debug")
    assert facts["active_parameters"] == {"dense": facts["parameters"]}
    assert list(facts["flops_per_symbol"]) == ["dense"] and facts["certificate"] is None
    assert facts["peak_flops"] == 0 and facts["peak_source"].startswith("unknown")


def test_the_code_of_a_checkout_and_of_a_copy(tmp_path, monkeypatch):
    """A copy without .git has no commit, also inside somebody else's checkout."""

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(foreroute.launch.runs.facts, "ROOT", tmp_path)
    version = foreroute.launch.runs.facts.code()["version"]
    assert version == foreroute.__version__ == importlib.metadata.version("foreroute")
    assert foreroute.launch.runs.facts.code() == {"version": version, "commit": None, "changed": None}
    git("init", "-q")
    git("add", "pyproject.toml")
    git("commit", "-q", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert foreroute.launch.runs.facts.code() == {"version": version, "commit": commit, "changed": False}
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    assert foreroute.launch.runs.facts.code() == {"version": version, "commit": commit, "changed": True}
    (tmp_path / "inner").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "inner")
    monkeypatch.setattr(foreroute.launch.runs.facts, "ROOT", tmp_path / "inner")
    assert foreroute.launch.runs.facts.code()["commit"] is None
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(foreroute.launch.runs.facts, "ROOT", tmp_path)
    assert foreroute.launch.runs.facts.code()["commit"] is None


def start(tmp_path, text, *more):
    watched = "moe.spread=1", "train.name=grid", "wandb.mode=offline", "train.valid_every=2", *more
    command = [sys.executable, "-m", "launch.train", "-m", *options(tmp_path, text, *watched)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").glob("grid*/")
    return folder


@pytest.mark.slow
def test_a_watched_sweep(tmp_path, text):
    """Every metric, the sweep as group, results and facts are in W&B."""
    folder = start(tmp_path, text)
    first, (seen,) = facts_of(folder), offline_runs(folder)
    names = {name.split("/")[0] for row in seen.history.values() for name in row}
    assert set(METRICS) - {"link_bytes"} <= names and sorted(seen.history) == [2, 4]
    assert seen.history[2]["tokens"] == 2 * 128
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "valid_bpc" in line]
    for row, line, valid in zip(seen.history.values(), training, validation, strict=True):
        assert row["expert_rows/1"]["values"] == line["expert_rows"][1]
        assert (row["k"], row["flops"]) == (line["k"], line["flops"]) and line["flops"] == valid["flops"]
        assert set(valid) == {"step", "valid_loss", "valid_bpc", "tokens", "flops", "k"}
    assert (seen.run.run_group, seen.run.job_type) == ("grid", "train")
    assert seen.config["facts"] == first and seen.config["moe"]["spread"] == 1
    bpc = json.loads((folder / "summary.json").read_text())["bpc"]
    assert {name: seen.summary[f"test_bpc/k{name}"] for name in ("1", "4")} == bpc


@pytest.mark.slow
def test_a_watched_run_that_is_started_again(tmp_path, text):
    """It goes on in the same W&B run."""
    folder = start(tmp_path, text)
    first = facts_of(folder)
    (folder / "summary.json").unlink()  # as if it had been stopped in the evaluation
    start(tmp_path, text, "train.resume=true")
    again = offline_runs(folder)
    assert all(one.run.resume for one in again)  # so that wandb sync appends
    assert [one.run.run_id for one in again] == [(folder / WANDB_ID).read_text().split()[0]] * 2
    assert facts_of(folder)["started"][0] == first["started"][0]
    assert len(facts_of(folder)["started"]) == 2
