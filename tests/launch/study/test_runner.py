"""The runner with stand-ins for its processes: order, failures, rates that are waited for, stops, and what it goes on
from."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

import foreroute.launch.study.runner
from foreroute.engine.config import MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.testing.tiny_run import tiny_config
from foreroute.launch.runs.folder import lock_folder
from foreroute.launch.study.preset import ArmConfig, Job, Preset, with_rate
from foreroute.launch.study.runner import TIME_IS_UP, Runner
from foreroute.launch.testing.runs import study_result

RATES = [0.1, 0.2]
ARMS = {"dense": ArmConfig(kin="dense"), "hashed": ArmConfig(), "frozen": ArmConfig()}
SLEEP = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def jobs_of(preset, seeds=(1,)):
    """Jobs of 10 steps."""
    dense, hashed = (replace(tiny_config(), moe=MoEConfig(router=router, experts=4)) for router in ("dense", "hashed"))
    tuning = [
        with_rate(Job(f"tune-{arm}-{rate}", arm, 0, dense if arm == "dense" else hashed, (), rate), rate)
        for rate in preset.learning_rates
        for arm in preset.kin
    ]
    return tuning + [
        Job(f"{arm}-seed{seed}", arm, seed, dense if arm == "dense" else hashed, ())
        for seed in seeds
        for arm in preset.arms
    ]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Give a function that makes a runner; its processes run `code[NAME or NAME PROGRAM]`, by default nothing."""
    monkeypatch.setattr(foreroute.launch.study.runner, "_POLL_S", 0.01)

    def collect(job, rate, folder, wall_seconds):
        bpc = 1.0 + abs((job.tries or 0) - 0.2)  # 0.2 is the best rate
        result = study_result(job.arm, job.seed, [(1, 1, 1, bpc)], {"dense": bpc}, tries=job.tries)
        tuned = with_rate(job, rate)
        result["steps"] = job.config.train.steps
        result["measured"]["training_seconds"] = job.config.train.steps * {"dense": 3.0}.get(job.arm, 2.1)
        return {**result, "learning_rate": tuned.config.optim.lr, "options": tuned.chosen_options}

    monkeypatch.setattr(foreroute.launch.study.runner, "collect", collect)
    with lock_folder(tmp_path) as lock:

        def make(preset, jobs, code=(), at_once=2):
            lines, started, code = [], [], dict(code)
            runner = Runner(preset, jobs, tmp_path, lock, at_once=at_once, say=lines.append)

            def spawn(job, program, options):
                assert len(runner._running) < at_once
                started.append(f"{job.name} {program}")
                script = code.get(f"{job.name} {program}", code.get(job.name, "pass"))
                with (tmp_path / "logs" / f"{job.name}.log").open("ab") as log:
                    return subprocess.Popen([sys.executable, "-c", script], stdout=log, stderr=log)

            monkeypatch.setattr(runner, "_spawn", spawn)
            return runner, lines, started

        yield make


def never():
    return 0


def results(tmp_path):
    return {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("*.json")}


def test_all_run_in_order_and_experts_are_analysed(study, tmp_path):
    preset = Preset(ARMS)
    runner, _, started = study(preset, jobs_of(preset), at_once=1)
    assert runner.run(never) == 0
    assert started == [
        "dense-seed1 train",
        "hashed-seed1 train",
        "hashed-seed1 analyse",
        "frozen-seed1 train",
        "frozen-seed1 analyse",
    ]
    assert set(results(tmp_path)) == {"dense-seed1", "hashed-seed1", "frozen-seed1"}
    again, _, started = study(preset, jobs_of(preset))
    assert again.run(never) == 0 and started == []  # nothing is done twice


