"""A table in host memory trains bit for bit as one on the device, however far ahead its rows are fetched."""

import threading
from collections import deque
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foreroute.engine.config import RowMoments, RowUpdates
from foreroute.engine.ngram_tables import host_rows
from foreroute.engine.ngram_tables.hash_keys import hash_keys
from foreroute.engine.ngram_tables.host_rows import HostRows
from foreroute.engine.ngram_tables.row_rules import RowAdam, RowRule
from foreroute.engine.ngram_tables.sharded import ShardedTable
from foreroute.engine.ngram_tables.store import RowStore
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.routing.plans.row_plan import TableRows, plan_rows

STEPS, STREAMS, SEGMENT, VOCAB, ROWS, WIDTH = 200, 4, 16, 64, 4096, 6
ADAM = RowAdam(eps=1e-6)
BY_STEP = RowAdam(eps=1e-6, updates=RowUpdates.step, moments=RowMoments.row)


@cache
def plans(ngram: int) -> list[TableRows]:
    """Of each step; ids are so skewed that consecutive steps share n-grams."""
    share = 1 / np.arange(1, VOCAB + 1)
    ids = np.random.default_rng(0).choice(VOCAB, (STREAMS, STEPS * SEGMENT + 2), p=share / share.sum())
    keys = hash_keys((ngram,), 1, ROWS, vocab_size=VOCAB, seed=5, table=0)
    found = []
    for first in range(2, ids.shape[1], SEGMENT):
        own = torch.from_numpy(ids[:, first : first + SEGMENT])
        left = torch.from_numpy(ids[:, first - 2 : first])
        batch = SimpleNamespace(ids_BQ=own, left_BC=left, new_document_BX=None)
        found += plan_rows([keys], [batch], CpuGroup())
    return found


def new_store(rule: RowRule, dtype: torch.dtype) -> RowStore:
    return RowStore(ROWS, WIDTH, rank=0, world=1, seed=5, index=0, scale=0.5, rule=rule, dtype=dtype)


def train(
    ngram: int,
    rule: RowRule = ADAM,
    *,
    prefetch: int | None = None,
    dtype: torch.dtype = torch.float32,
    refused: int = -1,
    steps: int = STEPS,
) -> Any:
    """Train a table and a map of its rows.

    Args:
        prefetch: steps whose rows are fetched before one of them begins; None: the table is on the device.
        refused: a step that changes nothing.

    Returns:
        Losses, and the store at the end.
    """
    store = new_store(rule, dtype)
    table = ShardedTable(store, None, None, None if prefetch is None else "cpu")
    weight = torch.linspace(-1, 1, WIDTH * 8, dtype=dtype).view(8, WIDTH).requires_grad_()
    found, coming, losses = deque(plans(ngram)), deque[Any](), []
    for number in range(steps):
        while found and len(coming) <= (prefetch or 0):
            rows = found.popleft()
            coming.append((table.ahead(rows.plans[0]), rows.landed_BQH[0]))
        plan, place_BQH = coming.popleft()
        table.fetch(plan)
        logits = F.embedding(place_BQH[..., 0], table.landed()) @ weight.T
        target = torch.arange(STREAMS * SEGMENT).add(number) % 8
        loss = F.cross_entropy(logits.flatten(0, 1), target)
        loss.backward()
        table.return_gradients()
        grad_UW = table.summed_gradients()
        assert weight.grad is not None
        table.update(grad_UW, step=number + 1, lr=0.05, keep=torch.tensor(number != refused))
        with torch.no_grad():
            weight -= 0.1 * weight.grad
        weight.grad = None
        losses.append(loss.item())
    table.settle()
    return SimpleNamespace(losses=losses, store=store)


def same(one: Any, other: Any) -> bool:
    return one.losses == other.losses and all(
        torch.equal(kept, other.store.state[name]) for name, kept in one.store.state.items()
    )


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_training_is_that_of_a_table_on_the_device(ngram: int) -> None:
    want = train(ngram)
    assert want.losses[-1] < want.losses[0]
    for prefetch in (1, 2, 4):
        assert same(train(ngram, prefetch=prefetch), want)


def test_with_another_rule_another_type_and_a_refused_step() -> None:
    steps = 40
    assert same(train(2, BY_STEP, prefetch=2, steps=steps), train(2, BY_STEP, steps=steps))
    fp64 = {"dtype": torch.float64, "steps": steps}
    assert same(train(2, prefetch=3, **fp64), train(2, **fp64))
    refused = train(2, refused=30, steps=steps)
    assert same(train(2, prefetch=2, refused=30, steps=steps), refused)
    assert not same(refused, train(2, steps=steps))


