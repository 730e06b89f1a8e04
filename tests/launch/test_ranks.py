"""The training program as two processes: like one process, and what happens when one of them differs or is lost."""

import json
import os
import shutil
import signal
import time

import pytest

import foreroute.launch.certify.program
from foreroute.engine.testing.ranks import Program, change_certificate, rank_environments
from foreroute.launch.testing.runs import TRAIN_CODE, last_step, wait_until

OPTIONS = ("experiment=debug", "parallel.expert_ranks=2", "parallel.timeout_s=600", "train.threads=1")
AWAKE_S = 10
SOON = "parallel.timeout_s=20"  # for ranks that are lost
LATE = """
import time, foreroute.launch.train
from pathlib import Path
from foreroute.engine.checkpoint import files as checkpoint_files
from foreroute.engine.metrics.writer import Metrics
def make_late(owner, name, mark):
    call = getattr(owner, name)
    def late(*arguments, **options):
        time.sleep(2)
        result = call(*arguments, **options)
        Path({folder!r}, mark).touch()
        return result
    setattr(owner, name, late)
"""
"""make_late(owner, name, mark): a call takes 2 s more and leaves the file `mark`."""
LEAVE = """
import atexit, os
from pathlib import Path
atexit.register(lambda: Path({folder!r}, {mark!r}).exists() or os._exit(9))
"""
"""Exit code 9 if the process ends before the mark is there."""


class Ranks:
    """Two processes of the training program (or as many as have options of their own), started as torchrun would,
    without its agent; each may run code before it."""

    def __init__(self, folder, options, own_options=((), ()), code=("", "")):
        self.folder = folder
        environments = rank_environments(len(own_options))
        self.processes = [
            Program(f"{before}\n{TRAIN_CODE}", [*OPTIONS, f"train.runs_dir={folder}", *options, *own], environ)
            for own, before, environ in zip(own_options, code, environments, strict=True)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.__exit__(*_)

    def wait(self):
        """(exit code, stdout, stderr) of each rank."""
        return [process.wait() for process in self.processes]

    def wait_for_steps(self):
        """Return when the first steps are logged."""

        def logged():
            assert all(one.runs for one in self.processes)
            return last_step(self.folder) > 5

        wait_until(logged)


def lines(stderr):
    return [line for line in stderr.splitlines() if line.startswith("foreroute:")]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "debug/metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


SLOW = """
import time
import foreroute.engine.train.step
forward = foreroute.engine.train.step._forward
def slow(*arguments):
    time.sleep(0.25)
    return forward(*arguments)
foreroute.engine.train.step._forward = slow
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run as one process, without expert groups."""
    folder = tmp_path_factory.mktemp("alone")
    options = ["experiment=debug", "model.dropout=0", f"train.runs_dir={folder}"]
    with Program(TRAIN_CODE, options, os.environ) as program:
        assert program.wait()[0] == 0
    return losses(folder), json.loads((folder / "debug/summary.json").read_text())


@pytest.mark.dist
@pytest.mark.parametrize("peer_ids", ["corpus", pytest.param("exchange", marks=pytest.mark.slow)])
def test_two_processes_train_like_one(tmp_path, alone, peer_ids):
    """Also when one of them is slow, which is said."""
    options = ["model.dropout=0", f"parallel.peer_ids={peer_ids}"]
    elsewhere = (f"corpus.cache_dir={tmp_path / 'own'}",) if peer_ids == "exchange" else ()
    slow = SLOW if peer_ids == "corpus" else ""
    with Ranks(tmp_path, options, own_options=((), elsewhere), code=("", slow)) as ranks:
        first, second = ranks.wait()
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert lines(first[2] + second[2]) == [] and second[1] == ""
    if slow:
        assert ": rank 1 is slow: " in first[1]
        rows = [json.loads(row) for row in (tmp_path / "debug/metrics.jsonl").read_text().splitlines()]
        assert sum(row["slowest_rank"] == 1 and row["rank_skew"] > 1.5 for row in rows) >= 3
    assert losses(tmp_path) == pytest.approx(alone[0], rel=1e-5)
    summary = json.loads((tmp_path / "debug/summary.json").read_text())
    assert summary["bpc"] == pytest.approx(alone[1]["bpc"], rel=1e-4)
    assert summary["symbols"] == alone[1]["symbols"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_goes_on_with_other_ranks(tmp_path, alone):
    """Two ranks at ZeRO stage 3, from step 10 on one rank at stage 2 and two micro-batches."""
    options = ["model.dropout=0", "train.save_every=10", "train.zero_stage=3"]  # dropout would draw new numbers
    with Ranks(tmp_path, options) as ranks:
        assert [code for code, *_ in ranks.wait()] == [0, 0]
    shutil.rmtree(tmp_path / "debug/checkpoints/step-00000020")
    changed = ["train.zero_stage=2", "train.accumulation=2", "train.resume=true"]
    one = ["experiment=debug", *options[:2], *changed, f"train.runs_dir={tmp_path}"]
    with Program(TRAIN_CODE, one, os.environ) as program:
        code, out, err = program.wait()
    assert code == 0 and "resumed at step 10" in out, err
    assert losses(tmp_path) == pytest.approx(alone[0], rel=1e-5)
    summary = json.loads((tmp_path / "debug/summary.json").read_text())
    assert summary["bpc"] == pytest.approx(alone[1]["bpc"], rel=1e-4)


@pytest.mark.dist
@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)], ids=lambda how: how.name
)
def test_a_lost_rank_is_named(tmp_path, how):
    """Killed: its connections break. Stopped: they stay, and the other rank waits in a collective."""
    options = ["train.steps=100000", "train.log_every=5", SOON]
    with Ranks(tmp_path, options) as ranks:
        ranks.wait_for_steps()
        ranks.processes[1].send_signal(how)
        code, _, stderr = ranks.processes[0].wait()
    assert code == 1
    (line,) = lines(stderr)
    assert line.startswith("foreroute: rank 1 is lost: no sign of life") and "last seen at" in line


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_that_is_stuck_in_the_first_step_ends_all(tmp_path):
    """It is alive, and waits for ever; the other waits for it in a group that DeepSpeed made. Five times as long as in
    others: the first step may compile."""
    code = "", SLOW.replace("sleep(0.25)", "sleep(1e6)")
    with Ranks(tmp_path, ["parallel.timeout_s=8"], code=code) as ranks:
        found = ranks.wait()
    assert [code for code, *_ in found] == [1, 1]
    for _, _, stderr in found:
        (line,) = lines(stderr)
        assert line == "foreroute: no progress for 40 s: all 2 ranks are at step 0"


