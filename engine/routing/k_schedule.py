"""The number of active experts k over training, as a pure function of our own optimizer-step counter.

The formulas are those of SMoE-Dropout's public code (increasing variants), with round() half to even. k is constant
inside one optimizer step, so all micro-batches, layers and ranks agree on it without talking.
"""

import math

from foreroute.engine.config import Growth, ScheduleConfig

_PUBLISHED_STEPS = (1, 2, 4, 8, 16)


def active_experts(config: ScheduleConfig, step: int, total_steps: int) -> int:
    """Return k for the 0-based step; k_max from step total_steps on.

    linear       round((k_max - k_min) s / T) + k_min              (the published runs)
    cosine       round((k_min - k_max) cos(pi s / 2T)) + k_max     (slow start, fast end)
    exponential  round((k_min - k_max) 0.99 ** (s // (T // 300))) + k_max   (fast start; 300 s // T below T = 300)
    multi_step   (1, 2, 4, 8, 16)[5 s // T], at least k_min, at most k_max
    doubling     k_min, 2 k_min, 4 k_min, ... k_max, each for an equal part of T (not published; as multi_step from 1 to
    16) constant     k_max

    Example: linear with k_min 8, k_max 16 and T = 400,000 gives 9 first at step 25,001 and 10 at 75,000.
    """
    k_min, k_max = config.k_min, config.k_max
    if config.growth is Growth.constant or step >= total_steps:
        return k_max
    if config.growth is Growth.doubling:
        values = _doublings(k_min, k_max)
        return values[len(values) * step // total_steps]
    if config.growth is Growth.multi_step:
        k = _PUBLISHED_STEPS[len(_PUBLISHED_STEPS) * step // total_steps]
    elif config.growth is Growth.linear:
        k = round((k_max - k_min) * step / total_steps) + k_min
    elif config.growth is Growth.cosine:
        k = round((k_min - k_max) * math.cos(math.pi * step / (2 * total_steps))) + k_max
    else:
        stride = total_steps // 300
        power = step // stride if stride else 300 * step // total_steps
        k = round((k_min - k_max) * 0.99**power) + k_max
    return min(max(k, k_min), k_max)


def _doublings(k_min: int, k_max: int) -> list[int]:
    """Return k_min, 2 k_min, 4 k_min, ... ending with k_max."""
    values = [k_min]
    while values[-1] < k_max:
        values.append(min(2 * values[-1], k_max))
    return values
