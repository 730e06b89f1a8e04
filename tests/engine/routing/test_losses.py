import math

import pytest
import torch

from foreroute.engine.routing.live_router import top_k_route
from foreroute.engine.routing.losses import balance_loss, chosen_counts, consistency_loss, z_loss
from foreroute.engine.routing.plan import Route


def plain_balance(logits, experts):
    """Switch Transformer eq. 4 in Python floats."""
    num_tokens, num_experts, k = len(logits), len(logits[0]), len(experts[0])
    total = 0.0
    for e in range(num_experts):
        fraction = sum(chosen.count(e) for chosen in experts) / (num_tokens * k)
        probability = sum(math.exp(row[e]) / sum(math.exp(value) for value in row) for row in logits)
        total += fraction * probability / num_tokens
    return num_experts * total


@pytest.mark.method
@pytest.mark.parametrize("k", [1, 3, 6])
def test_losses_equal_plain_loops(k):
    logits = 3 * torch.randn(40, 6, generator=torch.Generator().manual_seed(k))
    expert_TK = top_k_route(logits, k).route.expert_TK
    count = torch.bincount(expert_TK.reshape(-1), minlength=6)
    rows = logits.double().tolist()
    expected = plain_balance(rows, expert_TK.tolist())
    assert balance_loss(logits, count).item() == pytest.approx(expected, rel=1e-6)
    squares = [math.log(sum(math.exp(value) for value in row)) ** 2 for row in rows]
    assert z_loss(logits).item() == pytest.approx(sum(squares) / 40, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_loss_is_one_when_all_is_even_and_more_otherwise(k):
    num_experts = 4
    logits = torch.stack([torch.arange(4.0).roll(shift) for shift in range(4)])
    count = torch.full((num_experts,), k)
    assert balance_loss(logits, count).item() == pytest.approx(1, rel=1e-6)
    collapsed = torch.tensor([[9.0, 0, 0, 0]]).expand(4, 4)
    assert balance_loss(collapsed, torch.tensor([4, 0, 0, 0])).item() == pytest.approx(4, abs=0.01)


def test_gradients_of_bf16_logits_are_finite_and_push_towards_balance():
    logits = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = balance_loss(logits, torch.tensor([8, 0, 0, 0]))
    assert loss.dtype == torch.float32
    loss.backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()
    big = torch.full((2, 4), 100.0, requires_grad=True)
    z_loss(big).backward()
    assert (big.grad > 0).all() and big.grad.isfinite().all()


def test_counts_of_all_ranks_make_the_loss_that_of_all_tokens():
    """Three ranks with unlike routes: the mean of their losses and gradients; each rank's own counts give another."""
    logits = 2 * torch.randn(3, 10, 5, generator=torch.Generator().manual_seed(0)).double()
    logits[1, :, 2] += 2
    chosen = logits.topk(2, dim=2).indices
    own = [chosen_counts(Route(expert_TK, torch.ones(10, 2)), 5) for expert_TK in chosen]
    for expert_TK, count_E in zip(chosen.tolist(), own, strict=True):
        assert count_E.tolist() == [sum(row.count(e) for row in expert_TK) for e in range(5)]
    whole = logits.flatten(0, 1).requires_grad_()
    want = balance_loss(whole, sum(own))
    want.backward()
    parts = [part.clone().requires_grad_() for part in logits]
    losses = [balance_loss(part, sum(own)) / 3 for part in parts]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([p.grad for p in parts]), whole.grad, rtol=1e-12, atol=0)
    alone = sum(balance_loss(part, count_E) for part, count_E in zip(parts, own, strict=True)) / 3
    assert abs(alone - want) > 1e-2


def test_counts_leave_out_what_a_token_does_not_use():
    used_TK = torch.tensor([[True, False], [False, False], [True, True]])
    route = Route(torch.tensor([[2, 0], [1, 2], [0, 2]]), torch.ones(3, 2), used_TK)
    assert chosen_counts(route, 4).tolist() == [1, 0, 2, 0]


def plain_consistency(one, other):
    """THOR's term in Python floats, averaged over tokens."""
    total = 0.0
    for row, other_row in zip(one, other, strict=True):
        p = [math.exp(x) / sum(map(math.exp, row)) for x in row]
        q = [math.exp(x) / sum(map(math.exp, other_row)) for x in other_row]
        kl_pq = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        kl_qp = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        total += (kl_pq + kl_qp) / 2
    return total / len(one)


@pytest.mark.method
def test_consistency_equals_a_plain_loop():
    one, other = 2 * torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(2))
    want = plain_consistency(one.double().tolist(), other.double().tolist())
    assert consistency_loss(one, other).item() == pytest.approx(want, rel=1e-5)
    assert consistency_loss(one.double(), other.double()).item() == pytest.approx(want, rel=1e-12)
    assert consistency_loss(other, one).item() == pytest.approx(want, rel=1e-5)
    assert consistency_loss(one, one).item() == 0


def test_consistency_survives_probabilities_that_underflow():
    one = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    other = -one.detach()
    loss = consistency_loss(one, other)
    loss.backward()
    assert loss.item() == pytest.approx(600, rel=1e-6) and one.grad.isfinite().all()
    p, q = one.detach().softmax(-1), other.softmax(-1)
    assert not ((p - q) * (p.log() - q.log())).sum().isfinite()  # as the public code has it