@pytest.mark.parametrize("what", ["nothing is patched", "values alone are patched"])
def test_without_patches_it_differs(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    patch = host_rows._patch

    def less(block: Any, left: Any, there_N: Tensor, here_N: Tensor) -> None:
        patch({"value": block["value"]} if "values" in what else {}, left, there_N, here_N)

    want = train(2, steps=60)
    monkeypatch.setattr(host_rows, "_patch", less)
    found = train(2, prefetch=2, steps=60)
    used = want.store.state["count"].squeeze(1) > 0
    differ = (found.store.state["value"] != want.store.state["value"]).any(1)
    assert differ.sum() > 0.5 * used.sum()


def test_which_rows_are_patched() -> None:
    """The example of _overlaps; a step's rows come from the last step that has them."""
    steps = [host_rows.StepRows(ADAM, torch.tensor(rows), torch.device("cpu")) for rows in ([3, 5], [5, 9])]
    found = [
        (steps.index(step), there_N.tolist(), here_N.tolist())
        for step, there_N, here_N in host_rows._overlaps(torch.tensor([3, 5, 8]), steps)
    ]
    assert found == [(1, [0], [1]), (0, [0], [0])]


def rows_of(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def test_a_checkpoint_or_an_evaluation_reads_what_steps_left() -> None:
    """Until then the store is older than the last step; rows that were fetched ahead stay right."""
    store, device = new_store(ADAM, torch.float32), new_store(ADAM, torch.float32)
    host, ones_UW = HostRows(store, "cpu"), torch.ones(2, WIDTH)
    first, second = host.ahead(rows_of(1, 4)), host.ahead(rows_of(4, 6))
    for number, (source, local_U) in enumerate(((first, rows_of(1, 4)), (second, rows_of(4, 6))), start=1):
        assert torch.equal(source.read(local_U), device.read(local_U))
        source.update(local_U, ones_UW, step=number, lr=0.1)
        device.update(local_U, ones_UW, step=number, lr=0.1)
        if number == 1:
            assert not torch.equal(store.read(local_U), device.read(local_U))
            assert torch.equal(host.read(local_U), device.read(local_U))  # an evaluation
            assert torch.equal(store.read(local_U), device.read(local_U))
    assert not torch.equal(store.read(rows_of(6)), device.read(rows_of(6)))
    host.settle()
    for name, kept in store.state.items():
        assert torch.equal(kept, device.state[name])


def test_after_a_stop_other_steps_may_follow() -> None:
    """Steps that were fetched and did not begin are forgotten; those that ended are written back."""
    store, device = new_store(ADAM, torch.float32), new_store(ADAM, torch.float32)
    host, ones_UW, local_U = HostRows(store, "cpu"), torch.ones(2, WIDTH), rows_of(1, 4)
    ended = host.ahead(local_U)
    host.ahead(local_U)
    ended.read(local_U)
    ended.update(local_U, ones_UW, step=1, lr=0.1)
    device.update(local_U, ones_UW, step=1, lr=0.1)
    host.settle(restart=True)
    again = host.ahead(local_U)
    assert torch.equal(again.read(local_U), device.read(local_U)) and not again.patches


def test_a_step_out_of_order_is_an_error() -> None:
    host = HostRows(new_store(ADAM, torch.float32), "cpu")
    host.ahead(rows_of(1, 4))
    with pytest.raises(RuntimeError, match="begins before one in front of it has ended"):
        host.ahead(rows_of(4)).read(rows_of(4))


def test_rows_that_nobody_fetched_are_updated_in_place() -> None:
    store, device = new_store(ADAM, torch.float32), new_store(ADAM, torch.float32)
    host, local_U = HostRows(store, "cpu"), rows_of(2, 3)
    for source in (host, device):
        source.update(local_U, torch.ones(2, WIDTH), step=torch.tensor(1), lr=0.1, keep=torch.tensor(True))
    assert torch.equal(host.read(local_U), device.read(local_U))


def test_the_loaders_thread_fetches_beside_training() -> None:
    """Every interleaving gives the same numbers: here that of two threads."""
    store, device = new_store(ADAM, torch.float32), new_store(ADAM, torch.float32)
    host = HostRows(store, "cpu")
    steps = [rows.plans[0].touched_U for rows in plans(2)]
    allowed, made, fetched = threading.Semaphore(3), threading.Semaphore(0), deque[Any]()

    def work() -> None:
        for local_U in steps:
            allowed.acquire()
            fetched.append(host.ahead(local_U))
            made.release()

    thread = threading.Thread(target=work)
    thread.start()
    for number, local_U in enumerate(steps, start=1):
        made.acquire()
        source = fetched.popleft()
        assert torch.equal(source.read(local_U), device.read(local_U))
        grad_UW = device.read(local_U).sin()
        source.update(local_U, grad_UW, step=number, lr=0.1)
        device.update(local_U, grad_UW, step=number, lr=0.1)
        allowed.release()
    thread.join()
    host.settle()
    assert all(torch.equal(kept, device.state[name]) for name, kept in store.state.items())
