"""What one optimizer step gives: losses, rows and times."""

from dataclasses import dataclass, field

from foreroute.engine.metrics.rank_sums import COLUMN, Numbers


@dataclass(slots=True)
class StepTimes:
    """Milliseconds of one step; `outside` of forward, backward and optimizer is step_ms minus these three."""

    step_ms: float = 0.0
    plan_wait_ms: float = 0.0
    forward_ms: float = 0.0
    attention_ms: float = 0.0  # part of forward_ms
    experts_ms: float = 0.0  # part of forward_ms
    backward_ms: float = 0.0
    optimizer_ms: float = 0.0
    exchange_exposed_ms: float = 0.0  # part of forward_ms and backward_ms
    exchange_hidden_ms: float = 0.0  # beside computation
    own_ms: float = 0.0  # part of forward_ms: not waiting for other ranks
    data_ms: float = 0.0  # of the loader's thread, beside the step
    metric_ms: float = 0.0  # collecting what metrics need

    @property
    def outside_ms(self) -> float:
        """Time of the loop itself, waiting for plans included."""
        return self.step_ms - self.forward_ms - self.backward_ms - self.optimizer_ms


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
