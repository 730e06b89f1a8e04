"""A BERT of transformers with drawn weights: read, masked and as experts, against transformers' own results."""

import json

import pytest
import torch

from foreroute.engine.errors import UserError
from foreroute.engine.finetune.loop import Recipe, finetune
from foreroute.engine.finetune.masking import NOT_ASKED
from foreroute.engine.hugging_face.encoders.bert import encoder_folder, open_bert
from foreroute.engine.hugging_face.encoders.build import EncoderOptions, build_encoder
from foreroute.engine.hugging_face.encoders.experts import as_experts
from foreroute.engine.hugging_face.encoders.models import Encoder, MaskedModel
from foreroute.engine.hugging_face.encoders.registry import Task, read_parts
from foreroute.engine.hugging_face.encoders.texts import WordPieces
from foreroute.engine.testing.tiny_words import SPECIAL, write_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.transformers
WORDS = [f"w{i}" for i in range(20)]
SIZE, EXPERTS = len(SPECIAL) + len(WORDS), 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT with its head for masked ids."""
    path = tmp_path_factory.mktemp("bert")
    write_tokenizer(path, WORDS)
    config = transformers.BertConfig(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(path)
    return path


@pytest.fixture
def words(folder):
    return WordPieces(folder, 32)


def batch_of(words):
    return words.pad(words.encode([" ".join(WORDS[:n]) for n in (18, 3, 11)]))


def test_the_loss_of_masked_ids_is_that_of_transformers(folder, words):
    found = open_bert(folder, dropout=0.0, masked=True, seed=1)
    model = MaskedModel(Encoder(found.model, None), words, found.head).eval()
    batch = model.masked(words.encode([" ".join(WORDS[:n]) for n in (18, 3, 11)]), torch.Generator().manual_seed(3))
    theirs = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    tokens = batch.tokens
    want = theirs(input_ids=tokens.ids_BQ, attention_mask=tokens.mask_BQ, labels=batch.label_BQ).loss
    loss = model.loss(batch, 1)
    assert (batch.label_BQ != NOT_ASKED).sum() > 2 and loss.item() == pytest.approx(want.item(), rel=1e-6)
    want.backward()
    loss.backward()
    ours = dict(found.model.named_parameters())
    for name, parameter in theirs.bert.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("router", ["frozen", "hashed"])
@pytest.mark.parametrize("split", [True, False])
def test_as_experts_it_is_the_same_model(folder, words, router, split):
    """Slices at all experts, copies at every k; with fewer slices something is missing (negative control)."""
    batch = batch_of(words)
    dense = open_bert(folder, dropout=0.0, masked=False, seed=1).model.eval()
    model = open_bert(folder, dropout=0.0, masked=False, seed=1).model.eval()
    experts = as_experts(model, router, EXPERTS, batch.ids_BQ.flatten().numpy(), split=split)
    real_BQ = batch.mask_BQ > 0
    with torch.no_grad():
        want = Encoder(dense, None)(batch, 1)[real_BQ]
        for k in range(1, EXPERTS + 1):
            got = Encoder(model, experts)(batch, k)[real_BQ]
            same = ((got - want).norm() / want.norm()).item() < 1e-5
            assert same == (not split or k == EXPERTS)


def test_hashed_experts_follow_from_the_word_piece(folder, words):
    """The same id has the same slices wherever it stands: an n-gram is one id."""
    model = open_bert(folder, dropout=0.0, masked=False, seed=1).model
    tokens = words.pad(words.encode(["w1 w2 w1", "w3 w1 w2"]))
    experts = as_experts(model, "hashed", EXPERTS, tokens.ids_BQ.flatten().numpy())
    router = experts.planner._routers[0]
    ids, left = tokens.ids_BQ, torch.zeros(2, 0, dtype=torch.int64)
    keys = router.table.key_rows.of(ids, left)
    assert torch.equal(keys, ids)


@pytest.mark.parametrize(
    ("config", "words"),
    [({"model_type": "gpt2"}, "holds a gpt2, must be a bert"), ({"model_type": "no such"}, "cannot be read")],
)
def test_what_is_no_bert_is_one_line(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as found:
        open_bert(encoder_folder(str(tmp_path)), dropout=0.0, masked=False, seed=1)
    assert "\n" not in str(found.value)


class Quiet:
    def step(self, step): ...

    def point(self, step, point): ...


def write_files(folder, task):
    """Texts with a word that has the answer."""
    for name, count in (("train", 40), ("dev", 20)):
        if task == "sst2":
            rows = ["sentence\tlabel", *(f"w{i % 17} w2 w{18 + i % 2} \t{i % 2}" for i in range(count))]
            (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")
        elif task == "csqa":
            rows = []
            for i in range(count):
                choices = [{"label": "ABCDE"[j], "text": f"w{j} w{10 + j}"} for j in range(5)]
                question = {"stem": f"w{10 + i % 5} w{i % 20}", "choices": choices}
                rows.append(json.dumps({"answerKey": "ABCDE"[i % 5], "question": question}))
            (folder / f"{name}_rand_split.jsonl").write_text("\n".join(rows) + "\n")
        elif task == "svamp":
            rows = [
                f"w{i} number0 w{i % 2} number1,{i} 7,{'+-'[i % 2]} number0 number1,{i - 7 if i % 2 else i + 7}"
                for i in range(count)
            ]
            (folder / f"{name}.csv").write_text("\n".join(["Question,Numbers,Equation,Answer", *rows]) + "\n")
        else:
            rows = [" ".join(f"w{(i + j) % 20}" for j in range(8)) for i in range(count)]
            (folder / f"{name}.txt").write_text("\n\n".join(rows) + "\n")


@pytest.mark.parametrize("task", ["sst2", "csqa", "mlm", "svamp"])
@pytest.mark.parametrize("router", ["dense", "frozen", "hashed"])
def test_each_task_is_learnt(folder, words, tmp_path, task, router):
    """The loss falls, and every weight but the pooler's changes; k grows."""
    write_files(tmp_path, task)
    parts = read_parts(Task(task), tmp_path, words, 10, 1)
    assert len(parts.dev) == 20
    model = build_encoder(folder, words, parts, EncoderOptions(router, EXPERTS, dropout=0.0))
    k, k_min = (1, None) if router == "dense" else (EXPERTS, 2)
    before = model.evaluate(parts.train, k).loss
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    finetune(model, parts.train, parts.held_out, Recipe(k, 30, 8, (0.003,), 30, 1, 1.0, k_min), Quiet())
    assert model.evaluate(parts.train, k).loss < 0.9 * before
    same = {name for name, value in model.named_parameters() if torch.equal(value, weights[name])}
    assert {name for name in same if "token_type" not in name} == set()
