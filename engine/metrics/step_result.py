"""What one optimizer step gives: losses, rows and times."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from foreroute.engine.data.device_copy import HostCopy
from foreroute.engine.metrics.rank_sums import COLUMN, Numbers, RankSum
from foreroute.engine.metrics.timers import StepTimes, TimedStep


@dataclass(slots=True)
class StepResult:
    """What one step gives; the same on every rank but for the times."""

    loss: float  # mean nats per symbol over micro-batches and ranks, without auxiliary losses
    auxiliary_loss: float
    k: int
    learning_rate: float
    grad_norm: float
    block_PX: Numbers  # what each rank told the others (engine/metrics/rank_sums.py)
    sent_bytes_PG: Numbers  # likewise
    count_LE: Numbers  # rows of each expert over all ranks; [0, 0] when dense
    times: StepTimes = field(default_factory=StepTimes)

    def of_ranks(self, name: str) -> Numbers:
        """Give what the ranks told each other under this name of RankRow [P]."""
        column_P: Numbers = self.block_PX[:, COLUMN[name]]
        return column_P

    @property
    def stop_asked(self) -> bool:
        """A stop was asked for on any rank."""
        return bool(self.of_ranks("stop_asked").any())

    @property
    def save_asked(self) -> bool:
        """A checkpoint was asked for on any rank."""
        return bool(self.of_ranks("save_asked").any())


class LaunchedStep:
    """A step that the host is done with; a GPU may still be at it. Its numbers are on their way to the host."""

    def __init__(
        self, total: RankSum, grad_norm: Tensor, timed: TimedStep, *, step: int, k: int, learning_rate: float
    ) -> None:
        self.step, self._k, self._learning_rate = step, k, learning_rate
        self._total, self._timed = total, timed
        norm = grad_norm.to(total.values.device, torch.float64)
        self._numbers = HostCopy(torch.cat((norm.view(1), total.values)))

    def wait(self) -> None:
        """Block the host until the device is past the step."""
        self._numbers.wait()

    def read(self) -> StepResult:
        """Return the numbers, once and after `wait`."""
        values = self._numbers.read()
        totals = self._total.split(values[1:])
        return StepResult(
            loss=totals.loss,
            auxiliary_loss=totals.auxiliary_loss,
            k=self._k,
            learning_rate=self._learning_rate,
            grad_norm=float(values[0]),
            block_PX=totals.block_PX,
            sent_bytes_PG=totals.sent_bytes_PG,
            count_LE=totals.count_LE,
            times=self._timed.times(),
        )
