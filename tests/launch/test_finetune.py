"""The program as a person runs it: what it starts from, selects by, writes and refuses."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from foreroute.engine.checkpoint.trained_run import open_saved
from foreroute.engine.model.build import build_model
from foreroute.launch.finetune import program
from foreroute.launch.finetune.args import FinetuneArgs, TaskArgs
from foreroute.launch.finetune.of_run import classifier_of, config_of
from foreroute.launch.finetune.report import write_result
from foreroute.launch.start.config_files import read_config
from foreroute.launch.testing.runs import small_run

ROOT = Path(__file__).resolve().parents[2]
SST2 = Path(os.environ.get("FOREROUTE_DATA", "")) / "sst2"
TASK = TaskArgs("unread")
SHORT = ["steps=6", "eval_every=3", "held_out=20", "threads=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Small runs: a folder for each router, and for each kind of tables at a dense model's input."""
    folder = tmp_path_factory.mktemp("finetune")
    at_input = {"ngram": ["model.ngram=2", "model.ngram_rows=64"], "signatures": ["model.signatures=true"]}
    for name in ("hashed", "frozen", "dense", *at_input):
        router = "dense" if name in at_input else name
        options = [
            *small_run(folder),
            f"moe.router={router}",
            "train.steps=3",
            f"train.name={name}",
            f"train.runs_dir={folder}",
            *at_input.get(name, []),
        ]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", ["train", *options])
            importlib.import_module("foreroute.launch.train").main()
        assert end.value.code == 0
    return folder


def write_task(folder: Path, *, flip_dev: bool = False) -> Path:
    """Sentences with a word that tells the label; dev has 70 of them."""
    folder.mkdir()
    rng, words = random.Random(0), ["a", "film", "of", "the", "plot", "ends"]
    for name, count in (("train.tsv", 200), ("dev.tsv", 70)):
        lines = ["sentence\tlabel"]
        for i in range(count):
            text = [*rng.choices(words, k=rng.randrange(1, 5)), ("bad", "good")[i % 2]]
            label = i % 2 if name == "train.tsv" or not flip_dev else 1 - i % 2
            lines.append(f"{' '.join(text)} \t{label}")
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def task(tmp_path):
    return write_task(tmp_path / "task")


def copy_of(runs, router, tmp_path):
    """The run in a folder of this test's own, so that results do not meet."""
    folder = tmp_path / router
    folder.mkdir()
    for name in ("config.yaml", "checkpoints"):
        (folder / name).symlink_to(runs / router / name)
    return folder


@pytest.mark.parametrize("router", ["hashed", "frozen", "dense"])
def test_the_whole_way(run, runs, tmp_path, task, router):
    folder = copy_of(runs, router, tmp_path)
    done = run("finetune", f"run={folder}", f"task.path={task}", *SHORT, "eval_k=[1,4]", "name=x")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "finetune/x.json").read_text())
    assert set(found["dev"]) == ({"dense"} if router == "dense" else {"1", "4"})
    assert found["trained_k"] == (None if router == "dense" else 4)
    for score in found["dev"].values():
        assert score["examples"] == 70 and score["accuracy"] == score["correct"] / 70
        low, high = score["interval_95"]
        assert low < score["accuracy"] < high
        assert score["better_than_majority"] == (low > 0.5)
    assert found["majority"] == {"label": 0, "share": 0.5}
    assert [point["step"] for point in found["selection"]["curve"]] == [3, 6]
    assert found["selection"]["chosen"] in found["selection"]["curve"]
    assert found["settings"]["steps"] == 6 and found["run_step"] == 3
    assert "step 6/6  lr 0.0001 loss" in done.stdout and "always 0" in done.stdout
    for name, score in found["dev"].items():
        label = name if router == "dense" else f"k = {name}"
        told = done.stdout.split("not better than always saying 0: ")[1:]
        assert bool(told and label in told[0].splitlines()[0].split(", ")) != score["better_than_majority"]


