"""What counts as a step's time in attention and experts."""

import torch

from foreroute.engine.metrics.timers import ForwardTimes
from foreroute.engine.model.build import build_model
from foreroute.engine.routing.plan import Routing
from foreroute.engine.testing.tiny_run import SEGMENT, STREAMS, SYMBOLS, tiny_config


def test_times_are_of_training_alone():
    config = tiny_config()
    config.moe.router = config.moe.router.frozen
    model = build_model(config, SYMBOLS)
    times = ForwardTimes(model)
    ids_BQ = torch.zeros(STREAMS, SEGMENT, dtype=torch.int64)

    def run() -> None:
        model(ids_BQ, ids_BQ, None, Routing(config.schedule.k_max))

    run()
    attention_ms, experts_ms = times.take()
    assert attention_ms > 0 and experts_ms > 0
    assert times.take() == (0.0, 0.0)
    model.eval()  # a validation between two steps
    run()
    assert times.take() == (0.0, 0.0)
    model.train()
    run()
    assert min(times.take()) > 0
