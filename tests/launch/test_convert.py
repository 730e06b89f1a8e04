"""The program that turns a dense model of transformers into one with experts."""

import json
from types import SimpleNamespace

import pytest
import torch

from foreroute.engine.convert.adapters import AdaptedFeedForward
from foreroute.engine.errors import UserError
from foreroute.launch.convert import Choose, ConvertArgs, convert

CASES = (
    ("split", Choose.table, 8),
    ("split", Choose.live, 8),
    ("copy", Choose.live, 2),
    ("adapters", None, 3),
    ("adapters", Choose.live, 2),
)
WIDTHS = {"copy": 32, "split": 4, "adapters": 64}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"model": ""}, "model is missing: the folder of a dense model of transformers"),
        ({"out": ""}, "out is missing: a new folder"),
        ({"out": "."}, "out=.: is there already; name a new folder"),
        ({"text": None}, "text is missing: choose=table with start=split is made on a text; or choose=random"),
        ({"k": 9}, "k=9: must be at most experts=8"),
        ({"start": "copy", "choose": Choose.table}, "choose=table with start=copy: must be random or live"),
        ({"start": "merge"}, "start=merge: must be one of copy, split, adapters"),
        ({"experts": 0}, "experts=0: must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, fault):
    with pytest.raises(UserError, match=fault):
        ConvertArgs(**{"model": "dense", "out": "no such folder", "text": "lines.txt", **options})


@pytest.fixture
def dense(tmp_path):
    """A folder with a small BERT and its words, and a text."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "dense")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "dense")
    (tmp_path / "lines.txt").write_text("\n".join(["a b c", "d e f g h", "", "a a j i"] * 5))
    return SimpleNamespace(model=tmp_path / "dense", text=tmp_path / "lines.txt")


def adapted(model):
    return [module for module in model.modules() if isinstance(module, AdaptedFeedForward)]


@pytest.mark.transformers
def test_written_models_compute_what_was_converted(dense, tmp_path, capsys):
    """Each start and choice; k=8 of 8 slices, any k of copies and adapters equal the dense model."""
    from foreroute.engine.hugging_face.calibration import read_lines
    from foreroute.engine.hugging_face.converted_folder import open_converted, open_dense

    batch = read_lines(dense.model, dense.text, 100)[0]
    real = batch["attention_mask"].bool()
    want = open_dense(dense.model).eval()(**batch)[0][real]
    for start, choose, k in CASES:
        out = tmp_path / f"{start}-{choose}"
        args = ConvertArgs(str(dense.model), str(out), start=start, choose=choose, k=k, text=str(dense.text))
        assert convert(args) == 0
        printed = capsys.readouterr().out
        assert f"BertModel: 2 feed-forwards, 8 experts of {WIDTHS[start]} gelu" in printed
        assert printed.rstrip().endswith(f"written: {out}, k={k}")
        model, experts = open_converted(out)
        experts.attach(model, ids="input_ids", mask="attention_mask", layout="BQ")
        assert experts.k == k and ((model(**batch)[0][real] - want).norm() < 1e-5 * want.norm())
        if start == "split":
            experts.k = 1
            assert (model(**batch)[0][real] - want).norm() > 1e-3 * want.norm()
    assert [found.router_reads_input for found in adapted(model)] == [True] * 2
    noted = json.loads((out / "config.json").read_text())
    del noted["foreroute"]["options"]["router_reads_input"]  # as in a folder of an earlier version
    (out / "config.json").write_text(json.dumps(noted))
    assert [found.router_reads_input for found in adapted(open_converted(out)[0])] == [False] * 2
    with pytest.raises(UserError, match=r"is no converted model: its config\.json has no entry foreroute"):
        open_converted(dense.model)
    with pytest.raises(UserError, match=r"has no config\.json: must be a model of transformers"):
        open_dense(tmp_path)
    with pytest.raises(UserError, match=r"text=.*: cannot be read \(No such file"):
        read_lines(dense.model, tmp_path / "none.txt", 9)