def test_nothing_that_shares_five_words_with_a_held_out_sentence_is_trained_on(run, runs, tmp_path, monkeypatch):
    """Train has phrases of its sentences, as SST-2's; what the program really trains on is looked at, not hold_out
    alone."""
    folder, task = copy_of(runs, "dense", tmp_path), tmp_path / "phrases"
    task.mkdir()
    rng, words = random.Random(1), [f"w{i}" for i in range(60)]
    rows = ["sentence\tlabel"]
    for i in range(60):
        text = rng.choices(words, k=12)
        rows += [f"{' '.join(text[a:b])} \t{i % 2}" for a, b in ((0, 12), (0, 7), (5, 12), (9, 12))]
    for name in ("train.tsv", "dev.tsv"):
        (task / name).write_text("\n".join(rows) + "\n")
    seen = []

    def select(classifier, train, held_out, *others):
        seen.append((train, held_out))
        return original(classifier, train, held_out, *others)

    original = program.train_and_select
    monkeypatch.setattr(program, "train_and_select", select)
    assert run("finetune", f"run={folder}", f"task.path={task}", *SHORT).returncode == 0
    vocab = open_saved(folder, read_config(folder / "config.yaml"), print).corpus.vocab

    def fives(sentences):
        split = [vocab.decode(sentence.ids).split() for sentence in sentences]
        return {tuple(w[i : i + 5]) for w in split for i in range(len(w) - 4)}

    ((train, held_out),) = seen
    assert len(held_out) == 20 and len(train) > 50 and len(fives(held_out)) > 5
    assert not fives(train) & fives(held_out)


def read_checkpoint(run_folder):
    """Weights and buffers by parameter, experts stacked; and the tables' orderings. Read from the file itself."""
    (path,) = run_folder.glob("checkpoints/*/*.safetensors")
    parts: dict[str, list[torch.Tensor]] = {}
    tables = []
    with safe_open(path, "pt") as file:
        for key in sorted(file.keys()):
            kind, name = key.split("/", 1)
            if kind in ("weight", "buffer"):
                parts.setdefault(name.split("/")[0], []).append(file.get_tensor(key))
            elif key.endswith("/order_rE"):
                tables.append(file.get_tensor(key))
    weights = {n: torch.stack(p) if ".experts." in n else p[0] for n, p in parts.items()}
    return weights, tables


@pytest.mark.parametrize("router", ["hashed", "frozen", "dense"])
def test_fine_tuning_starts_from_the_checkpoint(runs, router):
    """Embeddings, attention, experts, gates and tables are those of the file; pretrained=false has none of the
    weights."""
    folder = runs / router
    stored, tables = read_checkpoint(folder)
    args = FinetuneArgs(run=str(folder), task=TASK, seed=7)
    saved = open_saved(folder, config_of(args), print)

    def start(pretrained):
        state = classifier_of(saved, replace(args, pretrained=pretrained)).state_dict()
        return {name.removeprefix("model."): value for name, value in state.items()}

    reused, new = start(True), start(False)
    head = {f"head.{i}.{name}" for i in (0, 3) for name in ("weight", "bias")}
    assert set(reused) == set(stored) | head and "embedding.weight" in stored
    assert ("blocks.0.moe.experts.w1" in stored) == (router != "dense")
    assert all(torch.equal(reused[name], value) for name, value in stored.items())
    assert all(torch.equal(reused[name], new[name]) for name in head)
    same = {name for name, value in stored.items() if torch.equal(new[name], value)}
    assert same <= {"blocks.0.moe.router.gate_bias", "blocks.1.moe.router.gate_bias"}
    assert len(tables) == (2 if router == "hashed" else 0)
    for table, hashed in zip(tables, saved.routers or [], strict=True):
        assert torch.equal(table, hashed.table.order_rE)


