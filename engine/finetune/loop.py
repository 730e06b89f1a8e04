"""Fine-tuning a classifier: Adam with the published cosine, and selection by held-out training examples.

Several learning rates may be tried, each from the same start. Of all points (learning rate, step) the one with the most
right answers on the held-out examples is kept; of equal ones, the one with the smaller loss. The examples of the
reported result, such as GLUE's dev, are not used here.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from foreroute.engine.config import OptimConfig
from foreroute.engine.errors import RunFailed
from foreroute.engine.finetune.accuracy import Accuracy
from foreroute.engine.finetune.classifier import Classifier, predict
from foreroute.engine.finetune.sentences import Sentence, training_batches
from foreroute.engine.optim.adam import build_optimizer, learning_rate


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a classifier is fine-tuned."""

    k: int  # active experts
    steps: int  # for each learning rate
    batch: int  # sentences per step
    lr: tuple[float, ...]  # at least one
    eval_every: int  # steps between two looks at the held-out examples; the last step has one, too
    seed: int  # of the batches and of dropout
    clip: float = 0.25  # largest gradient norm, as in pre-training


@dataclass(frozen=True, slots=True)
class Point:
    """One look at the held-out examples."""

    lr: float
    step: int
    training_loss: float  # mean nats per sentence since the look before
    held_out: Accuracy
    held_out_loss: float  # mean nats per sentence


@dataclass(frozen=True, slots=True)
class Selection:
    """Result of fine-tuning; the classifier holds the chosen weights."""

    chosen: Point
    curve: tuple[Point, ...]
    seconds: float  # in training steps
    sentences: int  # trained on, repetitions counted


class StepReporter(Protocol):
    """Shows a person the progress of fine-tuning; steps count on over the learning rates."""

    def step(self, step: int) -> None:
        """Show that so many steps are finished."""

    def point(self, step: int, point: Point) -> None:
        """Show a look at the held-out examples."""


def finetune(
    classifier: Classifier,
    train: Sequence[Sentence],
    held_out: Sequence[Sentence],
    recipe: Recipe,
    progress: StepReporter,
) -> Selection:
    """Train the classifier, and leave in it the weights that did best on the held-out sentences.

    Raises:
        RunFailed: a loss is not finite.
    """
    start = _copy(classifier)
    best, kept = None, start
    curve: list[Point] = []
    seconds, sentences = 0.0, 0
    for number, lr in enumerate(recipe.lr):
        classifier.load_state_dict(start)
        steps = _Steps(classifier, train, recipe, lr)
        while steps.done < recipe.steps:
            steps.run(min(recipe.eval_every, recipe.steps - steps.done), number * recipe.steps, progress)
            curve.append(_look(classifier, held_out, steps, lr, recipe.k))
            progress.point(number * recipe.steps + steps.done, curve[-1])
            if best is None or _rank(curve[-1]) > _rank(best):
                best, kept = curve[-1], _copy(classifier)
        seconds, sentences = seconds + steps.seconds, sentences + steps.sentences
    classifier.load_state_dict(kept)
    assert best is not None, "a recipe has at least one learning rate and one step"
    return Selection(best, tuple(curve), seconds, sentences)


class _Steps:
    """The training steps at one learning rate."""

    def __init__(self, classifier: Classifier, train: Sequence[Sentence], recipe: Recipe, lr: float) -> None:
        torch.manual_seed(recipe.seed)
        self.classifier, self.recipe = classifier.train(), recipe
        self.optim = OptimConfig(lr=lr, clip=recipe.clip)
        self.optimizer = build_optimizer(classifier.parameters(), self.optim)
        self.batches = training_batches(train, recipe.batch, recipe.seed)
        self.done = self.sentences = 0
        self.seconds = self.mean_loss = 0.0

    def run(self, count: int, before: int, progress: StepReporter) -> None:
        """Make `count` steps; `before` were made at other learning rates."""
        start = time.perf_counter()
        losses = []
        for _ in range(count):
            losses.append(self._step())
            self.done += 1
            progress.step(before + self.done)
        self.seconds += time.perf_counter() - start
        self.mean_loss = sum(losses) / count

    def _step(self) -> float:
        rate = learning_rate(self.optim, self.done, self.recipe.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = next(self.batches)
        seed = self.recipe.seed * 2**32 + self.done
        logits_BC = self.classifier(batch, self.recipe.k, seed=seed)
        loss = F.cross_entropy(logits_BC.float(), batch.label_B.to(logits_BC.device))
        if not math.isfinite(value := loss.item()):
            raise RunFailed(f"the loss is {value} at step {self.done}, lr={self.optim.lr}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.classifier.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.sentences += len(batch.label_B)
        return value


def _look(classifier: Classifier, held_out: Sequence[Sentence], steps: _Steps, lr: float, k: int) -> Point:
    logits = predict(classifier, held_out, k)
    label = torch.tensor([sentence.label for sentence in held_out])
    loss = F.cross_entropy(logits, label).item()
    return Point(lr, steps.done, steps.mean_loss, accuracy(logits, held_out), loss)


def accuracy(logits: Tensor, sentences: Sequence[Sentence]) -> Accuracy:
    """Count the sentences whose largest logit [number of sentences, C] is that of their label."""
    label = torch.tensor([sentence.label for sentence in sentences])
    return Accuracy(int((logits.argmax(dim=1) == label).sum()), len(sentences))


def _rank(point: Point) -> tuple[int, float]:
    return point.held_out.correct, -point.held_out_loss


def _copy(classifier: Classifier) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in classifier.state_dict().items()}
