"""The command line as a person meets it: what is refused, with which line, and that nothing is overwritten."""

import fcntl
import io
import json
import locale
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from foreroute.engine.checkpoint.trained_run import open_saved
from foreroute.engine.config import Split
from foreroute.engine.errors import UserError
from foreroute.engine.evaluation.table_balance import balances
from foreroute.launch.generate import GenerateArgs, _prompt
from foreroute.launch.start.config_files import read_config
from foreroute.launch.start.one_line import told

ROOT = Path(__file__).resolve().parents[3]


def spawn(program, *args):
    return subprocess.Popen(
        [sys.executable, "-m", f"launch.{program}", *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def small(tmp_path, text, *more):
    return [
        "experiment=debug",
        "corpus=file",
        f"corpus.path={text}",
        f"corpus.cache_dir={tmp_path / 'cache'}",
        f"train.runs_dir={tmp_path / 'runs'}",
        "train.steps=4",
        "train.log_every=2",
        *more,
    ]


@pytest.mark.slow
def test_the_engines_warnings_are_lines(run, tmp_path, text):
    """A damaged cache of tables; with jobs of a sweep each is told once."""
    options = ["-m", *small(tmp_path, text, "train.seed=1,2")]
    assert run("train", *options).returncode == 0
    for path in tmp_path.glob("cache/**/tables-*.npz"):
        path.write_bytes(b"no archive")
    done = run("train", *options, f"train.runs_dir={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("foreroute: ") and "is damaged" in line for line in lines), lines


BAD = {
    "unknown option": (["moe.exprts=3"], ["moe.exprts", "experts", "expert_width"]),
    "unknown section": (["foo.bar=1"], ["foo", "corpus", "moe"]),
    "unknown flag": (["--local_rank=3"], ["--local_rank=3", "NAME=VALUE"]),
    "wrong type": (["moe.experts=many"], ["moe.experts", "many"]),
    "wrong choice": (["moe.router=magic"], ["magic", "hashed", "frozen", "learned", "dense"]),
    "unknown experiment": (["experiment=nope"], ["nope", "': debug, enwik8_12l, ", "quickstart"]),
    "k above E": (["schedule.k_max=5"], ["schedule.k_max=5", "moe.experts=4"]),
    "eval k above E": (["eval.k=[1,8]"], ["eval.k=[8]", "moe.experts=4"]),
    "k_min above k_max": (["schedule.k_min=4", "schedule.k_max=2"], ["schedule.k_min=4", "2"]),
    "streams": (["train.accumulation=3"], ["data.streams=4", "multiple", "3"]),
    "zero steps": (["train.steps=0"], ["train.steps=0", "at least 1"]),
    "n-gram": (["moe.ngram=5"], ["moe.ngram=5", "1 .. 4"]),
    "signatures": (["model.signatures=true"], ["model.signatures=True", "moe.router=dense", "hashed"]),
    "shuffled": (["moe.router=frozen", "moe.keys=shuffled"], ["moe.keys=shuffled", "frozen"]),
    "pack": (["moe.builder=packed", "moe.pack=3"], ["moe.pack=3", "moe.experts=4"]),
    "no pack": (["moe.builder=packed"], ["moe.builder=packed", "moe.pack=None"]),
    "pack of another builder": (["moe.pack=2"], ["moe.builder=balanced", "moe.pack=2"]),
    "missing file": (["corpus.path=/does/not/exist"], ["/does/not/exist", "no such file"]),
    "clipping at ZeRO-0": (["train.zero_stage=0"], ["optim.clip", "zero_stage"]),
    "no memory": (["model.memory=0", "eval.same_length=true"], ["eval.same_length", "memory"]),
    "threads": (["train.threads=-1"], ["train.threads=-1", "at least 0"]),
    "seed": (["train.seed=4294967296"], ["train.seed=4294967296", "below"]),
    "run name": (["train.name=../x"], ["../x", "folder name"]),
    "no GPU": (["kernels.backend=triton"], ["kernels.backend=triton", "on cpu", "GPU"]),
    "fast": (["kernels.mode=fast", "kernels.backend=reference"], ["kernels.mode=fast", "lean"]),
    "tf32": (["kernels.precision=tf32"], ["kernels.precision=tf32", "kernels.backend=triton", "auto"]),
}


@pytest.mark.parametrize(("options", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_code_2(run, tmp_path, text, options, words):
    done = run("train", *small(tmp_path, text, *options))
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("foreroute: "), done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert not list(tmp_path.glob("runs/*/checkpoints"))


LEFT = {
    "a folder for a file": (["train.runs_dir={tmp}/text.txt"], "train.runs_dir={tmp}/text.txt: "),
    "a cache for a file": (["corpus.cache_dir={tmp}/text.txt"], "corpus.cache_dir={tmp}/text.txt: "),
    "a text that is no file": (["corpus.path=/dev/null"], "not a file"),
    "warm-up beyond the end": (["optim.warmup_steps=9"], "give optim.warmup_steps=4 or fewer"),
    "an infinite number": (["parallel.timeout_s=inf"], "parallel.timeout_s=inf: must be a finite number"),
    "an enormous time": (["parallel.timeout_s=1e300"], "parallel.timeout_s=1e+300: must be below"),
    "an enormous number": (["train.log_every=99999999999999999999"], "train.log_every=99999999999999999999: "),
    "too many threads": (["train.threads=99999999999"], "threads=99999999999: must be at least 0, at most"),
    "clipping at ZeRO-0": (["train.zero_stage=0"], "zero_stage"),
    "a long tag": (["wandb.mode=offline", f"wandb.tags={'x' * 65}"], "W&B takes 1 to 64 letters"),
    "a slash in a project": (["wandb.mode=offline", "wandb.project=a/b"], "wandb.project='a/b'"),
    "a key that is none": (["wandb.mode=online"], "40+ characters"),
    "several values": (["optim.lr=0.1,0.2"], "several values need -m"),
    "no certificate": (["certificate={tmp}/none"], "none"),
}


@pytest.mark.parametrize(("options", "words"), LEFT.values(), ids=LEFT.keys())
def test_a_refused_start_leaves_no_run_folder(run, tmp_path, text, monkeypatch, options, words):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    done = run("train", *small(tmp_path, text, *options))
    assert done.returncode == 2 and words.replace("{tmp}", str(tmp_path)) in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "[Errno" not in lines[0], done.stderr
    assert not list(tmp_path.glob("runs/*")) and text.is_file()


def test_a_folder_that_somebody_keeps_stays(run, tmp_path, text):
    """The negative control: only what holds nothing goes."""
    (tmp_path / "runs/debug").mkdir(parents=True)
    (tmp_path / "runs/debug/notes.txt").write_text("precious")
    assert run("train", *small(tmp_path, text)).returncode == 2
    assert (tmp_path / "runs/debug/notes.txt").read_text() == "precious"


def test_a_prompt_comes_from_a_file_or_standard_input(tmp_path, monkeypatch):
    path = tmp_path / "prompt, a=b.txt"
    path.write_bytes("def f(x):\n  \xff".encode("latin-1"))
    assert _prompt(GenerateArgs("r", prompt_file=str(path))) == path.read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"piped")))
    assert _prompt(GenerateArgs("r", prompt_file="-")) == b"piped"
    assert _prompt(GenerateArgs("r", prompt="typed")) == b"typed"
    for bad in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(UserError, match="prompt_file="):
            _prompt(GenerateArgs("r", prompt_file=bad))
    with pytest.raises(UserError, match="prompt_file=x: goes without prompt="):
        GenerateArgs("r", prompt="a", prompt_file="x")


def test_a_python_without_the_packages_is_one_line():
    """Python's own modules alone: -S leaves out what is installed."""
    command = [sys.executable, "-S", "-m", "launch.train"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "has no torch" in done.stderr and ".venv/bin/python" in done.stderr
    assert len(done.stderr.splitlines()) == 1


FLAGS = {
    "an option as a flag": (["--experiment", "debug"], "did you mean experiment=debug?"),
    "its section left out, too": (["--lr=0.1"], "did you mean optim.lr=0.1?"),
    "a rerun, which unpickles": (["--experimental-rerun", "x"], "no such flag"),
    "a choice that a flag lacks": (["--cfg", "jobs"], "invalid choice: 'jobs'"),
    "two ways to start": (["-m", "--cfg", "job"], "only one at a time"),
    "an option to add": (["+moe.foo=1"], "moe.foo=1: no such option"),
    "an option to delete": (["~moe"], "only a group's choice can be left out"),
    "Hydra's own, not in its grammar": (["hydra.job.name=(("], "write \"hydra.job.name='(('\""),
    "a section in part": (["moe={experts: 3"], "moe={experts: 3: Hydra's grammar"),
    "a file for a choice": (["corpus=/data/text.txt"], "write corpus=file corpus.path=/data/text.txt"),
    "half a list": (["eval.k=[1,2"], "a bracket is missing"),
    "a name too long": (["train.name=" + "x" * 300], "takes 255 bytes"),
    "no value": (["train.steps", "=", "5"], "write train.steps=VALUE, without blanks"),
    "a blank for =": (["experiment", "debug"], "write experiment=debug, without blanks"),
    "a choice alone": (["quickstart"], "write experiment=quickstart"),
    "a choice with a typo": (["experiment=quickstrt"], "did you mean experiment=quickstart or "),
    "a choice in a folder": (["experiment=hashed_n4"], "did you mean experiment=study/hashed_n4?"),
}


@pytest.mark.parametrize(("options", "words"), FLAGS.values(), ids=FLAGS.keys())
def test_a_command_line_that_is_none(run, options, words):
    done = run("train", *options)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("content", ["name: zu groß".encode("latin-1"), b"\xef\xbb\xbfname: mine"])
def test_a_file_of_options_that_is_not_utf8_is_one_line(run, tmp_path, content):
    path = tmp_path / "cluster" / "mine.yaml"
    path.parent.mkdir()
    path.write_bytes(content)
    done = run("certify", "--config-dir", str(tmp_path), "cluster=mine")
    assert done.returncode == 2 and f"{path}: " in done.stderr and "UTF-8" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("encoding", ["ANSI_X3.4-1968", "ISO-8859-1"])
def test_a_locale_that_is_not_utf8_is_one_line(run, monkeypatch, encoding):
    monkeypatch.setattr(locale, "getencoding", lambda: encoding)
    done = run("train", "experiment=debug")
    assert done.returncode == 2 and f"{encoding}, and must be UTF-8" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:130] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
            " allocate 4000000000000 bytes."
        ),
    ],
)
def test_a_host_without_room_is_one_line(error):
    assert told(error).exit_code == 1
    assert told(error).line.startswith("this machine's memory does not hold it (")
    assert told(RuntimeError("something else")) is None


