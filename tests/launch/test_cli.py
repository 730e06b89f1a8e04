"""The command line as a person meets it: what is refused, with which line, and that nothing is overwritten."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(program, *args, cwd=ROOT, **env):
    import os

    return subprocess.run(
        [sys.executable, "-m", f"launch.{program}", *args],
        cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 500)
    return path


def small(tmp_path, text, *more):
    return [
        "experiment=debug", "corpus=file", f"corpus.path={text}", f"corpus.cache_dir={tmp_path / 'cache'}",
        f"train.runs_dir={tmp_path / 'runs'}", "train.steps=4", "train.log_every=2", *more,
    ]  # fmt: skip


BAD = {
    "unknown option": (["moe.exprts=3"], ["moe.exprts", "experts", "expert_width"]),
    "unknown section": (["foo.bar=1"], ["foo", "corpus", "moe"]),
    "wrong type": (["moe.experts=many"], ["moe.experts", "many"]),
    "wrong choice": (["moe.router=magic"], ["magic", "hashed", "frozen", "learned", "dense"]),
    "unknown experiment": (["experiment=nope"], ["nope", "quickstart", "enwik8_hashed"]),
    "k above E": (["schedule.k_max=5"], ["schedule.k_max=5", "moe.experts=4"]),
    "eval k above E": (["eval.k=[1,8]"], ["eval.k=[8]", "moe.experts=4"]),
    "k_min above k_max": (["schedule.k_min=4", "schedule.k_max=2"], ["schedule.k_min=4", "2"]),
    "streams": (["train.accumulation=3"], ["data.streams=4", "multiple", "3"]),
    "zero steps": (["train.steps=0"], ["train.steps=0", "at least 1"]),
    "n-gram": (["moe.ngram=4"], ["moe.ngram=4", "1, 2 or 3"]),
    "missing file": (["corpus.path=/does/not/exist"], ["/does/not/exist", "no such file"]),
    "clipping at ZeRO-0": (["train.zero_stage=0"], ["optim.clip", "zero_stage"]),
    "run name": (["train.name=../x"], ["../x", "folder name"]),
}


@pytest.mark.parametrize(("options", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_code_2(tmp_path, text, options, words):
    done = run("train", *small(tmp_path, text, *options))
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("foreroute: "), done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert not list(tmp_path.glob("runs/*/checkpoints"))


def test_empty_and_short_corpora_are_refused(tmp_path):
    for content, word in ((b"", "empty"), (b"short text, " * 12, "data.streams")):
        path = tmp_path / "small.txt"
        path.write_bytes(content)
        done = run("train", *small(tmp_path, path))
        assert done.returncode == 2 and word in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_folder_is_never_overwritten(tmp_path, text):
    first = run("train", *small(tmp_path, text))
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs/debug"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = run("train", *small(tmp_path, text))
    assert again.returncode == 2 and "already holds a run" in again.stderr
    other = run("train", *small(tmp_path, text, "train.resume=true", "optim.lr=0.5"))
    assert other.returncode == 2 and "optim.lr=0.5" in other.stderr and "0.002" in other.stderr
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("program", "options", "word"),
    [
        ("evaluate", ["run=/does/not/exist"], "/does/not/exist"),
        ("evaluate", [], "run"),
        ("generate", ["run=/does/not/exist"], "/does/not/exist"),
        ("generate", ["run=x", "top_p=2"], "top_p=2"),
        ("prepare", ["corpus=wiki"], "wiki"),
    ],
)
def test_other_programs_refuse_likewise(program, options, word):
    done = run(program, *options)
    assert done.returncode == 2 and word in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_names_groups_and_experiments():
    done = run("train", "--help")
    assert done.returncode == 0
    assert "experiment" in done.stdout and "enwik8_smoe_dropout" in done.stdout
