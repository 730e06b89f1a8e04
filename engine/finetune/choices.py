"""Questions with several answers to choose from, in the file format of CommonsenseQA (arXiv 1811.00937).

A line of train_rand_split.jsonl or dev_rand_split.jsonl is a JSON object: the question in question.stem, five answers
in question.choices (label, text), and the label of the right one in answerKey.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreroute.engine.errors import UserError, require

CHOICES = 5


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answers."""

    text: str
    choices: tuple[str, ...]  # CHOICES of them
    label: int  # the place of the right one


def read_questions(path: Path) -> list[Question]:
    """Read all questions of a file.

    Raises:
        UserError: no such file, or the first line that is not as it must be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start})") from error
    require(len(lines) > 0, f"{path}: holds no questions")
    return [_question(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _question(line: str, place: str) -> Question:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: is no JSON ({error})") from error
    key = _part(found, place, "answerKey")
    question = _part(found, place, "question")
    choices = _part(question, place, "choices", list)
    require(len(choices) == CHOICES, f"{place}: has {len(choices)} choices, it must have {CHOICES}")
    labels = [_part(choice, place, "label") for choice in choices]
    require(labels.count(key) == 1, f"{place}: answerKey is {key!r}, it must be one of {', '.join(map(str, labels))}")
    texts = tuple(str(_part(choice, place, "text")) for choice in choices)
    return Question(str(_part(question, place, "stem")), texts, labels.index(key))


def _part(value: Any, place: str, name: str, kind: type = object) -> Any:
    has_it = isinstance(value, dict) and isinstance(value.get(name), kind) and value.get(name) is not None
    require(has_it, f"{place}: has no {name}, it must be as CommonsenseQA's")
    return value[name]
