"""Fine-tuning for a task: Adam with the published cosine, and selection by held-out training examples.

Several learning rates may be tried, each from the same start. Of all points (learning rate, step) the one with the most
right answers on the held-out examples is kept; of equal ones, the one with the smaller loss. The examples of the
reported result, such as GLUE's dev, are not used here.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from foreroute.engine.config import Growth, OptimConfig, ScheduleConfig
from foreroute.engine.errors import RunFailed
from foreroute.engine.finetune.accuracy import Accuracy
from foreroute.engine.finetune.trainee import Trainee
from foreroute.engine.optim.adam import build_optimizer, learning_rate
from foreroute.engine.routing.k_schedule import active_experts

CLIP = 0.25
"""The largest gradient norm, as in pre-training."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is fine-tuned."""

    k: int  # active experts, of the last step where they grow
    steps: int  # for each learning rate
    batch: int  # examples per step
    lr: tuple[float, ...]  # at least one
    eval_every: int  # steps between two looks at the held-out examples; the last step has one, too
    seed: int  # of the batches and of dropout
    clip: float = CLIP  # largest gradient norm
    k_min: int | None = None  # active experts of the first step, from which they grow linearly to k; None: k throughout

    def k_at(self, step: int) -> int:
        """Return the number of active experts of a step; 0 is the first."""
        if self.k_min is None:
            return self.k
        return active_experts(ScheduleConfig(Growth.linear, self.k_min, self.k), step, self.steps)


@dataclass(frozen=True, slots=True)
class Point:
    """One look at the held-out examples."""

    lr: float
    step: int
    training_loss: float  # mean nats per answer since the look before
    held_out: Accuracy
    held_out_loss: float  # mean nats per answer


@dataclass(frozen=True, slots=True)
class Selection:
    """Result of fine-tuning; the model holds the chosen weights."""

    chosen: Point
    curve: tuple[Point, ...]
    seconds: float  # in training steps
    sentences: int  # examples trained on, repetitions counted


class StepReporter(Protocol):
    """Shows a person the progress of fine-tuning; steps count on over the learning rates."""

    def step(self, step: int) -> None:
        """Show that so many steps are finished."""

    def point(self, step: int, point: Point) -> None:
        """Show a look at the held-out examples."""


def finetune(
    model: Trainee, train: Sequence[Any], held_out: Sequence[Any], recipe: Recipe, progress: StepReporter
) -> Selection:
    """Train the model, and leave in it the weights that did best on the held-out examples.

    Raises:
        RunFailed: a loss is not finite.
    """
    start = _copy(model)
    best, kept = None, start
    curve: list[Point] = []
    seconds, sentences = 0.0, 0
    for number, lr in enumerate(recipe.lr):
        model.load_state_dict(start)
        steps = _Steps(model, train, recipe, lr)
        while steps.done < recipe.steps:
            steps.run(min(recipe.eval_every, recipe.steps - steps.done), number * recipe.steps, progress)
            found = model.evaluate(held_out, recipe.k)
            curve.append(Point(lr, steps.done, steps.mean_loss, found.accuracy, found.loss))
            progress.point(number * recipe.steps + steps.done, curve[-1])
            if best is None or _rank(curve[-1]) > _rank(best):
                best, kept = curve[-1], _copy(model)
        seconds, sentences = seconds + steps.seconds, sentences + steps.sentences
    model.load_state_dict(kept)
    assert best is not None, "a recipe has at least one learning rate and one step"
    return Selection(best, tuple(curve), seconds, sentences)


class _Steps:
    """The training steps at one learning rate."""

    def __init__(self, model: Trainee, train: Sequence[Any], recipe: Recipe, lr: float) -> None:
        torch.manual_seed(recipe.seed)
        self.model, self.recipe = model.train(), recipe
        self.optim = OptimConfig(lr=lr, clip=recipe.clip)
        self.optimizer = build_optimizer(model.parameters(), self.optim)
        self.batches = model.batches(train, recipe.batch, recipe.seed)
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
        loss = self.model.loss(batch, self.recipe.k_at(self.done), seed)
        if not math.isfinite(value := loss.item()):
            raise RunFailed(f"the loss is {value} at step {self.done}, lr={self.optim.lr}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.sentences += len(batch)
        return value


def _rank(point: Point) -> tuple[int, float]:
    return point.held_out.correct, -point.held_out_loss


def _copy(model: Trainee) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
