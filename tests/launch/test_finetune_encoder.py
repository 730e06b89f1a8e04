"""launch.finetune with a pre-trained encoder: what it writes and refuses."""

import json
from importlib.util import find_spec

import pytest
import torch

import foreroute.launch.finetune.program  # noqa: F401  (here, as DeepSpeed's first import may print)
from foreroute.engine.testing.tiny_words import SPECIAL, write_tokenizer

WORDS = ["good", "bad", "a", "film", "of", "the", "plot", "ends"]
SHORT = ["steps=4", "eval_every=2", "held_out=4", "threads=1", "batch=4"]
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers: `make hf`")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT with drawn weights; without transformers the tokenizer alone."""
    folder = tmp_path_factory.mktemp("encoder")
    write_tokenizer(folder, WORDS)
    (folder / "config.json").write_text("{}")
    if find_spec("transformers") is not None:
        import transformers

        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.BertConfig(vocab_size=len(SPECIAL) + len(WORDS), max_position_embeddings=128, **sizes)
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def task(tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    for name, count in (("train", 40), ("dev", 12)):
        rows = [f"film {('bad', 'good')[i % 2]} \t{i % 2}" for i in range(count)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *(f"w{i} {r}" for i, r in enumerate(rows))]))
        choices = [{"label": label, "text": word} for label, word in zip("ABCDE", WORDS, strict=False)]
        lines = [
            json.dumps({"answerKey": "ABCDE"[i % 5], "question": {"stem": f"{WORDS[i % 8]} {i}", "choices": choices}})
            for i in range(count)
        ]
        (folder / f"{name}_rand_split.jsonl").write_text("\n".join(lines) + "\n")
        rows = [f"film {i} number0 bad number1,{i} 7,+ number0 number1,{i + 7}" for i in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["Question,Numbers,Equation,Answer", *rows]) + "\n")
        (folder / f"{name}.txt").write_text("\n".join(f"a film of the plot {i} ends" for i in range(count)) + "\n")
    return folder


@pytest.mark.transformers
@needs_transformers
@pytest.mark.parametrize(
    ("name", "options", "ks"),
    [
        ("sst2", ["encoder.router=dense"], {"dense"}),
        ("csqa", ["k_min=2", "encoder.experts=4"], {"1", "2", "4"}),
        ("mlm", ["encoder.router=hashed", "encoder.start=copy", "k=2", "eval_k=[2]"], {"2"}),
        ("mawps", ["encoder.router=hashed", "k_min=4"], {"2", "4", "8"}),
    ],
)
def test_the_whole_way(run, encoder, tmp_path, task, name, options, ks):
    results = tmp_path / "results"
    line = [f"task={name}", f"task.path={task}", f"encoder.path={encoder}", f"encoder.results={results}"]
    done = run("finetune", *line, *SHORT, *options)
    assert done.returncode == 0, done.stderr
    assert f"{results}/" in done.stdout
    (path,) = results.iterdir()
    found = json.loads(path.read_text())
    assert path.name.startswith(f"{name}-") and set(found["dev"]) == ks
    assert found["settings"]["task"]["name"] == name
    count = {"mlm": None}.get(name, 12)
    assert all(score["examples"] == (count or score["examples"]) for score in found["dev"].values())
    assert [point["step"] for point in found["selection"]["curve"]] == [2, 4]
    again = run("finetune", *line, *SHORT, *options)
    assert again.returncode == 2 and "is there already" in again.stderr and again.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["task=csqa", "task.path=x", "run=y"], "task=csqa: must be sst2 with run=y; the others need encoder.path"),
        (["task=other", "task.path=x"], "task/other"),
        (["task=svamp", "encoder.path=E"], "task.path is missing: the folder of train.csv and dev.csv"),
        (["task=asdiv", "task.path=x", "run=y"], "task=asdiv: must be sst2 with run=y; the others need encoder.path"),
        (["task.path=x"], "run is missing: the folder of a trained run; or encoder.path"),
        (["task=mlm", "encoder.path=E"], "task.path is missing: the folder of train.txt and dev.txt"),
        (["task.path=x", "run=y", "encoder.path=E"], "run=y and encoder.path=E: must be one of them"),
        (["task.path=x", "encoder.path=E"], "encoder.path=E: has no config.json"),
        (["task.path=T", "encoder.path=E", "k=9"], "k=9: must be 1 to encoder.experts=8"),
        (["task.path=T", "encoder.path=E", "k=2", "k_min=4"], "k_min=4: must be at most k=2"),
        (["task.path=T", "encoder.path=E", "encoder.router=dense", "k=2"], "k=2: encoder.router=dense has no k"),
        (["task.path=T", "encoder.path=E", "encoder.start=cut"], "encoder.start=cut: must be split | copy"),
        (["task.path=T", "encoder.path=E", "eval_k=[0]"], "eval_k=[0]: needs one or more, each 1 to encoder.experts=8"),
    ],
)
def test_bad_options_are_one_line(run, tmp_path, options, words):
    done = run("finetune", *options, f"encoder.results={tmp_path}")
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (None, "train.csv: cannot be read (No such file or directory)"),
        ("Question,Numbers,Answer", "train.csv: has no column Equation, it must be as SVAMP's"),
        (
            "Question,Numbers,Equation,Answer\nwho ?,3,+ number0,3",
            "train.csv, line 2: Equation is '+ number0', it must be",
        ),
        ("Question,Numbers,Equation,Answer\nwho ?,3,number0,3", "held_out=1000: must be below the number of training"),
    ],
)
def test_bad_problems_are_one_line(run, encoder, tmp_path, line, words):
    if line is not None:
        (tmp_path / "train.csv").write_text(line + "\n")
    options = [f"task.path={tmp_path}", f"encoder.path={encoder}", f"encoder.results={tmp_path / 'r'}"]
    done = run("finetune", "task=svamp", *options)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "r").exists()


@pytest.mark.skipif(find_spec("transformers") is not None, reason="transformers is installed")
def test_without_transformers_it_says_what_to_install(run, encoder, tmp_path, task):
    options = [f"task.path={task}", f"encoder.path={encoder}", f"encoder.results={tmp_path / 'r'}"]
    done = run("finetune", *options, *SHORT)
    assert done.returncode == 2 and "encoder.path: needs transformers, which `make hf` installs" in done.stderr
    assert done.stderr.count("\n") == 1
