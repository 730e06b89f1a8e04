"""Runs on real corpora: packed JSON lines with byte-pair encoding, over ranks, and a corpus beyond the memory."""

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import zstandard

from foreroute.engine.testing.ranks import Program, rank_environments
from foreroute.launch.testing.runs import TRAIN_CODE, last_step, read_losses, wait_until

SLOW = """
import time
import foreroute.engine.train.step
forward = foreroute.engine.train.step._forward
def slow(*arguments):
    time.sleep(0.2)
    return forward(*arguments)
foreroute.engine.train.step._forward = slow
"""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a small run on shards of JSON lines, with byte-pair encoding."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "shards").mkdir()
    sources = sorted((ROOT / "engine").rglob("*.py"))[:60]
    for shard in range(3):
        lines = [json.dumps({"body": path.read_text()}) + "\n" for path in sources[shard::3]]
        (folder / f"shards/{shard}.jsonl.zst").write_bytes(zstandard.compress("".join(lines).encode()))
    corpus = [
        "corpus=file",
        f"corpus.path={folder / 'shards'}",
        "corpus.field=body",
        f"corpus.cache_dir={folder}/cache",
    ]
    tokens = ["corpus.tokens=bpe", "corpus.vocab_size=400"]
    return ["experiment=debug", *corpus, *tokens, "model.dropout=0", "eval.max_symbols=512", "train.threads=1"]


def test_a_trained_run_speaks_text_and_measures_bits_per_byte(run, tmp_path, options):
    done = run("train", *options, f"train.runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "debug"
    summary = json.loads((folder / "summary.json").read_text())
    for k, bpc in summary["bpc"].items():
        assert summary["perplexity"][k] == pytest.approx(2**bpc)
        assert 1.5 < bpc / summary["bits_per_byte"][k] < 5  # bytes per symbol
    assert "order3_bpc" not in summary
    evaluated = run("evaluate", f"run={folder}", "k=[1]")
    found = json.loads(evaluated.stdout.splitlines()[-1])
    assert found["bits_per_byte"]["1"] == pytest.approx(summary["bits_per_byte"]["1"])
    written = run("generate", f"run={folder}", "prompt=def f\u00e9(", "length=12", "seed=3")
    assert written.returncode == 0 and written.stdout.startswith("def f\u00e9(") and len(written.stdout) > 15
    assert run("report", f"run={folder}").returncode == 0
    page = (folder / "report.html").read_text()
    assert "bits per byte" in page and f"{summary['bits_per_byte']['1']:.4f}" in page
    kept = folder / "tokenizer.json"
    copy = run(
        "train",
        *[o for o in options if "vocab_size" not in o and "tokens" not in o],
        *(f"train.runs_dir={tmp_path / 'copy'}", "corpus.tokens=file", f"corpus.tokenizer={kept}"),
    )
    assert copy.returncode == 0, copy.stderr
    assert read_losses(tmp_path / "copy") == read_losses(tmp_path)
    moved = kept.rename(tmp_path / "elsewhere.json")
    assert run("evaluate", f"run={tmp_path / 'copy/debug'}", "k=[1]").returncode == 0  # by the copy in its folder
    (tmp_path / "copy/debug/tokenizer.json").write_text(moved.read_text() + "\n")
    refused = run("evaluate", f"run={tmp_path / 'copy/debug'}", "k=[1]")
    assert refused.returncode == 2 and "another vocabulary" in refused.stderr


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, options):
    """Of the same run on a mixture of two corpora, for any of 1, 2, 3 and 6 ranks."""
    folder = tmp_path_factory.mktemp("mixture")
    lines = [json.dumps({"body": path.read_text()}) + "\n" for path in sorted((ROOT / "launch").rglob("*.py"))[:20]]
    for shard in range(2):
        (folder / f"{shard}.jsonl.zst").write_bytes(zstandard.compress("".join(lines[shard::2]).encode()))
    (one,) = [option.removeprefix("corpus.path=") for option in options if option.startswith("corpus.path=")]
    return [
        *(option for option in options if not option.startswith(("corpus.path=", "eval."))),
        *(f"corpus.path=[{one},{folder}]", "corpus.weights=[2,1]", "corpus.stretch=96"),
        *("data.streams=6", "moe.experts=6", "schedule.k_max=4", "eval.k=[2]", "eval.max_symbols=256"),
        *("train.log_every=1", "train.save_every=5", "parallel.timeout_s=60"),
    ]