@pytest.mark.slow
@pytest.mark.dist
def test_a_suspended_job_wakes_up(tmp_path, alone):
    """Longer than the ranks wait for one that is lost, wherever each of them is; the result is as without."""
    options = ["model.dropout=0", f"parallel.timeout_s={AWAKE_S}"]
    with Ranks(tmp_path, options, code=(SLOW, SLOW)) as ranks:
        ranks.wait_for_steps()
        for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGSTOP, signal.SIGCONT):
            for one in ranks.processes:
                one.send_signal(number)
            time.sleep(1.5 * AWAKE_S if number == signal.SIGSTOP else 1)
        for code, _, stderr in ranks.wait():
            assert code == 0, stderr
    assert losses(tmp_path) == pytest.approx(alone[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.dist
def test_the_clock_of_one_rank_saves_on_all(tmp_path):
    """A checkpoint by time is of one step on every rank."""
    hasty = (
        "from foreroute.engine.train.trainer import Trainer\nTrainer._save_asked = lambda trainer: trainer.step == 2"
    )
    options = ["train.steps=5", "train.keep=9", "eval.k=[1]", "eval.max_symbols=256"]
    with Ranks(tmp_path, options, code=("", hasty)) as ranks:
        assert [code for code, *_ in ranks.wait()] == [0, 0]
    found = sorted(path.name for path in (tmp_path / "debug/checkpoints").iterdir())
    assert found == ["step-00000003", "step-00000005"]


@pytest.mark.dist
@pytest.mark.parametrize(("name", "values"), [("optim.lr", (0.002, 0.5)), ("parallel.expert_ranks", (2, 1))])
def test_a_rank_with_another_option_is_named(tmp_path, name, values):
    """Also one on which it depends which ranks form a group."""
    with Ranks(tmp_path, [], own_options=((), (f"{name}={values[1]}",))) as ranks:
        (code, _, stderr), second = ranks.wait()
    assert (code, second[0]) == (2, 2)
    assert lines(stderr) == [
        f"foreroute: {name} differs between the ranks: rank 0 has {values[0]}, rank 1 has {values[1]}"
    ]
    assert lines(second[2]) == []  # one of them speaks for all
    assert not (tmp_path / "debug/config.yaml").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_nobody_goes_on_while_rank_0_works_alone(tmp_path):
    """Rank 0 draws and closes the metrics (W&B may take minutes); a launcher would end it if the other had ended by
    then."""
    folder = str(tmp_path)
    late = (
        LATE.format(folder=folder)
        + "make_late(Metrics, 'close', 'closed')\nmake_late(foreroute.launch.runs.summary, 'plot_slimming', 'drawn')"
    )
    code = late, LEAVE.format(folder=folder, mark="closed")
    with Ranks(tmp_path, ["train.steps=2"], code=code) as ranks:
        first, second = ranks.wait()
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert (tmp_path / "drawn").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_a_failure_of_all_is_one_line(tmp_path):
    """Rank 0 takes long to find the last good checkpoint; a launcher would end it if the other had ended by then."""
    folder = str(tmp_path)
    late = LATE.format(folder=folder) + "make_late(checkpoint_files, 'verify', 'verified')"
    code = late, LEAVE.format(folder=folder, mark="verified")
    with Ranks(tmp_path, ["optim.lr=1e30", "train.save_every=1"], code=code) as ranks:
        first, second = ranks.wait()
    assert (first[0], second[0]) == (1, 1), first[2] + second[2]
    (line,) = lines(first[2])
    assert "is nan at step" in line and "; the last good checkpoint is" in line
    assert lines(second[2]) == []  # one of them speaks for all
    for shard in tmp_path.glob("debug/checkpoints/*/shard-00001.safetensors"):
        shard.unlink()
    with Ranks(tmp_path, ["optim.lr=1e30", "train.save_every=1", "train.resume=true"]) as ranks:
        first, second = ranks.wait()
    assert (first[0], second[0]) == (2, 2), first[2] + second[2]
    (line,) = lines(first[2])
    assert "no whole checkpoint is left" in line and "shard-00001.safetensors: missing" in line
    assert lines(second[2]) == []


@pytest.mark.dist
def test_a_stop_of_one_rank_stops_all_behind_the_same_step(tmp_path):
    with Ranks(tmp_path, ["train.steps=100000", "train.log_every=5"]) as ranks:
        ranks.wait_for_steps()
        ranks.processes[1].send_signal(signal.SIGTERM)
        first, second = ranks.wait()
    assert (first[0], second[0]) == (143, 143), first[2] + second[2]
    assert "stopped at step" in first[1]


def certify(monkeypatch, folder, *options):
    monkeypatch.setattr("sys.argv", ["certify", *OPTIONS, f"out={folder}", *options])
    with pytest.raises(SystemExit) as end:
        foreroute.launch.certify.program.main()
    assert end.value.code == 0


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_that_differs_from_its_certificate_ends_on_every_rank(tmp_path, monkeypatch):
    """One rank sees it, both say it."""
    certify(monkeypatch, tmp_path, "world_size=2")
    sent = change_certificate(tmp_path, "bytes_uyr", (7, 1, 1))
    with Ranks(tmp_path, ["train.log_every=1", f"certificate={tmp_path}"]) as ranks:
        first, second = ranks.wait()
    assert (first[0], second[0]) == (1, 1), first[2] + second[2]
    line = f"foreroute: rank 1 differs from its certificate at step 8, layer 1: bytes sent {sent}, certified {sent + 1}"
    assert lines(first[2]) == lines(second[2]) == [line]
    assert len(losses(tmp_path)) == 7  # the first seven


CERTIFIED = {
    "gather": (2, ["parallel.exchange=gather", "train.zero_stage=3", "train.valid_every=5"]),
    "in parts": (2, ["parallel.chunks=3", "train.recompute=true", "train.accumulation=2", "train.save_every=10"]),
    "two groups": (4, ["train.precision=bf16", "parallel.exchange=auto", "parallel.link_gb_per_s=0.0001"]),
}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("number", "options"), CERTIFIED.values(), ids=CERTIFIED)
def test_runs_that_their_certificates_describe(tmp_path, monkeypatch, number, options):
    """One of them also goes on from its middle."""
    certify(monkeypatch, tmp_path, f"world_size={number}", *options)
    own = {"own_options": ((),) * number, "code": ("",) * number}
    for resumed, steps in ((False, 20), (True, 10)):
        more = [*options, f"certificate={tmp_path}", f"train.resume={resumed}"]
        with Ranks(tmp_path, more, **own) as ranks:
            answers = ranks.wait()
        assert [code for code, *_ in answers] == [0] * number, [err for *_, err in answers]
        assert f"{steps} steps were as certified" in answers[0][1]
        if "train.save_every=10" not in options:
            return
        shutil.rmtree(tmp_path / "debug/checkpoints/step-00000020")


@pytest.mark.dist
@pytest.mark.slow
def test_a_certificate_that_one_rank_cannot_take(tmp_path, monkeypatch):
    """Of another expert group; all end with one line."""
    for name, options in {"right": ["world_size=2"], "other": ["world_size=2", "expert_group=1"]}.items():
        certify(monkeypatch, tmp_path / name, *options)
    own_options = [(f"certificate={tmp_path / name}",) for name in ("right", "other")]
    with Ranks(tmp_path, [], own_options=own_options) as ranks:
        first, second = ranks.wait()
    assert (first[0], second[0]) == (2, 2)
    (line,) = lines(first[2])
    assert line.startswith("foreroute: rank 1: ") and line.endswith("parallel.expert_ranks=2, certified 1")
    assert lines(second[2]) == []


@pytest.mark.slow  # mesh, certificate and plug-in prove the refusal itself
@pytest.mark.dist
def test_experts_that_do_not_divide(tmp_path):
    with Ranks(tmp_path, ["parallel.expert_ranks=3"]) as ranks:
        first, second = ranks.wait()
    assert (first[0], second[0]) == (2, 2)
    assert lines(first[2]) == ["foreroute: parallel.expert_ranks=3: must divide the number of ranks, 2"]
    assert lines(second[2]) == []
