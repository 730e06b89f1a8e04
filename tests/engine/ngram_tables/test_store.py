"""Rows of a table: whose they are, how they begin, and how a step changes those that it used and no others."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from foreroute.engine.config import RowMoments, RowUpdates
from foreroute.engine.ngram_tables import initial_rows, row_rules
from foreroute.engine.ngram_tables.row_rules import RowAdam, RowRule, RowSGD
from foreroute.engine.ngram_tables.store import RowStore
from foreroute.engine.routing.hashing import Purpose, hash64, normal
from tests.references.row_adam import adam_row

ROWS, WIDTH, STEPS = 37, 5, 60
BETAS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-3}  # an eps that is felt


def store(
    rule: RowRule, *, rank: int = 0, world: int = 1, dtype: torch.dtype = torch.float64, scale: float = 0.3
) -> RowStore:
    return RowStore(ROWS, WIDTH, rank=rank, world=world, seed=7, index=2, scale=scale, rule=rule, dtype=dtype)


@cache
def steps() -> list[tuple[Tensor, Tensor]]:
    """Distinct rows and gradients of each step, some rows often and some never; row 36 is used first at step 50."""
    gen, share = np.random.default_rng(3), 1 / np.arange(1, 31)
    found = []
    for step in range(STEPS):
        row_U = np.unique(gen.choice(30, 8, p=share / share.sum()))
        row_U = np.append(row_U, 36) if step >= 50 else row_U
        found.append((torch.from_numpy(gen.permutation(row_U)), torch.from_numpy(gen.normal(size=(row_U.size, WIDTH)))))
    return found


def lr(step: int) -> float:
    return 0.05 / step


def trained(rule: RowRule, **options: object) -> RowStore:
    result = store(rule, **options)  # type: ignore[arg-type]
    for step, (row_U, grad_UW) in enumerate(steps(), start=1):
        result.update(row_U, grad_UW.to(result.state["value"].dtype), step=step, lr=lr(step))
    return result


def by_loop(*, by_step: bool, one_moment: bool) -> Tensor:
    begin, found = store(RowSGD()).state["value"], []
    for row in range(ROWS):
        used = [(step, (row_U == row).nonzero()) for step, (row_U, _) in enumerate(steps(), start=1)]
        used = [(step, place.item()) for step, place in used if place.numel()]
        gradients = [steps()[step - 1][1][place].tolist() for step, place in used]
        numbers, rates = [step for step, _ in used], [lr(step) for step, _ in used]
        found.append(
            adam_row(
                begin[row].tolist(),
                gradients,
                lr=rates,
                steps=numbers if by_step else None,
                one_moment=one_moment,
                **BETAS,
            )
        )
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operators, as on a GPU."""
    monkeypatch.setattr(row_rules, "_COMPILED", ())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("updates", RowUpdates)
@pytest.mark.parametrize("moments", RowMoments)
def test_rules_are_a_plain_loops(
    updates: RowUpdates, moments: RowMoments, compiled: bool, request: pytest.FixtureRequest
) -> None:
    if not compiled:
        request.getfixturevalue("operators")
    rule = RowAdam(**BETAS, updates=updates, moments=moments)
    by_step, one_moment = updates is RowUpdates.step, moments is RowMoments.row
    want = by_loop(by_step=by_step, one_moment=one_moment)
    torch.testing.assert_close(trained(rule).state["value"], want, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        trained(rule, dtype=torch.float32).state["value"], want.float(), rtol=0, atol=2e-6, check_dtype=False
    )
    for other in (
        {"by_step": not by_step, "one_moment": one_moment},
        {"by_step": by_step, "one_moment": not one_moment},
    ):
        assert (by_loop(**other) - want).abs().max() > 1e-3  # negative control: the rules differ


def test_by_step_is_sparse_adam() -> None:
    weight = store(RowSGD()).state["value"].clone().requires_grad_()
    theirs = torch.optim.SparseAdam([weight], betas=(0.9, 0.95), eps=1e-3)
    for step, (row_U, grad_UW) in enumerate(steps(), start=1):
        weight.grad = torch.sparse_coo_tensor(row_U[None], grad_UW, weight.shape, check_invariants=True)
        theirs.param_groups[0]["lr"] = lr(step)
        theirs.step()
    ours = trained(RowAdam(**BETAS, updates=RowUpdates.step)).state["value"]
    torch.testing.assert_close(ours, weight.detach(), rtol=0, atol=1e-13)