def test_arms_wait_for_the_rate_of_their_kin(study, tmp_path):
    preset = Preset(ARMS, learning_rates=RATES)
    slow = {"tune-hashed-0.2": "import time; time.sleep(0.5)"}
    runner, _, started = study(preset, jobs_of(preset), slow)
    assert runner.run(never) == 0
    order = [name.split()[0] for name in started]
    assert order.index("dense-seed1") > order.index("tune-dense-0.2")
    assert order.index("hashed-seed1") > order.index("tune-hashed-0.2")
    assert not any("analyse" in name for name in started if name.startswith("tune"))
    assert {name: run["learning_rate"] for name, run in results(tmp_path).items() if "seed" in name} == {
        "dense-seed1": 0.2,
        "hashed-seed1": 0.2,
        "frozen-seed1": 0.2,
    }


def test_an_arm_that_trains_as_long_as_another(study, tmp_path):
    """10 steps of hashed at 2.1 s are 7 of dense at 3 s, in whole validations of 2 points: 8. They stay so when it goes
    on."""
    arms = {**ARMS, "dense_time": ArmConfig(kin="dense", same_time_as="hashed")}
    preset = Preset(arms, learning_rates=RATES, points=2)
    jobs = jobs_of(preset, seeds=(1, 2))
    stop = {"dense_time-seed2": "import sys; sys.exit(1)"}
    runner, lines, started = study(preset, jobs, stop)
    assert runner.run(never) == 1
    order = [name.split()[0] for name in started]
    assert order.index("dense_time-seed1") > order.index("tune-hashed-0.2")
    assert results(tmp_path)["dense_time-seed1"]["steps"] == 8
    assert "dense_time: 8 steps, as long as hashed" in lines
    for path in (tmp_path / "results").glob("tune-dense-*"):  # other times cannot move them any more
        found = json.loads(path.read_text())
        found["measured"]["training_seconds"] *= 5
        path.write_text(json.dumps(found))
    again, lines, _ = study(preset, jobs)
    assert again.run(never) == 0 and not any("as long as" in line for line in lines)
    assert {results(tmp_path)[f"dense_time-seed{seed}"]["steps"] for seed in (1, 2)} == {8}
    assert results(tmp_path)["dense-seed1"]["steps"] == 10


def test_one_that_fails_is_named_and_the_others_go_on(study, tmp_path):
    preset = Preset(ARMS, learning_rates=RATES)
    code = {
        "tune-dense-0.1": "import sys; sys.exit(1)",  # of two rates one is left
        "hashed-seed1 train": "import sys; print('first'); sys.exit('the loss is not finite')",
        "frozen-seed1 analyse": "import sys; sys.exit(3)",
    }
    runner, lines, started = study(preset, jobs_of(preset), code)
    assert runner.run(never) == 1
    assert set(results(tmp_path)) == {"tune-dense-0.2", "tune-hashed-0.1", "tune-hashed-0.2", "dense-seed1"}
    text = "\n".join(lines)
    assert "failed: hashed-seed1: exit code 1: the loss is not finite" in text
    assert "failed: frozen-seed1: exit code 3" in text and "failed: tune-dense-0.1" in text
    again, _, started = study(preset, jobs_of(preset))
    assert again.run(never) == 0  # a new start tries them again
    assert "hashed-seed1 train" in started and "dense-seed1 train" not in started


def test_without_any_rate_the_kin_cannot_run(study, tmp_path):
    preset = Preset(ARMS, learning_rates=RATES)
    code = {f"tune-hashed-{rate}": "import sys; sys.exit(1)" for rate in RATES}
    runner, lines, started = study(preset, jobs_of(preset), code)
    assert runner.run(never) == 1
    assert "dense-seed1" in results(tmp_path) and not any(s.startswith("frozen") for s in started)
    assert any("frozen-seed1: no learning rate: every run of hashed" in line for line in lines)


