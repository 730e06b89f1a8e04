"""The tasks of an encoder: the names of their files, and what reads them."""

from collections.abc import Callable
from enum import Enum
from pathlib import Path

from foreroute.engine.hugging_face.encoders.equations import problem_parts
from foreroute.engine.hugging_face.encoders.tasks import Parts, line_parts, question_parts, sentence_parts
from foreroute.engine.hugging_face.encoders.texts import WordPieces


class Task(Enum):
    """The purpose of fine-tuning."""

    sst2 = "sst2"  # the label of a sentence
    csqa = "csqa"  # the right one of five answers to a question
    mlm = "mlm"  # the ids under the masks
    asdiv = "asdiv"  # the equation of a word problem
    mawps = "mawps"
    svamp = "svamp"


_PROBLEMS = ("train.csv", "dev.csv"), problem_parts
_TASKS: dict[Task, tuple[tuple[str, str], Callable[[Path, Path, WordPieces, int, int], Parts]]] = {
    Task.sst2: (("train.tsv", "dev.tsv"), sentence_parts),
    Task.csqa: (("train_rand_split.jsonl", "dev_rand_split.jsonl"), question_parts),
    Task.mlm: (("train.txt", "dev.txt"), line_parts),
    Task.asdiv: _PROBLEMS,
    Task.mawps: _PROBLEMS,
    Task.svamp: _PROBLEMS,
}


def files_of(task: Task) -> tuple[str, str]:
    """Return the names of the files to train on and to report."""
    return _TASKS[task][0]


def read_parts(task: Task, folder: Path, words: WordPieces, held_out: int, seed: int) -> Parts:
    """Read a task's files, and hold examples of train out.

    Raises:
        UserError: a file is not as it must be, or has too few examples.
    """
    (train, dev), read = _TASKS[task]
    return read(folder / train, folder / dev, words, held_out, seed)
