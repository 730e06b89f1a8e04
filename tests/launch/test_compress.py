"""launch.compress makes a run's folder that evaluates, generates and trains on, on one rank and on two."""

import json
from contextlib import ExitStack

import pytest

from foreroute.engine.testing.ranks import Program, rank_environments
from foreroute.engine.testing.saved_run import save_model, untrained_run
from foreroute.launch.start.config_files import read_config, write_config
from foreroute.launch.testing.runs import small_run

EXPERTS = 8


def done(run, *arguments):
    found = run(*arguments)
    assert found.returncode == 0, found.stderr
    return found.stdout


def smaller(run, folder, name, *arguments):
    """Make a smaller run; its folder, and the last line of what is printed."""
    out = folder.parent / name
    printed = done(run, "compress", f"run={folder}", f"out={out}", "threads=1", *arguments)
    found = json.loads(printed.splitlines()[-1])
    assert json.loads((out / "compressed.json").read_text()).items() <= found.items()
    return out, found


def bits(run, folder):
    return json.loads(done(run, "evaluate", f"run={folder}", "threads=1", "k=[2]").splitlines()[-1])["bpc"]["2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of an untrained run."""
    found = tmp_path_factory.mktemp("runs") / "run"
    made = untrained_run(found.parent, k=2, experts=EXPERTS, expert_width=6)
    save_model(found, made)
    write_config(made.config, found / "config.yaml")
    return found


def test_a_smaller_run_evaluates_and_generates(run, folder):
    out, found = smaller(run, folder, "merged", "method=merge", "experts=6")
    assert found["expert_bytes"] * EXPERTS == found["expert_bytes_before"] * 6
    config = read_config(out / "config.yaml")
    assert (config.moe.experts, config.train.name, config.train.runs_dir) == (6, "merged", str(folder.parent))
    whole = bits(run, folder)
    assert 0 < abs(bits(run, out) - whole) < 0.1 * whole
    assert len(done(run, "generate", f"run={out}", "threads=1", "length=5", "prompt=abc")) >= 9
    out, found = smaller(run, folder, "int8", "method=int8")
    assert bits(run, out) == pytest.approx(whole, rel=1e-3) and found["expert_bytes_before"] > found["expert_bytes"]
    again = run("compress", f"run={out}", f"out={folder.parent / 'none'}", "experts=4")
    assert again.returncode == 2 and "has int8 weights; must be the run that it was made of" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["experts=6", "ranks=4"], "experts=6: must be divisible by ranks=4, which share them"),
        (["experts=1"], "schedule.k_max=2: must be at most moe.experts=1"),
        (["experts=4", "k=9"], "k=9: must be at most moe.experts=8"),
        ([], "experts=None: merge and prune need it, int8 has none"),
        (["method=int8", "by=use"], "by=use: goes with merge and prune, int8 has none"),
        (["experts=4", "out=."], "out=.: is there already; must be a new folder"),
    ],
)
def test_a_wrong_option_is_one_line(run, folder, arguments, line):
    found = run("compress", f"run={folder}", f"out={folder.parent / 'none'}", *arguments)
    assert found.returncode == 2 and found.stderr == f"foreroute: {line}\n"
    assert not (folder.parent / "none").exists()


def test_two_k_in_contrast(run, folder):
    plain = [f"run={folder}", "threads=1", "length=8", "prompt=abc", "k=2", "temperature=0"]
    texts = {done(run, "generate", *plain, "contrast=1", f"contrast_beta={beta}") for beta in (0, 9)}
    assert done(run, "generate", *plain) in texts and len(texts) == 2
    refused = run("generate", *plain, "contrast=2")
    assert (
        refused.returncode == 2
        and refused.stderr == "foreroute: contrast=2: must be less than k=2, of a run with experts\n"
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def options(run, runs):
    """Of a run of four steps, which is there."""
    steps = ["schedule.growth=constant", "schedule.k_max=2", "optim.warmup_steps=0", "train.log_every=1"]
    found = [*small_run(runs), f"train.runs_dir={runs}", f"moe.experts={EXPERTS}", *steps]
    if not (runs / "debug").exists():
        done(run, "train", *found, "train.steps=4")
    return [*found, "train.resume=true"]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "experts"), [("merge", 6), ("prune", 4)])
def test_it_trains_on_alone_and_on_two_ranks(run, runs, options, method, experts):
    found = {}
    for ranks in (1, 2):
        out, _ = smaller(run, runs / "debug", f"{method}{ranks}", f"method={method}", f"experts={experts}")
        more = [*options, f"moe.experts={experts}", f"train.name={out.name}", "train.steps=7"]
        if ranks == 1:
            assert "resumed at step 4" in done(run, "train", *more)
        else:
            main = "import foreroute.launch.train; foreroute.launch.train.main()"
            with ExitStack() as stack:
                both = [Program(main, [*more, "parallel.expert_ranks=2"], own) for own in rank_environments(2)]
                answers = [stack.enter_context(program).wait() for program in both]
            assert [code for code, *_ in answers] == [0, 0], answers
        found[ranks] = losses(out)
        summary = json.loads((out / "summary.json").read_text())
        assert summary["steps"] == 7 and summary["parameters"] < 60_000
    assert len(found[1]) == 7 and found[2] == pytest.approx(found[1], rel=1e-5)
    assert found[1][:4] == losses(runs / "debug") and found[1][4:] != found[1][:3]


@pytest.mark.slow
def test_a_complete_run_is_summarised_when_it_is_resumed(run, runs, options):
    out, _ = smaller(run, runs / "debug", "complete", "experts=4", "by=use")
    done(run, "train", *options, "moe.experts=4", "train.name=complete", "train.steps=4")
    assert json.loads((out / "summary.json").read_text())["bpc"]["1"] > 0


@pytest.mark.slow
def test_int8_does_not_train_on(run, runs, options):
    smaller(run, runs / "debug", "int8", "method=int8")
    refused = run("train", *options, "train.name=int8", "train.steps=6")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "has int8 weights, for evaluation alone; resume the run it was made of" in refused.stderr
