"""The protocol between a model that is fine-tuned for a task and the loop that trains it (engine/finetune/loop.py)."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from foreroute.engine.finetune.accuracy import Accuracy


class Evaluation(NamedTuple):
    """Result on examples that are not trained on."""

    accuracy: Accuracy
    loss: float  # mean nats per answer


class Trainee(nn.Module):
    """A model with a head for one task, and the task's batches and losses."""

    def batches(self, examples: Sequence[Any], batch: int, seed: int) -> Iterator[Any]:
        """Yield training batches without end; len(..) of one is its number of examples."""
        raise NotImplementedError

    def loss(self, batch: Any, k: int, seed: int) -> Tensor:
        """Return the mean loss of a training batch at k active experts in nats per answer, fp32, a scalar.

        Args:
            seed: of (run, step), for what is drawn without PyTorch's random state.
        """
        raise NotImplementedError

    def evaluate(self, examples: Sequence[Any], k: int) -> Evaluation:
        """Evaluate without gradients and dropout at k active experts; two calls draw the same."""
        raise NotImplementedError
