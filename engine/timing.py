"""How much of a forward pass is attention and how much is expert layers, measured where the modules are called.

Host time: on a CPU the time of the work itself. Backward is not split.
"""

import time
from typing import Any

from torch import nn

from engine.attention import RelativeAttention
from engine.feed_forward import FeedForward
from engine.moe.layer import MoELayer


class ForwardTimes:
    """Adds up the time spent in attention modules and in feed-forward or expert modules of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._ms = {"attention": 0.0, "experts": 0.0}
        self._start = 0.0
        for name, module in model.named_modules():
            if isinstance(module, RelativeAttention):
                self._watch(module, "attention")
            elif isinstance(module, MoELayer) or (
                isinstance(module, FeedForward) and name.endswith(".feed_forward")
            ):
                self._watch(module, "experts")

    def take(self) -> tuple[float, float]:
        """Milliseconds in (attention, experts) since the last call."""
        taken = self._ms["attention"], self._ms["experts"]
        self._ms = {"attention": 0.0, "experts": 0.0}
        return taken

    def _watch(self, module: nn.Module, kind: str) -> None:
        def before(*_: Any) -> None:
            self._start = time.perf_counter()

        def after(*_: Any) -> None:
            self._ms[kind] += 1e3 * (time.perf_counter() - self._start)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
