"""Tasks of an encoder: files become examples to train on, to select by and to report.

SST-2            the label of a sentence: one sequence
CommonsenseQA    the right one of five answers: a sequence of the question and the answer for each
masked language  the ids under the masks: one sequence for each line of a text
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from foreroute.engine.errors import UserError, require
from foreroute.engine.finetune.accuracy import Majority, majority
from foreroute.engine.finetune.choices import CHOICES, Question, hold_out_questions, read_questions
from foreroute.engine.finetune.glue import LABELS, Example, hold_out, read_examples
from foreroute.engine.hugging_face.encoders.models import Item
from foreroute.engine.hugging_face.encoders.texts import TokenSequence, WordPieces


@dataclass(frozen=True, slots=True)
class Parts:
    """The examples of a task."""

    train: Sequence[Any]  # Item, or TokenSequence of the masked-language task
    held_out: Sequence[Any]
    dev: Sequence[Any]
    always: Majority  # dev's most frequent answer
    labels: int | None = None  # of an example with one sequence; None: examples are questions with choices
    masked: bool = False  # the answers are ids under masks

    @property
    def train_sequences(self) -> Iterator[TokenSequence]:
        """Yield the sequences to train on."""
        for one in self.train:
            yield from (one.text, *one.choices) if isinstance(one, Item) else (one,)


def sentence_parts(train: Path, dev: Path, words: WordPieces, count: int, seed: int) -> Parts:
    """Read SST-2's files, and hold `count` sentences of train out.

    Raises:
        UserError: a file is not as it must be, or has too few sentences.
    """
    rest, held_out = hold_out(read_examples(train), count, seed)
    reported = read_examples(dev)
    always = majority([example.label for example in reported])
    train_items, held_out_items, dev_items = (_of_sentences(part, words) for part in (rest, held_out, reported))
    return Parts(train_items, held_out_items, dev_items, always, labels=len(LABELS))


def _of_sentences(examples: Sequence[Example], words: WordPieces) -> list[Item]:
    sequences = words.encode([example.text.decode("utf-8", "replace") for example in examples])
    return [Item(one, example.label) for one, example in zip(sequences, examples, strict=True)]


def question_parts(train: Path, dev: Path, words: WordPieces, count: int, seed: int) -> Parts:
    """Read CommonsenseQA's files, and hold `count` questions of train out.

    Raises:
        UserError: a file is not as it must be, or has too few questions.
    """
    rest, held_out = hold_out_questions(read_questions(train), count, seed)
    reported = read_questions(dev)
    always = majority([question.label for question in reported])
    train_items, held_out_items, dev_items = (_of_questions(part, words) for part in (rest, held_out, reported))
    return Parts(train_items, held_out_items, dev_items, always)


def _of_questions(questions: Sequence[Question], words: WordPieces) -> list[Item]:
    found = iter(words.encode([text for question in questions for text in (question.text, *question.choices)]))
    return [Item(next(found), question.label, tuple(islice(found, CHOICES))) for question in questions]


def line_parts(train: Path, dev: Path, words: WordPieces, count: int, seed: int) -> Parts:
    """Read texts, one in each line, and hold `count` of train out; a held-out line is not trained on elsewhere either.

    Raises:
        UserError: a file cannot be read, or has too few lines.
    """
    lines = read_lines(train)
    require(count < len(lines), f"held_out={count}: must be below the number of training examples, {len(lines)}")
    drawn = set(np.random.default_rng(seed).choice(len(lines), count, replace=False).tolist())
    held_out = [line for i, line in enumerate(lines) if i in drawn]
    texts = set(held_out)
    rest = [line for line in lines if line not in texts]
    require(len(rest) > 0, f"held_out={count}: leaves nothing to train on")
    train_ids, held_out_ids, dev_ids = (words.encode(part) for part in (rest, held_out, read_lines(dev)))
    return Parts(train_ids, held_out_ids, dev_ids, _most_frequent(dev_ids, words), masked=True)


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text that are not empty.

    Raises:
        UserError: no such file, no UTF-8, or no lines.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start})") from error
    found = [line for line in lines if line]
    require(len(found) > 0, f"{path}: holds no lines")
    return found


def _most_frequent(sequences: Sequence[TokenSequence], words: WordPieces) -> Majority:
    """Return the most frequent id that may be asked for, and its share."""
    ids = np.concatenate([sequence.ids for sequence in sequences])
    return majority(ids[~np.isin(ids, words.vocabulary.special)].tolist() or [0])
