"""The results of one optimizer step: losses, rows and times."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foreroute.engine.data.device_copy import HostCopy
from foreroute.engine.metrics.rank_sums import Numbers, RankSum
from foreroute.engine.metrics.timers import StepTimes, TimedStep


@dataclass(slots=True)
class StepResult:
    """The results of one step; all but the times are the same on every rank."""

    loss: float  # mean nats per symbol over micro-batches and ranks, without auxiliary losses
    auxiliary_loss: float
    ranks: Mapping[str, Numbers]  # what each rank told the others: [P] by the names of RankRow
    sent_bytes_PG: Numbers  # from each rank to each of its expert group
    count_LE: Numbers  # as Totals.count_LE
    k: int
    learning_rate: float
    grad_norm: float
    times: StepTimes = field(default_factory=StepTimes)

    @property
    def stop_asked(self) -> bool:
        """A stop was asked for on any rank."""
        return bool(self.ranks["stop_asked"].any())

    @property
    def save_asked(self) -> bool:
        """A checkpoint was asked for on any rank."""
        return bool(self.ranks["save_asked"].any())


class LaunchedStep:
    """A step that the host has launched; a GPU may still compute it. Its numbers are being copied to the host."""

    def __init__(
        self, total: RankSum, grad_norm: Tensor, timed: TimedStep, *, step: int, k: int, learning_rate: float
    ) -> None:
        self.step, self._k, self._learning_rate = step, k, learning_rate
        self._total, self._timed = total, timed
        norm = grad_norm.to(total.values.device, torch.float64)
        self._numbers = HostCopy(torch.cat((norm.view(1), total.values)))

    def wait(self) -> None:
        """Block the host until the device has finished the step."""
        self._numbers.wait()

    def read(self) -> StepResult:
        """Return the numbers, once and after `wait`."""
        values = self._numbers.read()
        return StepResult(
            *self._total.split(values[1:]),
            k=self._k,
            learning_rate=self._learning_rate,
            grad_norm=float(values[0]),
            times=self._timed.times(),
        )
