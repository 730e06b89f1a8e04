"""A part of the examples held out of training, to select by."""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from foreroute.engine.errors import require

_Example = TypeVar("_Example")
_Read = TypeVar("_Read")


class SplitExamples(NamedTuple, Generic[_Example]):
    """The examples of a task."""

    train: Sequence[_Example]
    held_out: Sequence[_Example]  # of the training file, to select by
    dev: Sequence[_Example]  # to report

    def each(self, read: Callable[[Sequence[_Example]], Sequence[_Read]]) -> "SplitExamples[_Read]":
        """Return the parts as `read` returns each of them."""
        return SplitExamples(*map(read, self))


def hold_out_texts(
    examples: Sequence[_Example], text_of: Callable[[_Example], str], count: int, seed: int
) -> tuple[list[_Example], list[_Example]]:
    """Draw `count` examples to select by; return the rest to train on, and them.

    An example with the same text as a held-out one is in neither part.

    Raises:
        UserError: there are not enough examples.
    """
    require(count < len(examples), f"held_out={count}: must be below the number of training examples, {len(examples)}")
    drawn = set(np.random.default_rng(seed).choice(len(examples), count, replace=False).tolist())
    held_out = [example for i, example in enumerate(examples) if i in drawn]
    texts = {text_of(example) for example in held_out}
    rest = [example for example in examples if text_of(example) not in texts]
    require(len(rest) > 0, f"held_out={count}: leaves nothing to train on")
    return rest, held_out
