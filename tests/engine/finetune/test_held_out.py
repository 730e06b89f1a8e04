"""Examples that are held out share no text with those to train on."""

import pytest

from foreroute.engine.errors import UserError
from foreroute.engine.finetune.held_out import hold_out_texts


def hold_out(many, count, seed):
    return hold_out_texts(many, lambda one: one[0], count, seed)


def test_held_out_examples_are_not_trained_on():
    many = [(f"q{i // 2}", i) for i in range(40)]  # each text twice
    rest, held_out = hold_out(many, 10, seed=3)
    assert len(held_out) == 10 and not {text for text, _ in rest} & {text for text, _ in held_out}
    assert {text for text, _ in rest} | {text for text, _ in held_out} == {text for text, _ in many}
    assert hold_out(many, 10, seed=3) == (rest, held_out) != hold_out(many, 10, seed=4)


@pytest.mark.parametrize(
    ("texts", "count", "words"),
    [
        ("abcd", 4, "held_out=4: must be below the number of training examples, 4"),
        ("aaaa", 3, "held_out=3: leaves nothing to train on"),
    ],
)
def test_too_few_are_one_line(texts, count, words):
    with pytest.raises(UserError, match=words):
        hold_out([(text, 0) for text in texts], count, seed=3)
