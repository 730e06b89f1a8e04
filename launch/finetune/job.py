"""The model and the examples of one fine-tuning, and the place of its result; of_run.py and of_encoder.py make it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreroute.engine.errors import require
from foreroute.engine.finetune.accuracy import Majority
from foreroute.engine.finetune.trainee import Trainee
from foreroute.engine.hugging_face.encoders.registry import files_of
from foreroute.launch.finetune.args import FinetuneArgs


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples and what they were made of."""

    train: Sequence[Any]
    held_out: Sequence[Any]
    dev: Sequence[Any]
    facts: dict[str, Any]
    always: Majority  # dev's most frequent answer


@dataclass(frozen=True, slots=True)
class Job:
    """A model and its examples."""

    model: Trainee
    examples: Examples
    k: int
    eval_k: dict[str, int]  # by name
    target: Path  # of the result
    clip: float  # the largest gradient norm
    facts: dict[str, Any] = field(default_factory=dict)  # for the result's file


def example_files(args: FinetuneArgs) -> list[Path]:
    """Return the files to train on and to report."""
    return [Path(args.task.path) / name for name in files_of(args.task.name)]


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by their names."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def check_active(args: FinetuneArgs, k: int, eval_k: Sequence[int], experts: int, words: str) -> None:
    """Check numbers of active experts.

    Args:
        words: the name of the option that sets the number of experts.

    Raises:
        UserError: one is not in 1 .. experts, or k_min is above k.
    """
    require(1 <= k <= experts, f"k={k}: must be 1 to {words}={experts}")
    require(args.k_min is None or args.k_min <= k, f"k_min={args.k_min}: must be at most k={k}")
    require(
        len(eval_k) > 0 and min(eval_k) >= 1 and max(eval_k) <= experts,
        f"eval_k={list(eval_k)}: needs one or more, each 1 to {words}={experts}",
    )


def free_target(folder: Path, name: str) -> Path:
    """Return the result's file, which must not exist."""
    target = folder / f"{name}.json"
    require(not target.exists(), f"{target} is there already: take another name=NAME, or remove it")
    return target