def test_by_count_is_adam_on_each_row_alone() -> None:
    ours = trained(RowAdam(**BETAS)).state
    for row in range(ROWS):
        weight = store(RowSGD()).state["value"][row].clone().requires_grad_()
        theirs = torch.optim.Adam([weight], betas=(0.9, 0.95), eps=1e-3)
        updates = 0
        for step, (row_U, grad_UW) in enumerate(steps(), start=1):
            for grad_W in grad_UW[row_U == row]:
                weight.grad, theirs.param_groups[0]["lr"] = grad_W.clone(), lr(step)
                theirs.step()
                updates += 1
        torch.testing.assert_close(ours["value"][row], weight.detach(), rtol=0, atol=1e-13)
        assert ours["count"][row] == updates


def test_a_late_first_update() -> None:
    """By count it is the learning rate; by step, at step 10,000, (1 - beta1) / sqrt(1 - beta2) times as much."""
    row_U, grad_UW = torch.tensor([3]), torch.full((1, WIDTH), 5.0, dtype=torch.float64)
    for updates, factor in ((RowUpdates.count, 1.0), (RowUpdates.step, 0.1 / 0.001**0.5)):
        table = store(RowAdam(updates=updates))
        before = table.read(row_U)
        table.update(row_U, grad_UW, step=10_000, lr=0.01)
        moved = before - table.read(row_U)
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01 * factor), rtol=1e-3, atol=0)


def test_the_first_count_in_fp32() -> None:
    """1 - beta2 in fp32 would be off by 1e-5."""
    table = RowStore(1, 2, rank=0, world=1, seed=0, index=0, scale=0.0, rule=RowAdam(eps=0.0), dtype=torch.float32)
    table.update(torch.tensor([0]), torch.tensor([[2.0, -3.0]]), step=1, lr=1.0)
    torch.testing.assert_close(table.state["value"], torch.tensor([[-1.0, 1.0]]), rtol=0, atol=2e-7)


@pytest.mark.parametrize("updates", RowUpdates)
def test_other_rows_keep_every_bit(updates: RowUpdates) -> None:
    table = trained(RowAdam(updates=updates), dtype=torch.float32)
    before = {name: kept.clone() for name, kept in table.state.items()}
    row_U, grad_UW = steps()[0]
    others = torch.ones(ROWS, dtype=torch.bool)
    others[row_U] = False
    table.update(row_U, grad_UW.float(), step=STEPS + 1, lr=0.1)
    for name, kept in table.state.items():
        assert torch.equal(kept[others], before[name][others])
        assert not torch.equal(kept[row_U], before[name][row_U])
    # negative control: dense Adam goes on moving rows that were used before
    weight = torch.zeros(2, 1, requires_grad=True)
    dense = torch.optim.Adam([weight], lr=0.1)
    for grad in ([[1.0], [1.0]], [[1.0], [0.0]]):
        moved = weight.detach()[1].clone()
        weight.grad = torch.tensor(grad)
        dense.step()
    assert moved != weight[1]


@pytest.mark.parametrize("compiled", [True, False])
def test_a_step_that_is_not_kept_changes_nothing(compiled: bool, request: pytest.FixtureRequest) -> None:
    if not compiled:
        request.getfixturevalue("operators")
    table = trained(RowAdam(), dtype=torch.float32)
    before = {name: kept.clone() for name, kept in table.state.items()}
    row_U, grad_UW = steps()[0]
    bad_UW = torch.full_like(grad_UW, torch.nan).float()
    table.update(row_U, bad_UW, step=STEPS + 1, lr=0.1, keep=torch.tensor(False))
    assert all(torch.equal(kept, before[name]) for name, kept in table.state.items())
    table.update(row_U, grad_UW.float(), step=STEPS + 1, lr=0.1, keep=torch.tensor(True))
    assert not any(torch.equal(kept, before[name]) for name, kept in table.state.items())


