"""Bytes of tensors and plans."""

import pytest

from foreroute.engine.profiling.tensor_bytes import CountedBatches, PlanBytes


def test_planning_is_locked_against_a_look_at_all_objects():
    plans, seen = PlanBytes(), []

    class Batches:
        def planned(self, step, micro):
            seen.append((step, micro, plans.planning.locked()))
            raise KeyboardInterrupt  # nothing more is needed

    with pytest.raises(KeyboardInterrupt):
        CountedBatches(Batches(), plans).planned(3, 1)
    assert seen == [(3, 1, True)] and not plans.planning.locked()