def held_to(run, folder, options, ranks):
    """Options of a run on so many ranks, held to its certificate."""
    options = [*options, f"parallel.expert_ranks={ranks}"]
    certified = run("certify", *options, f"world_size={ranks}", f"out={folder}")
    assert certified.returncode == 0, certified.stderr
    return [*options, f"certificate={folder}"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_is_killed_and_the_run_goes_on_with_other_ranks_as_if_it_never_was(run, tmp_path, mixture):
    """A mixture of two corpora, from 2 ranks to 3; both runs do what their certificates say."""
    done = run("train", *mixture, f"train.runs_dir={tmp_path / 'alone'}")
    assert done.returncode == 0, done.stderr
    mixture = [*mixture, f"train.runs_dir={tmp_path / 'ranks'}"]
    two, three = (held_to(run, tmp_path / f"of_{ranks}", mixture, ranks) for ranks in (2, 3))
    with ExitStack() as stack:
        programs = [Program(f"{SLOW}\n{TRAIN_CODE}", two, environ) for environ in rank_environments(2)]
        for program in programs:
            stack.push(program)
        wait_until(lambda: last_step(tmp_path / "ranks") > 7)
        programs[1].send_signal(signal.SIGKILL)
        code, _, err = programs[0].wait()
    assert code not in (0, None) and "foreroute: " in err and last_step(tmp_path / "ranks") < 20
    with ExitStack() as stack:
        started = [Program(TRAIN_CODE, [*three, "train.resume=true"], environ) for environ in rank_environments(3)]
        programs = [stack.enter_context(program) for program in started]
        (code, out, err), *others = [program.wait() for program in programs]
    assert [code, *(other[0] for other in others)] == [0, 0, 0], err
    assert "resumed at step 5" in out and "15 steps were as certified" in out
    alone = read_losses(tmp_path / "alone")
    assert read_losses(tmp_path / "ranks") == pytest.approx(alone, rel=1e-5) and len(alone) == 20
    other = run("train", *mixture, "corpus.stretch=97", f"train.runs_dir={tmp_path / 'other'}")  # control
    assert other.returncode == 0 and read_losses(tmp_path / "other") != pytest.approx(alone, rel=1e-3)


LIMIT = 1_000_000_000
LIMITED = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_DATA, ({LIMIT}, {LIMIT}))
sys.argv = sys.argv[1:]
"""
PROGRAM = "runpy.run_module(sys.argv[0], run_name='__main__')"
WHOLE = "import numpy; numpy.fromfile(sys.argv[0], numpy.uint8)"


@pytest.mark.slow
def test_a_corpus_beyond_the_memory_is_prepared_and_trains(tmp_path):
    """Anonymous memory is limited to 1 GB; the text has 1.2, and is unpacked as it is read."""
    block = "".join(f"{i} {i * i} {i**3}\n" for i in range(100_000)).encode()
    times = 1_200_000_000 // len(block)
    with zstandard.open(tmp_path / "text.zst", "wb") as file:
        for _ in range(times):
            file.write(block)
    corpus = ["corpus=file", f"corpus.path={tmp_path / 'text.zst'}", f"corpus.cache_dir={tmp_path / 'cache'}"]
    small = ["train.steps=4", "eval.max_symbols=512", f"train.runs_dir={tmp_path / 'runs'}"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(code, *arguments):
        command = [sys.executable, "-c", LIMITED + code, *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900)

    for program, more in (("prepare", []), ("train", ["experiment=debug", *small])):
        done = start(PROGRAM, f"foreroute.launch.{program}", *more, *corpus)
        assert done.returncode == 0, done.stderr
    assert f"{times * len(block):,} bytes split 90/5/5" in done.stdout
    (ids,) = tmp_path.glob("cache/corpora/*/ids.bin")
    assert bytes(np.memmap(ids, np.uint8, mode="r")[-len(block) :]) == block
    whole = start(WHOLE, str(ids))  # control: the limit holds
    assert whole.returncode != 0 and "MemoryError" in whole.stderr
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] != LIMIT