def test_empty_and_short_corpora_are_refused(run, tmp_path):
    for content, word in ((b"", "empty"), (b"short text, " * 12, "data.streams")):
        path = tmp_path / "small.txt"
        path.write_bytes(content)
        done = run("train", *small(tmp_path, path))
        assert done.returncode == 2 and word in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_gpu_without_room_is_one_line():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1 GiB.\nSee more")
    failure = told(error)
    assert failure.exit_code == 1
    assert failure.line.startswith("CUDA out of memory: needs fewer data.streams")


def test_a_run_folder_is_never_overwritten(run, tmp_path, text):
    first = run("train", *small(tmp_path, text))
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs/debug"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = run("train", *small(tmp_path, text))
    assert again.returncode == 2 and "already holds a run" in again.stderr
    other = run("train", *small(tmp_path, text, "train.resume=true", "optim.lr=0.5"))
    assert other.returncode == 2 and "optim.lr=0.5" in other.stderr and "0.002" in other.stderr
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_start_that_failed_does_not_take_the_name(run, tmp_path, text):
    failed = run("train", *small(tmp_path, text, "train.zero_stage=0"))
    assert failed.returncode == 2 and "zero_stage" in failed.stderr
    assert run("train", *small(tmp_path, text, "train.steps=2")).returncode == 0


