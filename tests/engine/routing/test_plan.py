from itertools import pairwise

import pytest
import torch

from foreroute.engine.routing.plan import Plan, Route, build_plan, chosen_mask, cut, dense_weights
from foreroute.kernels.expert_index import ExpertRows, expert_rows


def plain_plan(experts, weights, num_experts):
    """Expert-major lists by the definition: (source, ends, weights, slots of each input row)."""
    source, ends, weight, slots = [], [], [], [[] for _ in experts]
    for expert in range(num_experts):
        for row, choices in enumerate(experts):
            for choice, chosen in enumerate(choices):
                if chosen == expert:
                    slots[row].append((choice, len(source)))
                    source.append(row)
                    weight.append(weights[row][choice])
        ends.append(len(source))
    return source, ends, weight, [[n for _, n in sorted(row)] for row in slots]


def slots_of(rows: ExpertRows) -> list[list[int]]:
    starts = [*rows.slot_offset_R.tolist(), rows.num_rows]
    return [rows.slot_N[a:b].tolist() for a, b in pairwise(starts)]


def random_route(num_tokens, k, num_experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    return Route(scores.argsort(dim=1)[:, :k], torch.rand(num_tokens, k, generator=generator))


def test_example_of_the_plan():
    route = Route(torch.tensor([[2, 0], [0, 1]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    plan = build_plan(route, 3)
    assert plan.k == 2
    assert plan.chunks[0].rows.source_N.tolist() == [0, 1, 1, 0]
    assert plan.chunks[0].rows.offset_L.tolist() == [2, 3, 4]
    assert torch.equal(plan.chunks[0].weight_N, torch.tensor([0.3, 0.6, 0.4, 0.7]))
    assert plan.count_E.tolist() == plan.chunks[0].rows.counts() == [2, 1, 1]
    assert slots_of(plan.chunks[0].rows) == [[3, 0], [1, 2]]
    assert (plan.send_splits, plan.recv_splits, plan.wire_rows) == ((2,), (2,), 0)


def test_example_of_the_rows():
    """The docstring's rows: two choices of row 0, one of rows 1 and 2."""
    rows = ExpertRows(
        source_N=torch.tensor([0, 2, 0, 1]),
        offset_L=torch.tensor([2, 4], dtype=torch.int32),
        slot_N=torch.tensor([2, 0, 3, 1]),
        slot_offset_R=torch.tensor([0, 2, 3]),
    )
    assert (rows.num_experts, rows.num_rows, rows.num_inputs) == (2, 4, 3)
    assert rows.counts() == [2, 2]
    assert slots_of(rows) == [[2, 0], [3], [1]]
    for row, slots in enumerate(slots_of(rows)):
        assert rows.source_N[slots].tolist() == [row] * len(slots)


@pytest.mark.parametrize(
    ("num_tokens", "k", "num_experts"),
    [(1, 1, 1), (7, 1, 1), (7, 1, 4), (7, 4, 4), (9, 3, 16), (50, 2, 5), (3, 2, 300)],
)
def test_plan_equals_a_plain_loop(num_tokens, k, num_experts):
    route = random_route(num_tokens, k, num_experts)
    plan = build_plan(route, num_experts)
    source, ends, weight, slots = plain_plan(route.expert_TK.tolist(), route.weight_TK.tolist(), num_experts)
    assert plan.chunks[0].rows.source_N.tolist() == source
    assert plan.chunks[0].rows.offset_L.tolist() == ends
    assert plan.chunks[0].weight_N.tolist() == weight
    assert slots_of(plan.chunks[0].rows) == slots
    assert plan.count_E.sum() == num_tokens * k and len(plan.count_E) == num_experts
    _, choice_N = expert_rows(route.expert_TK, num_experts)
    assert torch.equal(route.expert_TK.reshape(-1)[choice_N], plan_experts(plan))


def plan_experts(plan: Plan) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(plan.count_E)), plan.count_E)


def test_experts_without_rows_have_empty_ranges():
    plan = build_plan(Route(torch.tensor([[3], [1], [3]]), torch.ones(3, 1)), 5)
    assert plan.chunks[0].rows.counts() == plan.count_E.tolist() == [0, 1, 0, 2, 0]
    assert plan.chunks[0].rows.offset_L.tolist() == [0, 1, 1, 3, 3]
    assert plan.chunks[0].rows.source_N.tolist() == [1, 0, 2]


def test_dtypes_are_as_promised():
    plan = build_plan(random_route(6, 2, 4), 4)
    rows = plan.chunks[0].rows
    assert rows.offset_L.dtype == torch.int32 and plan.chunks[0].weight_N.dtype == torch.float32
    for tensor in (rows.source_N, rows.slot_N, rows.slot_offset_R, plan.count_E):
        assert tensor.dtype == torch.int64


def test_gradient_of_the_weights_reaches_the_route():
    route = random_route(5, 2, 4)
    route.weight_TK.requires_grad_()
    plan = build_plan(route, 4)
    scale = torch.arange(10.0)
    (plan.chunks[0].weight_N * scale).sum().backward()
    expected = torch.zeros(5, 2)
    for token, slots in enumerate(slots_of(plan.chunks[0].rows)):
        expected[token] = scale[slots]
    assert torch.equal(route.weight_TK.grad, expected)


def test_a_route_of_no_tokens():
    plan = build_plan(Route(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)), 3)
    assert (
        plan.chunks[0].rows.counts() == [0, 0, 0]
        and plan.chunks[0].rows.num_rows == plan.chunks[0].rows.num_inputs == 0
    )


def test_tokens_are_cut_into_equal_parts():
    assert cut(7, 3) == [slice(0, 2), slice(2, 4), slice(4, 7)]  # the docstring's
    assert cut(2, 4) == [slice(0, 1), slice(1, 2)]
    assert cut(0, 4) == [slice(0, 0)]
    for tokens, chunks in ((23, 4), (8, 4), (100, 7), (5, 1)):
        spans = cut(tokens, chunks)
        assert [t for span in spans for t in range(span.start, span.stop)] == list(range(tokens))
        sizes = [span.stop - span.start for span in spans]
        assert len(spans) == chunks and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_a_plan_of_any_number_of_experts_for_each_token_equals_a_plain_loop(listed, rows):
    """Experts listed in any order, or all of them; tokens without experts; weights of unused ones do not matter."""
    generator = torch.Generator().manual_seed(3)
    expert_TK = (
        torch.rand(31, 6, generator=generator).argsort(dim=1)[:, :4] if listed else torch.arange(6).repeat(31, 1)
    )
    used_TK = torch.rand(expert_TK.shape, generator=generator) < 0.4
    weight_TK = torch.randn(expert_TK.shape, generator=generator)
    weight_TK[~used_TK] = float("nan")
    weight_TK.requires_grad_()
    route = Route(expert_TK, weight_TK, used_TK, int(used_TK.sum()) if rows else None)
    plan = build_plan(route, 6, 2)
    tokens = [
        {e: (w, n) for n, (e, w, u) in enumerate(zip(*row, strict=True)) if u}
        for row in zip(expert_TK.tolist(), weight_TK.tolist(), used_TK.tolist(), strict=True)
    ]
    assert {} in tokens and plan.k == 2 and plan.num_tokens == 31
    pairs = [(t, e) for e in range(6) for t, chosen in enumerate(tokens) if e in chosen]
    (chunk,) = plan.chunks
    chunk.rows.validate()
    assert chunk.rows.source_N.tolist() == [t for t, _ in pairs]
    assert chunk.weight_N.tolist() == [tokens[t][e][0] for t, e in pairs]
    assert plan.count_E.tolist() == chunk.rows.counts() == [sum(e in row for row in tokens) for e in range(6)]
    assert slots_of(chunk.rows) == [[n for n, (row, _) in enumerate(pairs) if row == t] for t in range(31)]
    scale = torch.arange(1.0, len(pairs) + 1)
    (chunk.weight_N * scale).sum().backward()
    want = torch.zeros(expert_TK.shape)
    for n, (t, e) in enumerate(pairs):
        want[t, tokens[t][e][1]] = scale[n]
    assert torch.equal(weight_TK.grad, want)


def test_masks_and_weights_of_a_literal():
    route = Route(
        torch.tensor([[2, 0], [1, 2]]),
        torch.tensor([[0.5, 0.25], [0.0, 1.0]]),
        torch.tensor([[True, False], [True, True]]),
    )
    assert chosen_mask(route, 3).tolist() == [[False, False, True], [False, True, True]]
    assert dense_weights(route, 3).tolist() == [[0, 0, 0.5], [0, 0, 1.0]]
    assert chosen_mask(route._replace(used_TK=None), 3).tolist() == [[True, False, True], [False, True, True]]
