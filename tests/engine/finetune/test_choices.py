"""CommonsenseQA's file format: every field is read, and the first wrong line is named."""

import json
import os
from pathlib import Path

import pytest

from foreroute.engine.errors import UserError
from foreroute.engine.finetune.choices import Question, read_questions

CSQA = Path(os.environ.get("FOREROUTE_DATA", "")) / "csqa"


def line(key="C", stem="where is it?", texts="abcde", labels="ABCDE"):
    choices = [{"label": label, "text": text} for label, text in zip(labels, texts, strict=True)]
    return {"answerKey": key, "id": "x", "question": {"question_concept": "it", "choices": choices, "stem": stem}}


def write(path, *lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def test_reads_questions(tmp_path):
    path = write(tmp_path / "q.jsonl", line(), line("A", "who \u00e9?", "vwxyz"), line("A", labels="EDCBA"))
    assert read_questions(path) == [
        Question("where is it?", tuple("abcde"), 2),
        Question("who \u00e9?", tuple("vwxyz"), 0),
        Question("where is it?", tuple("abcde"), 4),
    ]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("{", r"line 2: is no JSON"),
        ("[]", r"line 2: has no answerKey, it must be as CommonsenseQA's"),
        (json.dumps({"answerKey": "A"}), "line 2: has no question"),
        (json.dumps(line("F")), "line 2: answerKey is 'F', it must be one of A, B, C, D, E"),
        (json.dumps(line(texts="abcd", labels="ABCD")), "line 2: has 4 choices, it must have 5"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, wrong, words):
    path = write(tmp_path / "q.jsonl", line())
    path.write_text(path.read_text() + wrong + "\n")
    with pytest.raises(UserError, match=words):
        read_questions(path)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "none")
    (tmp_path / "empty").write_text("")
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_questions(tmp_path / "latin")


@pytest.mark.skipif(not CSQA.is_dir(), reason="FOREROUTE_DATA has no csqa")
def test_the_real_files():
    """The published numbers of questions."""
    train, dev = (read_questions(CSQA / f"{name}_rand_split.jsonl") for name in ("train", "dev"))
    assert (len(train), len(dev)) == (9741, 1221)
