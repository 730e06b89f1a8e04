"""Labelled sentences in GLUE's file format, as bytes: reading them, and holding a part of them out.

A file is SST-2's train.tsv or dev.tsv (Socher et al. 2013; GLUE, arXiv 1804.07461): a header, then a sentence, a tab
and its label in each line. Sentences become ids and batches in engine/finetune/sentences.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foreroute.engine.errors import UserError, require

HEADER = b"sentence\tlabel"
LABELS = (b"0", b"1")  # of SST-2: negative, positive

_RUN = 5  # words in a row that two examples may not share across the cut; shorter ones are common to many sentences
_POOL = 4  # held-out examples come from the longest 1 / _POOL


@dataclass(frozen=True, slots=True)
class Example:
    """A labelled sentence."""

    text: bytes  # without white space around it
    label: int  # 0 or 1


def read_examples(path: Path) -> list[Example]:
    """Read all examples of a file.

    Raises:
        UserError: no such file, or the first line that is not as it must be.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    header = lines[0] if lines else b""
    require(header == HEADER, f"{path}: the first line is {_shown(header)}, it must be {_shown(HEADER)}")
    require(len(lines) > 1, f"{path}: holds no examples")
    return [_example(line, f"{path}, line {number}") for number, line in enumerate(lines[1:], 2)]


def _example(line: bytes, place: str) -> Example:
    columns = line.split(b"\t")
    require(len(columns) == 2, f"{place}: has {len(columns)} columns, it must have 2, a sentence and its label")
    text, label = columns[0].strip(), columns[1].strip()
    require(bool(text), f"{place}: the sentence is empty")
    require(label in LABELS, f"{place}: the label is {_shown(label)}, it must be 0 or 1")
    return Example(text, LABELS.index(label))


def _shown(value: bytes) -> str:
    """Shorten bytes of a file for an error line."""
    return ascii(value[:40].decode("utf-8", "replace"))


def hold_out(examples: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Draw `count` examples to select by; return the rest to train on, and them.

    SST-2's dev examples are whole sentences, while its train examples are all phrases of its sentences. So the held-out
    ones are drawn from the longest quarter, and an example that shares five words in a row with one of them, or is the
    same, is in neither part.

    Raises:
        UserError: there are not enough examples.
    """
    longest = sorted(range(len(examples)), key=lambda i: -len(examples[i].text))
    pool = longest[: len(examples) // _POOL]
    require(
        count <= len(pool),
        f"held_out={count}: must be at most {len(pool)}, a quarter of the {len(examples)} training examples",
    )
    drawn = np.random.default_rng(seed).choice(pool, count, replace=False).tolist()
    held_out = [examples[i] for i in sorted(drawn)]
    texts = {example.text for example in held_out}
    runs = {run for text in texts for run in _runs(text)}
    rest = [e for e in examples if e.text not in texts and runs.isdisjoint(_runs(e.text))]
    require(len(rest) > 0, f"held_out={count}: leaves nothing to train on")
    return rest, held_out


def _runs(text: bytes) -> list[tuple[bytes, ...]]:
    """Return the runs of _RUN words in a text."""
    words = text.split()
    return list(zip(*(words[start:] for start in range(_RUN)), strict=False))
