import dataclasses
import threading
import time
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foreroute.engine.config import MoEConfig
from foreroute.engine.data.loader import PlannedLoader
from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.streams import Batch
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.tables import build_tables

EXPERTS = 4


@pytest.fixture(scope="module")
def routers():
    ids = np.random.default_rng(0).integers(0, 8, 500).astype(np.uint8)
    moe = MoEConfig(experts=EXPERTS, ngram=2, rows=64)
    tables = build_tables(moe, 8, ids, num_tables=2, seed=1, cache_dir=None)
    return [HashedRouter(table) for table in tables]


def make_batch(step, micro):
    ids = (torch.arange(13) * (step + 3) + micro) % 8
    batch = Batch(
        ids_BQ=ids[1:].reshape(1, 12),
        targets_BQ=ids[1:].reshape(1, 12),
        left_BC=ids[:1].reshape(1, 1),
        stream_B=torch.tensor([micro]),
        index=step,
        fresh=False,
    )
    return group_batch([batch])


def start(routers, make=make_batch, *, steps=range(2, 6), prefetch=1, accumulation=2):
    def planned(step, micro):
        return plan_batch(make(step, micro), 1 + step % 3, routers)

    batches = SimpleNamespace(planned=planned)
    return PlannedLoader(batches, steps=steps, accumulation=accumulation, prefetch=prefetch)


def flatten(value):
    """List the numbers of nested dataclasses and tuples."""
    if dataclasses.is_dataclass(value):
        return [
            item for field in dataclasses.fields(value) if field.compare for item in flatten(getattr(value, field.name))
        ]
    if isinstance(value, tuple):
        return [item for part in value for item in flatten(part)]
    return [value.tolist()] if isinstance(value, torch.Tensor) else [value]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_come_in_order_and_equal_planning_inline(routers, prefetch):
    loader = start(routers, prefetch=prefetch)
    for step in range(2, 6):
        for micro in range(2):
            planned, wait_seconds = loader.next()
            inline = plan_batch(make_batch(step, micro), 1 + step % 3, routers)
            assert flatten(planned) == flatten(inline)
            assert len(planned.routing.plans) == 2 and wait_seconds >= 0
            assert planned.routing.k == planned.routing.plans[1].k == 1 + step % 3
    for _ in range(2):
        with pytest.raises(RuntimeError, match="all steps are done"):
            loader.next()
    loader.close()


def test_each_batch_says_how_long_it_took_to_make(routers):
    """Reading and planning, not the wait for its turn."""

    def make(step, micro):
        time.sleep(0.03 if micro else 0.0)
        return make_batch(step, micro)

    begin = time.perf_counter()
    loader = start(routers, make)
    found = [loader.next()[0].prepare_ms for _ in range(4)]
    loader.close()
    assert min(found) > 0 and min(found[1::2]) >= 30
    assert sum(found) <= 1e3 * (time.perf_counter() - begin)


def test_without_planned_routers_there_is_no_plan():
    loader = start(None)
    planned, _ = loader.next()
    loader.close()
    assert planned.routing.plans is None and planned.routing.k == 3 and planned.batch.index == 2


def test_worker_stays_a_whole_number_of_steps_ahead(routers):
    made = []
    enough = threading.Event()

    def make(step, micro):
        made.append((step, micro))
        if len(made) in (6, 8):
            enough.set()
        return make_batch(step, micro)

    loader = start(routers, make, steps=range(100), prefetch=3)
    assert enough.wait(20)
    assert made == [(step, micro) for step in range(3) for micro in range(2)]
    enough.clear()
    for _ in range(2):
        loader.next()
    assert enough.wait(20)
    loader.close()
    assert made[6:] == [(3, 0), (3, 1)]


def test_error_of_the_worker_reaches_the_consumer_with_its_traceback(routers):
    def make(step, micro):
        if (step, micro) == (3, 1):
            raise KeyError("the missing shard")
        return make_batch(step, micro)

    loader = start(routers, make)
    for _ in range(3):
        loader.next()
    for _ in range(2):
        with pytest.raises(KeyError, match="the missing shard") as info:
            loader.next()
        assert "in make" in "".join(traceback.format_tb(info.value.__traceback__))
    loader.close()


def test_a_stop_iteration_of_the_worker_is_an_error_too(routers):
    loader = start(routers, lambda step, micro: next(iter([])))
    with pytest.raises(StopIteration):
        loader.next()
    loader.close()


def test_steps_are_taken_as_they_are_needed(routers):
    """So that their number costs no memory: a run of 5e9 steps starts at once."""
    drawn = []
    loader = start(routers, steps=(drawn.append(step) or step for step in range(1000)), accumulation=1)
    loader.next()
    loader.close()
    assert drawn[0] == 0 and len(drawn) < 10, drawn


@pytest.mark.parametrize("taken", [0, 1])
def test_close_while_the_queue_is_full_ends_the_worker(routers, taken):
    before = threading.active_count()
    full = threading.Event()

    def make(step, micro):
        if step == taken:  # one step ahead of what was taken
            full.set()
        return make_batch(step, micro)

    loader = start(routers, make, steps=range(10**6), accumulation=1)
    for _ in range(taken):
        loader.next()
    assert full.wait(20)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        loader.next()


def test_close_when_the_worker_fails_at_the_same_moment(routers):
    closing = threading.Event()

    def make(step, micro):
        closing.wait(20)
        raise KeyError("late")

    loader = start(routers, make, accumulation=1, steps=range(5))
    timer = threading.Timer(0.05, closing.set)
    timer.start()
    loader.close()
    timer.join()
    assert not loader._worker.is_alive()


def test_no_generator_is_consumed(routers):
    torch.manual_seed(5)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader = start(routers)
    for _ in range(8):
        loader.next()
    loader.close()
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_a_closed_loader_of_one_rank_prepares_nothing_more(routers):
    """Though it might: nobody waits for it."""
    made, begun, go_on = [], threading.Event(), threading.Event()

    def make(step, micro):
        made.append((step, micro))
        begun.set()
        assert go_on.wait(20)
        return make_batch(step, micro)

    loader = start(routers, make, steps=range(50), prefetch=50)
    assert begun.wait(20)
    closing = threading.Thread(target=loader.close)
    closing.start()
    while not loader._closed:
        time.sleep(0.001)
    go_on.set()
    closing.join(20)
    assert made == [(0, 0)] and not closing.is_alive()