@pytest.mark.parametrize("kind", ["ngram", "signatures"])
def test_tables_at_the_input_stay_the_runs(runs, kind):
    """Whatever the seed of fine-tuning, with pre-trained or new weights: text finds the rows that it found in
    pre-training."""
    folder = runs / kind
    trained = read_config(folder / "config.yaml")
    ids_BQ, left_BC = torch.arange(40).reshape(2, 20), torch.zeros(2, 1, dtype=torch.int64)

    def start(seed, pretrained):
        args = FinetuneArgs(run=str(folder), task=TASK, seed=seed, pretrained=pretrained)
        saved = open_saved(folder, config_of(args), lambda _: None)
        return classifier_of(saved, args).model

    def rows(model):
        return model.input_tables.keys.rows_of(ids_BQ, left_BC).tolist()

    vocab_size = len(start(7, True).embedding.weight)
    own = rows(build_model(trained, vocab_size))
    other = replace(trained, train=replace(trained.train, seed=7))
    assert rows(build_model(other, vocab_size)) != own  # the seed does set them
    models = {new: [start(seed, not new) for seed in (7, 8)] for new in (False, True)}
    assert all(rows(model) == own for pair in models.values() for model in pair)
    if kind == "signatures":
        stored = read_checkpoint(folder)[0]["input_tables.weight_trE"]
        for pair in models.values():
            assert all(torch.equal(m.input_tables.weight_trE, stored) for m in pair)
    assert torch.equal(*(m.embedding.weight for m in models[False]))
    assert not torch.equal(*(m.embedding.weight for m in models[True]))  # drawn from the seed


def test_selection_never_sees_dev(run, runs, tmp_path, task):
    """Other labels in dev: the same weights are selected, and the right answers are the others."""
    folder = copy_of(runs, "hashed", tmp_path)
    flipped = write_task(tmp_path / "flipped", flip_dev=True)
    found = []
    for name, path in (("one", task), ("other", flipped)):
        done = run("finetune", f"run={folder}", f"task.path={path}", *SHORT, f"name={name}", "lr=[1e-2,1e-3]")
        assert done.returncode == 0, done.stderr
        found.append(json.loads((folder / f"finetune/{name}.json").read_text()))
        found[-1]["selection"].pop("seconds")
    assert found[0]["selection"] == found[1]["selection"]
    for k, score in found[0]["dev"].items():
        assert score["correct"] + found[1]["dev"][k]["correct"] == 70
    # negative control: labels of train do count
    (flipped / "train.tsv").write_text((flipped / "train.tsv").read_text().replace("good \t1", "good \t0"))
    assert (
        run("finetune", f"run={folder}", f"task.path={flipped}", *SHORT, "name=train", "lr=[1e-2,1e-3]").returncode == 0
    )
    train = json.loads((folder / "finetune/train.json").read_text())
    assert train["selection"]["curve"] != found[0]["selection"]["curve"]


def test_a_result_is_not_overwritten(run, runs, tmp_path, task):
    folder = copy_of(runs, "hashed", tmp_path)
    options = [f"run={folder}", f"task.path={task}", *SHORT, "steps=1", "k=2", "seed=5"]
    assert run("finetune", *options).returncode == 0
    path = folder / "finetune/pretrained-k2-seed5.json"
    before = path.read_bytes()
    again = run("finetune", *options)
    assert again.returncode == 2 and "is there already" in again.stderr
    assert again.stderr.count("\n") == 1 and path.read_bytes() == before
    assert run("finetune", *options, "pretrained=false").returncode == 0
    assert (folder / "finetune/none-k2-seed5.json").exists()
    meanwhile = write_result(path, {"of": "another process"})
    assert meanwhile.name == "pretrained-k2-seed5-again.json" and path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["task.path=/does/not/exist"], "/does/not/exist/train.tsv: cannot be read"),
        (["k=5"], "k=5: must be 1 to moe.experts=4"),
        (["eval_k=[1,8]"], "eval_k=[1, 8]: needs one or more, each 1 to moe.experts=4"),
        (["eval_k=[]"], "eval_k=[]: needs one or more"),
        (["steps=0"], "steps=0: must be at least 1"),
        (["lr=[]"], "lr=[]: needs one or more"),
        (["lr=fast"], "lr=fast: must be a"),
        (["dropout=1"], "dropout=1.0: must be in [0, 1)"),
        (["name=../x"], "name='../x': must be a plain file name"),
        (["held_out=51"], "held_out=51: must be at most 50"),
        (["recipe=none"], "recipe/none"),
        (["run=/does/not/exist"], "/does/not/exist/config.yaml: no such file"),
        (["sed=1"], "sed=1: no such option; did you mean seed? allowed: "),
    ],
)
def test_bad_options_are_one_line(run, runs, tmp_path, task, options, word):
    folder = copy_of(runs, "hashed", tmp_path)
    done = run("finetune", f"run={folder}", f"task.path={task}", *SHORT, *options)
    assert done.returncode == 2 and word in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(folder.glob("finetune/*"))