def test_the_number_of_a_step_may_be_on_the_device() -> None:
    row_U, grad_UW = steps()[0]
    tables = [store(RowAdam(updates=RowUpdates.step)) for _ in range(2)]
    for table, step in zip(tables, (7, torch.tensor(7)), strict=True):
        table.update(row_U, grad_UW, step=step, lr=0.1)
    assert torch.equal(tables[0].state["value"], tables[1].state["value"])


def test_plain_descent_is_linear() -> None:
    table = store(RowSGD())
    row_U, grad_UW = steps()[0]
    want = table.state["value"].clone()
    want[row_U] -= 0.25 * grad_UW
    table.update(row_U, grad_UW, step=1, lr=0.25)
    assert torch.equal(table.state["value"], want) and list(table.state) == ["value"]


@pytest.mark.parametrize("world", [2, 3, 40])
def test_ranks_hold_the_rows_of_one(world: int) -> None:
    """Training included: each rank updates its own rows of a step."""
    rule = RowAdam(moments=RowMoments.row)
    whole, ranks = store(rule), [store(rule, rank=rank, world=world) for rank in range(world)]
    for step, (row_U, grad_UW) in enumerate(steps()[:20], start=1):
        whole.update(row_U, grad_UW, step=step, lr=lr(step))
        for rank, part in enumerate(ranks):
            own_U = row_U % world == rank
            part.update(row_U[own_U] // world, grad_UW[own_U], step=step, lr=lr(step))
    for rank, part in enumerate(ranks):
        assert part.owned == range(rank, ROWS, world) and part.local_rows == len(part.owned)
        for name, kept in part.state.items():
            assert torch.equal(kept, whole.state[name][rank::world])


def test_initial_values() -> None:
    value = store(RowSGD()).state["value"]
    want = 0.3 * normal(hash64(Purpose.initial_row, 7, 2, np.arange(ROWS)[:, None], np.arange(WIDTH)[None]))
    torch.testing.assert_close(value, torch.from_numpy(want), rtol=1e-14, atol=1e-15)
    large = RowStore(4000, 25, rank=0, world=1, seed=7, index=2, scale=0.3, rule=RowSGD()).state["value"].double()
    assert abs(large.mean()) < 5 * 0.3 / 100_000**0.5 and abs(large.std() / 0.3 - 1) < 0.02
    assert torch.equal(large[:ROWS, :WIDTH], value.float().double())  # of the row's and column's number alone
    other = RowStore(ROWS, WIDTH, rank=0, world=1, seed=7, index=3, scale=0.3, rule=RowSGD()).state["value"]
    assert not torch.isin(other, value.float()).any()
    assert not store(RowSGD(), scale=0.0).state["value"].any()


@pytest.mark.usefixtures("operators")
def test_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 rows each: the bits are those of all at once."""
    whole = trained(RowAdam(moments=RowMoments.row), dtype=torch.float32)
    monkeypatch.setattr(initial_rows, "_MOST_NUMBERS", 4 * WIDTH)
    assert list(initial_rows.parts_of(9, WIDTH)) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert list(initial_rows.parts_of(0, WIDTH)) == []
    assert list(initial_rows.parts_of(2, 10**9)) == [slice(0, 1), slice(1, 2)]
    parts = trained(RowAdam(moments=RowMoments.row), dtype=torch.float32)
    assert all(torch.equal(kept, whole.state[name]) for name, kept in parts.state.items())


def test_reading_and_blocks() -> None:
    table = trained(RowAdam())
    local_S = torch.tensor([4, 0, 4])
    assert torch.equal(table.read(local_S), table.state["value"][local_S])
    empty = torch.empty(0, dtype=torch.int64)
    assert table.read(empty).shape == (0, WIDTH)
    table.update(empty, torch.empty(0, WIDTH, dtype=torch.float64), step=1, lr=0.1)
    block = table.block(torch.tensor([4, 0]))
    block["value"] += 1  # copies
    table.write(torch.tensor([9, 8]), block)
    for name, kept in table.state.items():
        expected = kept[[4, 0]] + 1 if name == "value" else kept[[4, 0]]
        assert torch.equal(kept[[9, 8]], expected)
