"""launch.analyse on runs of a few steps: its start is the run's own initialisation, and checkpoints are read in
order."""

import json

import numpy as np
import pytest


def trained(run, tmp_path, text, name, *options):
    done = run(
        "train",
        "experiment=debug",
        "corpus=file",
        f"corpus.path={text}",
        f"corpus.cache_dir={tmp_path / 'cache'}",
        f"train.runs_dir={tmp_path}",
        f"train.name={name}",
        "train.steps=4",
        "train.save_every=2",
        "train.keep=3",
        "train.threads=1",
        "eval.max_symbols=64",
        "eval.k=[1,4]",
        *options,
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / name


def analysed(run, folder):
    done = run("analyse", f"run={folder}", "symbols=64")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "analysis.json").read_text()), done.stdout


@pytest.mark.slow
def test_a_run_that_learns_nothing_ends_as_it_starts(run, tmp_path, text):
    """With a learning rate of 0 the initialisation that is drawn anew must equal the checkpoints, bit for bit."""
    still, _ = analysed(run, trained(run, tmp_path, text, "still", "moe.router=frozen", "optim.lr=0"))
    for name in ("output_similarity", "weight_similarity"):
        assert still[name]["start"] == still[name]["end"]
    between = still["routing_change"]["between"]
    assert [(c["from"], c["to"], c["share"]) for c in between] == [(0, 2, 0), (2, 4, 0), (0, 4, 0)]

    moved, output = analysed(run, trained(run, tmp_path, text, "moved", "moe.router=frozen", "optim.lr=0.05"))
    assert moved["output_similarity"]["start"] == still["output_similarity"]["start"]
    assert moved["output_similarity"]["end"] != still["output_similarity"]["end"]
    shares = [change["share"] for change in moved["routing_change"]["between"]]
    assert shares[0] > 0 and shares[2] > 0
    assert f"step 0 to 4: {shares[2]:.1%} of tokens changed their 2 experts" in output
    assert set(moved["routes"]) == {"1", "2", "4"} and moved["symbols"] == 64


def test_hashed_routes_do_not_change_with_training(run, tmp_path, text):
    found, _ = analysed(run, trained(run, tmp_path, text, "hashed", "optim.lr=0.05"))
    assert [change["share"] for change in found["routing_change"]["between"]] == [0, 0, 0]
    assert found["weight_similarity"]["start"] != found["weight_similarity"]["end"]


@pytest.mark.slow
def test_what_a_stop_left_changes_nothing(run, tmp_path, text):
    """Checkpoints of steps 1 and 3 lie between those of train.save_every=2, as after two stops."""
    folder = trained(
        run, tmp_path, text, "stopped", "moe.router=frozen", "optim.lr=0.05", "train.save_every=1", "train.keep=4"
    )
    every, _ = analysed(run, folder)
    assert [c["to"] for c in every["routing_change"]["between"]] == [1, 2, 3, 4, 4]
    config = folder / "config.yaml"
    assert "save_every: 1\n" in config.read_text()
    config.write_text(config.read_text().replace("save_every: 1\n", "save_every: 2\n"))
    found, _ = analysed(run, folder)
    between = [(c["from"], c["to"]) for c in found["routing_change"]["between"]]
    assert between == [(0, 2), (2, 4), (0, 4)]


def test_shuffled_keys_are_drawn_anew(run, tmp_path, text):
    """So there is no change to measure: another draw is none of training."""
    found, _ = analysed(run, trained(run, tmp_path, text, "shuffled", "moe.keys=shuffled"))
    assert found["routing_change"]["between"] is None and set(found["routes"]) == {"1", "2", "4"}


@pytest.mark.parametrize(
    ("option", "word"), [("symbols=0", "symbols=0"), ("run=/does/not/exist", "/does/not/exist"), ("k=3", "k")]
)
def test_wrong_options_are_one_line(run, tmp_path, option, word):
    done = run("analyse", f"run={tmp_path}", option)
    assert done.returncode == 2 and word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_dense_run_has_no_experts(run, tmp_path, text):
    folder = trained(run, tmp_path, text, "dense", "moe.router=dense")
    done = run("analyse", f"run={folder}")
    assert done.returncode == 2 and "a dense model has no experts" in done.stderr


def test_a_live_router_is_compared_with_its_n_grams_and_distilled(run, tmp_path, text):
    folder = trained(run, tmp_path, text, "learned", "moe.router=learned", "schedule.k_max=2")
    file = tmp_path / "table.npy"
    done = run("analyse", f"run={folder}", "symbols=64", "counted=3000", f"table={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "analysis.json").read_text())["ngrams"]
    assert (found["counted"], found["held_out"]) == (3000, 64)
    assert all(set(layer) == {"1", "2", "3"} for layer in found["layers"])
    assert f"{found['layers'][0]['2']['sets']:.1%}" in done.stdout and f"written: {file}" in done.stdout
    config = (folder / "config.yaml").read_text()
    experts = int(config.split("experts: ")[1].split()[0])
    table = np.load(file)
    assert table.shape[0] == len(found["layers"]) and table.shape[2] == experts
    assert (np.sort(table, axis=2) == np.arange(experts)).all()

    planned = trained(run, tmp_path, text, "planned")
    assert analysed(run, planned)[0]["ngrams"] is None
    refused = run("analyse", f"run={planned}", f"table={file}")
    assert refused.returncode == 2 and "moe.router=hashed a live router" in refused.stderr