def test_the_end_of_the_time_stops_what_runs(study, tmp_path, monkeypatch):
    preset = Preset(ARMS)
    runner, lines, started = study(preset, jobs_of(preset), {"hashed-seed1": SLEEP}, at_once=1)

    def monotonic():  # an hour later as soon as the second arm runs
        return time.monotonic() + (3600 if len(started) == 2 else 0)

    clock = SimpleNamespace(monotonic=monotonic, sleep=time.sleep)
    monkeypatch.setattr(foreroute.launch.study.runner, "time", clock)
    assert runner.run(never, seconds=3600.0) == TIME_IS_UP
    assert set(results(tmp_path)) == {"dense-seed1"} and started[-1] == "hashed-seed1 train"
    assert "2 of 3 runs to do" in lines[-1]
    none, _, started = study(preset, jobs_of(preset))
    assert none.run(never, seconds=0.5) == TIME_IS_UP and started == []  # not worth a start


def test_a_signal_stops_and_its_code_is_given(study, tmp_path):
    preset = Preset(ARMS)
    runner, lines, started = study(preset, jobs_of(preset), dict.fromkeys(("dense-seed1", "hashed-seed1"), SLEEP))
    assert runner.run(lambda: 143 if len(started) == 2 else 0) == 143
    assert results(tmp_path) == {} and "stopped with 3 of 3" in lines[-1]


def test_a_process_that_does_not_end_is_killed(study, tmp_path, monkeypatch):
    monkeypatch.setattr(foreroute.launch.study.runner, "_STOP_S", 0.3)
    preset = Preset({"dense": ArmConfig()})
    runner, *_ = study(preset, jobs_of(preset), {"dense-seed1": STUBBORN})
    log = tmp_path / "logs/dense-seed1.log"

    def up():
        return 130 if log.exists() and "up" in log.read_text() else 0

    start = time.monotonic()
    assert runner.run(up) == 130 and time.monotonic() - start < 30


def test_results_of_another_study_are_refused(study, tmp_path):
    preset = Preset(ARMS)
    runner, _, _ = study(preset, jobs_of(preset))
    assert runner.run(never) == 0
    other = [
        replace(job, config=replace(job.config, train=replace(job.config.train, steps=12))) for job in jobs_of(preset)
    ]
    with pytest.raises(UserError, match=r"dense-seed1.* is of another study: train.steps was 10, now it is 12"):
        study(preset, other)


def test_an_arm_keeps_its_learning_rate(study, tmp_path):
    """A rate that becomes the best later is not mixed in; seeds that are mixed already are refused at the start."""
    preset = Preset(ARMS, learning_rates=RATES)
    jobs = jobs_of(preset, seeds=(1, 2))
    fails = {"dense-seed2": "import sys; sys.exit(1)", "hashed-seed2": "import sys; sys.exit(1)"}
    runner, *_ = study(preset, jobs, fails)
    assert runner.run(never) == 1
    path = tmp_path / "results/tune-dense-0.1.json"
    better = json.loads(path.read_text())
    better["bpc"] = {"dense": 0.5}
    path.write_text(json.dumps(better))
    again, lines, _ = study(preset, jobs)
    assert again.run(never) == 1
    assert any(
        "failed: dense-seed2: the best learning rate is now 0.1, but seeds of dense ran with 0.2" in line
        for line in lines
    )
    assert "hashed-seed2" in results(tmp_path) and "dense-seed2" not in results(tmp_path)

    two = json.loads((tmp_path / "results/hashed-seed2.json").read_text())
    two["learning_rate"] = two["options"]["optim.lr"] = 0.1
    (tmp_path / "results/hashed-seed2.json").write_text(json.dumps(two))
    with pytest.raises(UserError, match=r"hashed: seed 1 has learning_rate=0.2, seed 2 has 0.1"):
        study(preset, jobs)


@pytest.mark.slow
def test_children_end_with_the_study(tmp_path):
    """A process that asks for it gets SIGTERM when its parent is killed."""
    code = (
        "import subprocess, sys, time\n"
        "from foreroute.launch.study.runner import _end_with_parent\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], preexec_fn=_end_with_parent)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