def test_a_folder_in_use_or_not_a_run_is_refused(run, tmp_path, text):
    folder = tmp_path / "runs/debug"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run("train", *small(tmp_path, text))
        assert done.returncode == 2 and "in use by another process" in done.stderr
    (folder / "thesis.txt").write_text("precious")
    done = run("train", *small(tmp_path, text))
    assert done.returncode == 2 and "thesis.txt" in done.stderr
    (tmp_path / "file").write_text("")
    done = run("train", *small(tmp_path, text), f"train.runs_dir={tmp_path / 'file'}")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_a_sweep_gives_each_job_a_folder_and_resumes(run, tmp_path, text):
    options = ["-m", *small(tmp_path, text, "moe.spread=1,2", "train.name=sweep")]
    assert run("train", *options).returncode == 0
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert len(folders) == 2 and all("moe.spread=" in name for name in folders)
    again = run("train", *options, "train.resume=true")
    assert again.returncode == 0 and again.stdout.count("is complete") == 2
    assert folders == sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())


@pytest.mark.parametrize(
    ("program", "options", "word"),
    [
        ("evaluate", ["run=/does/not/exist"], "/does/not/exist"),
        ("evaluate", [], "run"),
        ("generate", ["run=/does/not/exist"], "/does/not/exist"),
        ("generate", ["run=x", "top_p=2"], "top_p=2"),
        ("prepare", ["corpus=wiki"], "wiki"),
        ("train", ["moe.router=hashd"], "moe.router=hashd: must be one of "),
        ("train", ["moe.router=nothing.there:Router"], "moe.router=nothing.there:Router: cannot be imported"),
        ("train", ["moe.router=frozen", "moe.copy_experts=1"], "moe.copy_experts=1: must be 0"),
        ("tables", ["ranks=[2,3]"], "ranks=[3]: must divide moe.experts=16"),
        ("tables", ["moe.router=frozen"], "moe.router=frozen: has no tables, as hashed has"),
        ("certify", ["world_size=3"], "data.streams=16: must be a multiple of world"),
        ("certify", ["world_size=8", "expert_group=3"], "expert_ranks=3: must divide the number of ranks, 8"),
        ("certify", ["world_size=0"], "world_size=0: must be at least 1"),
        ("certify", ["moe.experts=4", "schedule.k_max=8"], "schedule.k_max=8"),
        ("certify", ["moe.router=frozen"], "moe.router=frozen: routes depend on hidden states"),
        ("certify", ["device_memory_gb=0"], "device_memory_gb=0.0: must be above 0"),
        ("certify", ["device_memory_gb=inf"], "device_memory_gb=inf: must be a finite number"),
        ("certify", ["cluster=dgx_a100", "kernels.backend=cpu"], "kernels.backend=cpu: cluster=dgx_a100"),
        ("certify", ["cluster=none_such"], "dgx_h100"),
        ("certify", ["cluster.inside.gb_per_s=3"], "such as cluster=NAME"),
        ("certify", [f"out={__file__}/found"], "is not a folder"),
        ("certify", ["sample=1601"], "sample=1601: must be from 1 to the 1600 steps"),
        ("replay", ["rank=3"], "rank=3: must be below world_size=1"),
        ("replay", ["step=9:3"], "step=9:3: must be worst, median, a number or FIRST:LAST, from 1 to train.steps=1600"),
        ("replay", ["find=batch"], "find=batch: needs device_memory_gb=GB"),
        ("replay", ["trace=x.json"], "trace=x.json: must be a file that ends in .csv or .csv.gz"),
        ("certify", ["expert_groups=2"], "did you mean expert_group? allowed: corpus, "),
    ],
)
def test_other_programs_refuse_likewise(run, program, options, word):
    done = run(program, *options)
    assert done.returncode == 2 and word in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("name: mine\n  inside: [", "mapping values are not allowed here"),
        ("name: mine\ninsid: {gb_per_s: 3}", "Key 'insid'"),
        ("name: mine\noperation_us: -1", "cluster.operation_us=-1.0: must be at least 0"),
    ],
)
def test_a_wrong_cluster_file_is_one_line(run, tmp_path, content, word):
    path = tmp_path / "conf" / "cluster" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    done = run("certify", "--config-dir", str(tmp_path / "conf"), "cluster=mine")
    assert done.returncode == 2 and word in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_balance_of_packed_tables(run, tmp_path, text):
    """launch.tables counts what a run with the same options trains with."""
    packed = small(tmp_path, text, "moe.builder=packed", "moe.pack=2")
    out = tmp_path / "balance.json"
    done = run("tables", *packed, "ranks=[2,4]", "split=train", f"json={out}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    (head,) = (place for place, line in enumerate(lines) if line.split()[:3] == ["k", "experts", "blocks"])
    assert "builder packed, blocks of 2" in lines[head - 1] and lines[-1] == f"written: {out}"
    assert lines[-2].startswith("distinct n-grams of a micro-batch of 128 tokens, for each token: ")
    explained = [re.split(r"  +", line)[0] for line in lines[head + 5 : -2]]
    assert {re.sub(r"\b[24] ranks", "P ranks", name) for name in re.split(r"  +", lines[head])} == set(explained)
    found = json.loads(out.read_text())
    assert found["pack"] == 2 and [line["k"] for line in found["k"]] == [1, 2, 3, 4]
    assert [line["ranks"]["2"]["touched"] for line in found["k"]] == [1, 1, 2, 2]
    assert lines[head + 2].split()[0] == "2" and lines[head + 2].split()[4:6] == ["1.000", "0.500"]
    done = run("tables", *packed, "ranks=[2,4]", "split=train", f"json={tmp_path / 'no/balance.json'}")
    assert done.returncode == 2 and "json=" in done.stderr and len(done.stderr.splitlines()) == 1
    assert run("train", *packed).returncode == 0
    folder = tmp_path / "runs/debug"
    saved = open_saved(folder, read_config(folder / "config.yaml"), print)
    assert {router.table.pack for router in saved.routers} == {2}
    again = balances(saved.routers[0].table, saved.corpus.split(Split.train), (2,))[2]
    assert again.ranks[2].touched == 2


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_machines_first_rank_speaks_for_all(run, monkeypatch, local_rank):
    """All have the same command line, and see the same fault in it."""
    place = {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 2}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    for program, options, line in (
        ("train", ["parallel.chunks=0"], "parallel.chunks=0: must be at least 1"),
        ("train", ["parallel.chunk=2"], "parallel.chunk=2: no such option; did you mean parallel.chunks?"),
        ("evaluate", ["run=x"], "launch.evaluate runs as one process: started as 2"),
    ):
        done = run(program, *options)
        assert done.returncode == 2
        assert done.stderr.startswith(f"foreroute: {line}" if local_rank == 0 else ""), done.stderr
        assert done.stderr.count("\n") == (1 if local_rank == 0 else 0)


def test_a_certificate_is_printed_and_written(run, monkeypatch, tmp_path, text):
    monkeypatch.setenv("COLUMNS", "100")
    options = small(tmp_path, text, "train.log_every=1", "train.steps=6")
    ranks = ["world_size=4", "expert_group=4", "ranks_per_node=2"]
    path = tmp_path / "found/certificate.json"
    done = run("certify", *options, *ranks, f"out={path.parent}")
    assert done.returncode == 0, done.stderr
    printed = done.stdout[done.stdout.index("Certificate of ") :].splitlines()
    assert len(printed) <= 15 and all(len(line) <= 100 or str(path.parent) in line for line in printed)
    assert "\x1b" not in done.stdout  # no terminal, no colours
    assert all(str(path.with_suffix(suffix)) in printed[-2] for suffix in (".html", ".md", ".json"))
    written = path.with_suffix(".md").read_text()
    assert "4, 2 on a node, in 1 expert group of 4, each on 2 nodes |\n" in written
    assert "the first 6, all counted |\n" in written and "two\\_level" in written
    assert "<h1>Certificate of " in path.with_suffix(".html").read_text("ascii")
    found = json.loads(path.read_text())
    assert found["placement"] == {"world_size": 4, "expert_ranks": 4, "ranks_per_node": 2}
    assert [part["k"] for part in found["by_k"]] == [1, 2, 3] and found["whole"]["steps"] == 6
    assert found["options"]["parallel"]["expert_ranks"] == 4 and len(found["corpus_sha256"]) == 64
    assert found["memory"]["verdict"] is None and not found["memory"]["gpu"]
    assert found["memory"]["peak_bytes"] == sum(term["bytes"] for term in found["memory"]["terms"])
    judged = [*options, *ranks, "sample=5", f"out={path.parent}", "device_memory_gb=1"]
    done = run("certify", *judged)
    assert done.returncode == 0 and "Exact 1 step in 5 2 of 6 were counted" in " ".join(done.stdout.split())
    written = path.with_suffix(".md").read_text()
    assert "Counted: 2 of the first 6 steps, one in 5" in written and "at the peak: fits into 1.000 GB" in written
    assert json.loads(path.read_text())["memory"]["verdict"]["fits"]
    assert json.loads(path.read_text())["whole"]["steps"] == 2


@pytest.mark.slow
def test_a_process_of_its_own_ends_likewise(tmp_path, text):
    """The same through a real process: exit code 2, one line, no traceback."""
    process = spawn("train", *small(tmp_path, text, "moe.experts=many"))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2 and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_stop_saves_and_the_run_goes_on(run, tmp_path, text, number):
    options = small(tmp_path, text, "train.steps=100000", "train.log_every=1")
    process = spawn("train", *options)
    metrics = tmp_path / "runs/debug/metrics.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 128 + number and err == "", err
    assert "train.resume=true goes on" in out
    step = int(next((tmp_path / "runs/debug/checkpoints").iterdir()).name.removeprefix("step-"))
    assert step >= 4
    state = json.loads((tmp_path / "runs/debug/state.json").read_text())
    assert state == {"state": "stopped", "step": step}
    done = run("train", *small(tmp_path, text, f"train.steps={step + 2}", "train.resume=true"))
    assert done.returncode == 0 and f"resumed at step {step} " in done.stdout, done.stderr
    assert f"train.steps={step + 2}, so far 100000: step {step + 1} has learning rate" in done.stdout


def test_the_whole_way_of_a_run(run, tmp_path, text):
    """Train, read what it left, evaluate and sample from it."""
    assert run("train", *small(tmp_path, text)).returncode == 0
    folder = tmp_path / "runs/debug"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "checkpoints", "loss.png", "slimming.png", "summary.json"}
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["bpc"]) == {"1", "2", "4"}
    assert {"tokens_per_second", "peak_memory_bytes", "bzip2_bpc", "order3_bpc"} <= set(summary)
    done = run("evaluate", f"run={folder}", "k=[1,4]", "streams=1")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout.strip().splitlines()[-1])["bpc"]
    assert set(again) == {"1", "4"}
    # from the checkpoint, with another number of streams: the same text, the same bits
    assert all(abs(again[k] - summary["bpc"][k]) < 1e-5 for k in again)
    samples = [
        run("generate", f"run={folder}", 'prompt="the "', "k=2", "length=20", f"seed={seed}") for seed in (1, 1, 2)
    ]
    texts = [sample.stdout for sample in samples]
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("the ")
    resumed = run("train", *small(tmp_path, text, "train.resume=true"))
    assert resumed.returncode == 0 and "is complete" in resumed.stdout
    done = run("evaluate", f"run={folder}", "memory=0", "same_length=true")
    assert done.returncode == 2 and "same_length" in done.stderr
    done = run("evaluate", f"run={folder}", "protocol=published", "k=[2]", "max_symbols=300")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "summary.json").read_text())["bpc"] == summary["bpc"]
