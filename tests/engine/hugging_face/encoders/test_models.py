"""Encoders with heads: what reaches plans, losses against plain loops, padding that changes nothing.

A small model of PyTorch alone stands for the encoder, so transformers is not needed; test_bert.py has the real one.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn

from foreroute.engine.config import Activation, Builder, MoEConfig
from foreroute.engine.finetune.loop import Recipe, finetune
from foreroute.engine.finetune.masking import NOT_ASKED
from foreroute.engine.hugging_face.encoders.models import AnswerModel, ChoiceHead, Encoder, Item, LabelHead, MaskedModel
from foreroute.engine.hugging_face.encoders.texts import WordPieces
from foreroute.engine.nested import tensors_in
from foreroute.engine.plug_in import replace_feed_forwards
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.tiny_words import SPECIAL, write_tokenizer

WORDS = [f"w{i}" for i in range(20)]
SIZE, WIDTH, EXPERTS = len(SPECIAL) + len(WORDS), 16, 4


class Theirs(nn.Module):
    """Looks to both sides: each id sees the mean of all real ones."""

    def __init__(self):
        super().__init__()
        self.ids = nn.Embedding(SIZE, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))

    def forward(self, input_ids, attention_mask):
        x = self.ids(input_ids)
        real = attention_mask[..., None].to(x.dtype)
        x = x + (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return SimpleNamespace(last_hidden_state=x + self.mlp(x))


@pytest.fixture
def words(tmp_path):
    write_tokenizer(tmp_path, WORDS)
    return WordPieces(tmp_path, 32)


def encoder(router="hashed", seed=0):
    torch.manual_seed(seed)
    model = Theirs()
    if router == "dense":
        return Encoder(model, None)
    moe = MoEConfig(
        router=router,
        experts=EXPERTS,
        expert_width=8,
        ngram=2,
        rows=512,
        builder=Builder.random,
        activation=Activation.relu,
    )
    experts = replace_feed_forwards(model, "mlp", width=WIDTH, vocab_size=SIZE, moe=moe, k=2, init_std=0.3, seed=seed)
    return Encoder(model, experts)


def answers(words, router="hashed", head=None):
    return AnswerModel(encoder(router), words, head or LabelHead(WIDTH, 2, dropout=0.0)).eval()


def masked(words, router="hashed"):
    of = encoder(router)
    torch.manual_seed(1)
    return MaskedModel(of, words, nn.Linear(WIDTH, SIZE)).eval()


def items(words, texts, labels):
    return [Item(one, label) for one, label in zip(words.encode(texts), labels, strict=True)]


def plans_of(encoder, tokens):
    return [tensor.tolist() for tensor in tensors_in(encoder.experts.plan(tokens.ids_BQ, mask=tokens.mask_BQ).plans)]


# Masked ids.


def masked_batch(model, text, draw=3):
    """A batch of one text, and where the mask stands for an id in it."""
    batch = model.masked(model.words.encode([text]), torch.Generator().manual_seed(draw))
    hidden_BQ = (batch.label_BQ != NOT_ASKED) & (batch.tokens.ids_BQ == 4)
    return batch, hidden_BQ[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("router", ["hashed", "frozen"])
def test_the_id_under_a_mask_reaches_neither_plans_nor_hidden_states(words, router):
    model = masked(words, router)
    text = " ".join(WORDS[:18])
    batch, places = masked_batch(model, text)
    assert places
    changed = text.split()
    changed[places[0] - 1] = "w19"  # after [CLS]
    other, same_places = masked_batch(model, " ".join(changed))
    assert places == same_places and not torch.equal(batch.label_BQ, other.label_BQ)
    assert torch.equal(batch.tokens.ids_BQ, other.tokens.ids_BQ)
    with torch.no_grad():
        assert torch.equal(model.encoder(batch.tokens, 2), model.encoder(other.tokens, 2))
        assert not torch.equal(model.loss(batch, 2), model.loss(other, 2))
    if router == "hashed":
        assert plans_of(model.encoder, batch.tokens) == plans_of(model.encoder, other.tokens)


@pytest.mark.parametrize("router", ["hashed", "frozen"])
def test_a_visible_id_reaches_them(words, router):
    """Negative control of the test above."""
    model = masked(words, router)
    text = " ".join(WORDS[:18])
    batch, _ = masked_batch(model, text)
    changed = text.split()
    visible = next(place for place in range(1, 18) if batch.label_BQ[0, place] == NOT_ASKED)
    changed[visible - 1] = "w19"
    other, _ = masked_batch(model, " ".join(changed))
    with torch.no_grad():
        assert not torch.equal(model.encoder(batch.tokens, 2), model.encoder(other.tokens, 2))
    if router == "hashed":
        assert plans_of(model.encoder, batch.tokens) != plans_of(model.encoder, other.tokens)


def test_labels_reach_no_plan(words):
    model = masked(words)
    batch, _ = masked_batch(model, " ".join(WORDS[:18]))
    wrong = replace(batch, label_BQ=batch.label_BQ.where(batch.label_BQ == NOT_ASKED, 7))
    seen = []
    begin = model.encoder.experts.planner.make
    model.encoder.experts.planner.make = lambda *args, **options: seen.append(begin(*args, **options)) or seen[-1]
    with torch.no_grad():
        losses = [model.loss(one, 2).item() for one in (batch, wrong)]
    plans = [[tensor.tolist() for tensor in tensors_in(one.plans)] for one in seen]
    assert len(plans) == 2 and plans[0] == plans[1] and losses[0] != losses[1]


@pytest.mark.parametrize("router", ["hashed", "frozen", "dense"])
def test_the_loss_of_masked_ids_is_the_mean_over_them(words, router):
    """A loop over ids in fp64; batches with padding, and with no masked id at all."""
    model = masked(words, router)
    sequences = words.encode([" ".join(WORDS[:n]) for n in (18, 3, 11)])
    batch = model.masked(sequences, torch.Generator().manual_seed(3))
    hidden = model.encoder(batch.tokens, 2).double()
    weight, bias = model.head.weight.double(), model.head.bias.double()
    found = []
    for row, labels in enumerate(batch.label_BQ.tolist()):
        for place, label in enumerate(labels):
            if label != NOT_ASKED:
                logits = weight @ hidden[row, place] + bias
                found.append(logits.logsumexp(0) - logits[label])
    assert model.loss(batch, 2).item() == pytest.approx(sum(found).item() / len(found), rel=1e-5)
    none = replace(batch, label_BQ=torch.full_like(batch.label_BQ, NOT_ASKED))
    assert model.loss(none, 2).item() == 0.0


def part_of(rank, ranks, folder, router):
    """Loss and gradient of a share of a batch; of 3 texts rank 0 has 1 and rank 1 has 2, of unequal lengths."""
    model = masked(WordPieces(folder, 32), router)
    sequences = model.words.encode([" ".join(WORDS[:n]) for n in (18, 3, 11)])
    batch = model.masked(sequences, torch.Generator().manual_seed(3))
    rows = range(3) if ranks == 1 else ((0,), (1, 2))[rank]
    part = model.masked([sequences[row] for row in rows], torch.Generator())
    longest = part.tokens.ids_BQ.shape[1]
    index = torch.tensor(list(rows))
    tokens = replace(part.tokens, ids_BQ=batch.tokens.ids_BQ[index, :longest])
    loss = model.loss(replace(part, tokens=tokens, label_BQ=batch.label_BQ[index, :longest]), 2)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if ranks > 1:
        for value in (loss := loss.detach(), *gradients.values()):
            dist.all_reduce(value)
            value /= ranks
    counts = int((batch.label_BQ[index] != NOT_ASKED).sum())
    return loss.item(), {name: grad.numpy() for name, grad in gradients.items()}, counts


def on_rank(rank, folder, router):
    return part_of(rank, 2, folder, router)


@pytest.mark.dist
@pytest.mark.parametrize("router", ["hashed", "dense"])
def test_two_ranks_with_unequal_numbers_of_masked_ids_are_as_one(words, tmp_path, router):
    """What DeepSpeed does: gradients are averaged over the ranks."""
    want, gradients, _ = part_of(0, 1, tmp_path, router)
    found = run_ranks(on_rank, 2, tmp_path, router)
    assert found[0][2] != found[1][2]
    for loss, theirs, _ in found:
        assert loss == pytest.approx(want, rel=1e-6)
        assert set(theirs) == set(gradients)
        for name, grad in gradients.items():
            norm = math.sqrt(float((grad**2).sum()))
            assert math.sqrt(float(((theirs[name] - grad) ** 2).sum())) <= 2e-6 * max(norm, 1e-3), name


# Answers.


@pytest.mark.parametrize("router", ["hashed", "frozen", "dense"])
def test_answers_do_not_see_padding_and_each_other(words, router):
    model = answers(words, router)
    many = items(words, ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10"], [0, 1, 0])
    with torch.no_grad():
        alone = torch.cat([model(model._batch([one]), 2) for one in many])
        together = model(model._batch(many), 2)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone[0], alone[1])


def test_a_choice_is_scored_by_its_angle_to_the_question(words):
    """Each sequence by itself, in a loop; the loss is the cross entropy over the five choices."""
    model = answers(words, head=ChoiceHead())
    texts = [("w1 w2 w3", [f"w{10 + i}" for i in range(5)]), ("w3", [f"w{9 - i} w1" for i in range(5)])]
    many = [
        Item(*words.encode([text]), label, tuple(words.encode(choices)))
        for (text, choices), label in zip(texts, (3, 1), strict=True)
    ]

    def mean(sequence):
        return model.encoder(words.pad([sequence]), 2)[0].mean(dim=0).double()

    with torch.no_grad():
        want = []
        for item in many:
            question, choices = mean(item.text), [mean(choice) for choice in item.choices]
            want.append([20 * float(question @ c / question.norm() / c.norm()) for c in choices])
        batch = model._batch(many)
        torch.testing.assert_close(model(batch, 2), torch.tensor(want), rtol=1e-4, atol=1e-4)
        parts = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(want, (3, 1), strict=True)]
        assert model.loss(batch, 2).item() == pytest.approx(sum(parts) / 2, rel=1e-4)
    assert len(batch) == 2 and model.evaluate(many, 2).accuracy.examples == 2


def test_evaluation_is_in_any_order_and_of_all(words):
    """As a loop over examples; dropout is off, and the mode is as before."""
    model = answers(words).train()
    many = items(words, [" ".join(WORDS[i : i + 1 + i % 7]) for i in range(13)], [i % 2 for i in range(13)])
    found = model.evaluate(many, 2)
    assert model.training and found == model.evaluate(many, 2)
    with torch.no_grad():
        logits = [model.eval()(model._batch([one]), 2)[0] for one in many]
    assert found.accuracy.examples == 13
    assert found.accuracy.correct == sum(int(row.argmax()) == one.label for row, one in zip(logits, many, strict=True))
    loss = sum(float(row.logsumexp(0) - row[one.label]) for row, one in zip(logits, many, strict=True)) / 13
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert model.evaluate(many, EXPERTS).loss != found.loss  # k counts


class Quiet:
    def step(self, step): ...

    def point(self, step, point): ...


@pytest.mark.parametrize("router", ["hashed", "frozen"])
def test_learns_with_growing_k(words, router):
    model = answers(words, router)
    drawn = torch.randint(0, 18, (300, 4), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [" ".join(f"w{i}" for i in row) + (" w19" if n % 2 else " w18") for n, row in enumerate(drawn)]
    many = items(words, texts, [n % 2 for n in range(300)])
    recipe = Recipe(k=EXPERTS, steps=60, batch=16, lr=(0.03,), eval_every=60, seed=1, k_min=1)
    finetune(model, many[:200], many[200:220], recipe, Quiet())
    assert all(model.evaluate(many[220:], k).accuracy.share > 0.9 for k in (1, EXPERTS))
    by_chance = [replace(one, label=n % 3 % 2) for n, one in enumerate(many[220:])]
    assert model.evaluate(by_chance, EXPERTS).accuracy.share < 0.75  # negative control
