"""A run's useful arithmetic and the parameters that a symbol uses, at each k; the same on any number of ranks.

The products of matrices are counted in engine/certificate/work.py (`forward_flops` says what is useful).
"""

from collections import Counter

from engine.certificate.work import forward_flops
from engine.choices import Activation, Growth, Router
from engine.config import Config
from engine.moe.schedule import active_experts

FORWARD_AND_BACKWARD = 3
"""Passes that a training step weighs: backward makes two products of each one of forward. (A little less in truth: encoded
distances and a frozen gate get no gradient.)"""


class Arithmetic:
    """FLOPs and active parameters of a run.

    Args:
        vocab: symbols.
        parameters: of the whole model.
    """

    def __init__(self, config: Config, vocab: int, parameters: int) -> None:
        self._config, self._vocab, self._parameters = config, vocab, parameters
        self._step_flops: dict[int, float] = {}

    def step_flops(self, k: int) -> float:
        """Forward and backward of one optimizer step at this k, all ranks."""
        if k not in self._step_flops:
            passes = FORWARD_AND_BACKWARD * self._config.training_passes
            self._step_flops[k] = passes * forward_flops(self._config, self._vocab, k)
        return self._step_flops[k]

    def flops_per_symbol(self, k: int) -> float:
        """One forward pass of one symbol."""
        return forward_flops(self._config, self._vocab, k) / self._config.symbols_per_step

    def flops_before(self, step: int) -> float:
        """Of the first so many steps."""
        schedule, total = self._config.schedule, self._config.schedule_steps
        steps = Counter(active_experts(schedule, done, total) for done in range(step))
        return sum(times * self.step_flops(k) for k, times in steps.items())

    def active_parameters(self, k: int) -> int:
        """Parameters that a symbol uses: all but those of the experts, and of the n-grams' embeddings, that it does not.

        Example: experts of 10 parameters each, 4 in each of 3 layers: at k = 1 a model of 500 uses 500 - 3 x 3 x 10 = 410.
        """
        model, moe = self._config.model, self._config.moe
        used = self._parameters - (model.ngram > 0) * (model.ngram_rows - 1) * model.width
        if moe.router is Router.dense:
            return used
        matrices = 3 if moe.activation is Activation.swiglu else 2
        expert = matrices * moe.expert_width * model.width + moe.expert_width + model.width
        return used - self._config.expert_layers * (moe.experts - k) * expert

    def by_k(self) -> dict[str, int]:
        """Name each k of the schedule and of the evaluation; "dense" where there are no experts."""
        config, schedule = self._config, self._config.schedule
        if config.moe.router is Router.dense:
            return {"dense": schedule.k_max}
        first = schedule.k_max if schedule.growth is Growth.constant else schedule.k_min
        return {str(k): k for k in sorted({*config.eval.k, *range(first, schedule.k_max + 1)})}
