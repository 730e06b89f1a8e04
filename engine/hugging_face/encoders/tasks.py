"""Tasks of an encoder: files become examples to train on, to select by and to report.

SST-2            the label of a sentence: one sequence
CommonsenseQA    the right one of five answers: a sequence of the question and the answer for each
masked language  the ids under the masks: one sequence for each line of a text
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from foreroute.engine.errors import UserError, require
from foreroute.engine.finetune.accuracy import Majority, majority
from foreroute.engine.finetune.choices import CHOICES, Question, read_questions
from foreroute.engine.finetune.glue import LABELS, Example, hold_out, read_examples
from foreroute.engine.finetune.held_out import SplitExamples, hold_out_texts
from foreroute.engine.finetune.trainee import Trainee
from foreroute.engine.hugging_face.encoders.bert import Pretrained
from foreroute.engine.hugging_face.encoders.models import AnswerModel, ChoiceHead, Encoder, Item, LabelHead, MaskedModel
from foreroute.engine.hugging_face.encoders.texts import TokenSequence, WordPieces

AddHead = Callable[[Encoder, WordPieces, Pretrained, float], Trainee]
"""Returns the model of a task: an encoder, here with what it was made of, and a head with dropout."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The examples of a task."""

    train: Sequence[Any]  # each with `sequences`, all that the encoder reads of it
    held_out: Sequence[Any]
    dev: Sequence[Any]
    always: Majority  # dev's most frequent answer
    add_head: AddHead
    masked: bool = False  # the encoder is read with its head for masked ids

    @property
    def train_sequences(self) -> Iterator[TokenSequence]:
        """Yield the sequences to train on."""
        for one in self.train:
            yield from one.sequences


def sentence_parts(train: Path, dev: Path, words: WordPieces, count: int, seed: int) -> Parts:
    """Read SST-2's files, and hold `count` sentences of train out.

    Raises:
        UserError: a file is not as it must be, or has too few sentences.
    """
    found = SplitExamples(*hold_out(read_examples(train), count, seed), read_examples(dev))
    always = majority([example.label for example in found.dev])
    return Parts(*found.each(lambda part: _of_sentences(part, words)), always, _add_label_head)


def _add_label_head(encoder: Encoder, words: WordPieces, found: Pretrained, dropout: float) -> AnswerModel:
    return AnswerModel(encoder, words, LabelHead(found.width, len(LABELS), dropout))


def _of_sentences(examples: Sequence[Example], words: WordPieces) -> list[Item]:
    sequences = words.encode([example.text.decode("utf-8", "replace") for example in examples])
    return [Item(one, example.label) for one, example in zip(sequences, examples, strict=True)]


def question_parts(train: Path, dev: Path, words: WordPieces, count: int, seed: int) -> Parts:
    """Read CommonsenseQA's files, and hold `count` questions of train out.

    Raises:
        UserError: a file is not as it must be, or has too few questions.
    """
    found = SplitExamples(*hold_out_texts(read_questions(train), attrgetter("text"), count, seed), read_questions(dev))
    always = majority([question.label for question in found.dev])
    return Parts(*found.each(lambda part: _of_questions(part, words)), always, _add_choice_head)


def _add_choice_head(encoder: Encoder, words: WordPieces, found: Pretrained, dropout: float) -> AnswerModel:
    return AnswerModel(encoder, words, ChoiceHead())


def _of_questions(questions: Sequence[Question], words: WordPieces) -> list[Item]:
    found = iter(words.encode([text for question in questions for text in (question.text, *question.choices)]))
    return [Item(next(found), question.label, tuple(islice(found, CHOICES))) for question in questions]


def line_parts(train: Path, dev: Path, words: WordPieces, count: int, seed: int) -> Parts:
    """Read texts, one in each line, and hold `count` of train out; a held-out line is not trained on elsewhere either.

    Raises:
        UserError: a file cannot be read, or has too few lines.
    """
    found = SplitExamples(*hold_out_texts(read_lines(train), str, count, seed), read_lines(dev)).each(words.encode)
    return Parts(*found, _most_frequent(found.dev, words), _add_masked_head, masked=True)


def _add_masked_head(encoder: Encoder, words: WordPieces, found: Pretrained, dropout: float) -> MaskedModel:
    assert found.head is not None, "it was read with its head"
    return MaskedModel(encoder, words, found.head)


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