def test_what_is_missing_is_named(run, runs):
    for options, word in ((["task.path=x"], "run is missing"), ([f"run={runs / 'hashed'}"], "task.path is missing")):
        done = run("finetune", *options)
        assert done.returncode == 2 and word in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_the_published_recipe(run, runs, tmp_path, task):
    """Its options reach the program, and options of the command line go before them."""
    folder = copy_of(runs, "hashed", tmp_path)
    done = run("finetune", f"run={folder}", f"task.path={task}", "recipe=published", "steps=1", "held_out=20")
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "finetune").iterdir()
    settings = json.loads(path.read_text())["settings"]
    assert settings["eval_every"] == 500 and settings["steps"] == 1 and settings["batch"] == 16
    assert settings["lr"] == [1e-4] and settings["dropout"] == 0.1


@pytest.mark.slow
def test_ctrl_c_ends_cleanly(runs, tmp_path, task):
    folder = copy_of(runs, "hashed", tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.finetune", f"run={folder}", f"task.path={task}", *SHORT, "steps=100000"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for line in process.stdout:
        if line.startswith("step 6/"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGINT and err == "", err
    assert out.endswith("stopped; no result was written\n")
    assert not list(folder.glob("finetune/*"))


@pytest.mark.slow
@pytest.mark.skipif(not SST2.is_dir(), reason="FOREROUTE_DATA has no sst2")
def test_real_sentences(run, runs, tmp_path):
    """All 872 of dev, with bytes beyond ASCII; that a model of three steps is near chance is said."""
    folder = copy_of(runs, "hashed", tmp_path)
    done = run("finetune", f"run={folder}", f"task.path={SST2}", *SHORT, "steps=3", "eval_k=[1]")
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "finetune").iterdir()
    found = json.loads(path.read_text())
    assert found["dev"]["1"]["examples"] == 872
    assert found["majority"] == {"label": 1, "share": 444 / 872}
    assert "not better than always saying 1: k = 1\n" in done.stdout
    assert found["examples"]["foreign_bytes"] == 0


def test_bytes_outside_the_vocabulary_are_said(run, runs, tmp_path, task):
    """A run on the newline-free stream knows only the bytes of its text."""
    text = tmp_path / "abc.txt"
    text.write_bytes(b"good bad film of the plot ends and so on, a " * 800)
    folder = tmp_path / "few"
    options = [*small_run(tmp_path), f"corpus.path={text}", "corpus.tokens=txl", "train.steps=1"]
    assert run("train", *options, "train.name=few", f"train.runs_dir={tmp_path}").returncode == 0
    path = task / "dev.tsv"
    path.write_bytes(path.read_bytes() + "film \u00e9 ! \t1\n".encode())
    done = run("finetune", f"run={folder}", f"task.path={task}", *SHORT, "steps=1")
    assert done.returncode == 0, done.stderr
    assert "3 bytes are not in the run's vocabulary and are left out" in done.stdout
