"""A run that is resumed with another length: the changes of what depends on train.steps."""

from foreroute.engine.config import Decay, Growth, OptimConfig, ScheduleConfig
from foreroute.engine.optim.adam import learning_rate
from foreroute.engine.routing.k_schedule import active_experts


def other_length(optim: OptimConfig, schedule: ScheduleConfig, step: int, *, before: int, now: int) -> str:
    """Describe how a run changes that is at a step and goes on to another train.steps.

    Example: a run of 100 steps that is finished and goes on to 200, with a learning rate that falls to 0 and k growing
    to 4: "train.steps=200, so far 100: step 101 has learning rate 5e-04 (so far 0e+00) and k = 3 (so far 4), as in a
    run of 200 steps; steps before it are those of one of 100".
    """
    begins = f"train.steps={now}, so far {before}"
    if optim.decay is Decay.constant and (schedule.growth is Growth.constant or schedule.steps is not None):
        return f"{begins}: nothing else depends on it, the run is the same as one of {now:,} steps"
    then_rate, rate = (learning_rate(optim, step, steps) for steps in (before, now))
    then_k, k = (active_experts(schedule, step, schedule.steps or steps) for steps in (before, now))
    return (
        f"{begins}: step {step + 1:,} has learning rate {rate:.2g} (so far {then_rate:.2g}) and k = {k} (so far"
        f" {then_k}), as in a run of {now:,} steps; the steps before it are those of a run of {before:,}"
    )
