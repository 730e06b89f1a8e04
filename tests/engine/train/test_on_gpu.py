"""Whole programs on a GPU: a resumed run is the run that never stopped, and evaluation gives what it gives on a CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[3]
RUN = (
    "experiment=debug",
    "train.name=x",
    "train.save_every=10",
    "train.log_every=1",
    "model.dropout=0.3",
    "model.attention_dropout=0.3",
)


def program(name: str, *options: str, **environ: str) -> str:
    command = [sys.executable, "-m", f"launch.{name}", *options]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(folder: Path) -> list[float]:
    return [
        row["loss"] for row in map(json.loads, (folder / "x/metrics.jsonl").read_text().splitlines()) if "loss" in row
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    program("train", *RUN, f"train.runs_dir={folder}")
    return folder


@pytest.mark.parametrize("options", [(), ("train.precision=bf16",), ("train.zero_stage=3",)])
def test_a_resumed_run_draws_the_same_dropout(tmp_path, options):
    """From step 10; the control is another seed, whose losses are further off by far than what a GPU rounds."""
    program("train", *RUN, *options, f"train.runs_dir={tmp_path}")
    whole = losses(tmp_path)
    shutil.rmtree(tmp_path / "x/checkpoints/step-00000020")
    assert "resumed at step 10" in program("train", *RUN, *options, f"train.runs_dir={tmp_path}", "train.resume=true")
    assert losses(tmp_path) == pytest.approx(whole, rel=1e-3)
    program("train", *RUN, *options, f"train.runs_dir={tmp_path / 'other'}", "train.seed=5")
    assert losses(tmp_path / "other") != pytest.approx(whole, rel=1e-3)


def test_evaluation_is_that_on_a_cpu(run):
    told = [
        program("evaluate", f"run={run / 'x'}", "k=[1,2,4]", **device) for device in ({}, {"DS_ACCELERATOR": "cpu"})
    ]
    on_gpu, on_cpu = (json.loads(text.splitlines()[-1])["bpc"] for text in told)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_a_sample_is_that_on_a_cpu(run):
    options = f"run={run / 'x'}", "prompt=the", "length=20", "temperature=0"
    assert program("generate", *options) == program("generate", *options, DS_ACCELERATOR="cpu")
