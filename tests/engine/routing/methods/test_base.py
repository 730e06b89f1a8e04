"""BASE layers: the assignment against SciPy's and against all permutations, the layer against plain loops."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from foreroute.engine.config import Config, EvalConfig, MoEConfig, ScheduleConfig
from foreroute.engine.config.enums import Growth
from foreroute.engine.errors import UserError
from foreroute.engine.model.build import build_model
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.routing.live.base import BaseRouter, assign
from foreroute.engine.routing.plan import Routing
from foreroute.engine.testing.live_layers import assert_equal_with_gradients, live_layer
from tests.references.base import best_total
from tests.references.live_layer import mixture

WIDTH, EXPERTS = 6, 4


def config(**options):
    return MoEConfig(router="base", experts=EXPERTS, expert_width=5, options=options)


def total(scores_TE, expert_T):
    return scores_TE.gather(1, expert_T[:, None]).sum().item()


@pytest.mark.slow
@pytest.mark.method
def test_assignments_cost_what_scipys_do():
    """200 problems of 64 tokens and 64 experts, to the tolerance."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        scores_TE = torch.randn(64, 64, generator=generator, dtype=torch.float64)
        best = scores_TE.numpy()[linear_sum_assignment(scores_TE.numpy(), maximize=True)].sum()
        expert_T = assign(scores_TE, 1e-3)
        assert sorted(expert_T.tolist()) == list(range(64))
        missed = best - total(scores_TE, expert_T)
        assert -1e-9 <= missed <= 64 * 1e-3 * (scores_TE.max() - scores_TE.min())


@pytest.mark.method
@pytest.mark.parametrize(("tokens", "experts"), [(48, 4), (60, 3), (50, 4), (7, 3), (3, 5), (1, 4), (5, 1), (0, 4)])
def test_each_expert_has_equally_many_tokens_and_the_best(tokens, experts):
    """Also skewed, where all tokens like one expert; SciPy gets each expert's column as often as it has places."""
    generator = torch.Generator().manual_seed(1)
    capacity = -(-tokens // experts)
    for skew in (0.0, 10.0):
        scores_TE = torch.randn(tokens, experts, generator=generator)
        scores_TE[:, 0] += skew
        expert_T = assign(scores_TE, 1e-4)
        counts = torch.bincount(expert_T, minlength=experts)
        assert counts.max() <= capacity and (tokens % experts or counts.min() == capacity)
        if tokens:
            places = np.repeat(scores_TE.double().numpy(), capacity, axis=1)
            best = places[linear_sum_assignment(places, maximize=True)].sum()
            assert best - total(scores_TE, expert_T) <= tokens * 1e-4 * (scores_TE.max() - scores_TE.min()) + 1e-4


@pytest.mark.method
def test_small_assignments_are_the_best_of_all():
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        scores_TE = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        assert total(scores_TE, assign(scores_TE, 1e-6)) == pytest.approx(best_total(scores_TE), abs=1e-4)


def test_equal_scores_end():
    assert torch.bincount(assign(torch.zeros(12, 4), 0.02)).tolist() == [3] * 4
    assert assign(torch.tensor([[5.0, 1.0], [4.0, 3.0]]), 0.02).tolist() == [0, 1]  # the docstring's


def residual_layer(layer: MoELayer, x_TD, expert_T):
    """The published form: a E(h) + (1 - a) h, E(h) = h + f(h)."""
    ones, experts = [[1.0] * EXPERTS] * len(x_TD), layer.experts
    f_TD = mixture(x_TD, ones, [[e] for e in expert_T.tolist()], experts.w1, experts.b1, experts.w2, experts.b2)
    rows = []
    for x_D, f_D, e in zip(x_TD, f_TD, expert_T.tolist(), strict=True):
        a = 1 / (1 + torch.exp(-(layer.router.centroids[e] @ x_D)))
        rows.append(a * (x_D + f_D) + (1 - a) * x_D)
    return torch.stack(rows)


@pytest.mark.method
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_equals_plain_loops_with_every_gradient(training):
    """With the residual sum of its block; in training with exactly T / E rows of each expert, else the best expert."""
    layer = live_layer(WIDTH, config(tolerance=1e-3)).train(training)
    x_TD = torch.randn(20, WIDTH, dtype=torch.float64, requires_grad=True)
    out = layer(x_TD, Routing(1, None))
    scores_TE = (x_TD @ layer.router.centroids.T).detach()
    expert_T = scores_TE.argmax(dim=1)
    if training:
        places, columns = linear_sum_assignment(np.repeat(scores_TE.numpy(), 5, axis=1), maximize=True)
        assert places.tolist() == list(range(20))
        expert_T = torch.from_numpy(columns // 5)
    assert (out.count_E.tolist() == [5] * EXPERTS) == training
    want = residual_layer(layer, x_TD, expert_T)
    assert_equal_with_gradients([x_TD + out.y_TD], [want], [x_TD, *layer.parameters()])


def test_one_expert_for_a_token():
    with pytest.raises(UserError, match=r"k=2: must be 1 for moe.router=base"):
        BaseRouter(WIDTH, config())(torch.zeros(4, WIDTH), 2)
    for name, k_max, eval_k in (("schedule.k_max", 2, [1]), ("eval.k", 1, [1, 4])):
        schedule = ScheduleConfig(growth=Growth.constant, k_min=1, k_max=k_max)
        run = Config(moe=config(), schedule=schedule, eval=EvalConfig(k=eval_k))
        with pytest.raises(UserError, match=rf"{name}=\d: must be at most 1 for moe.router=base"):
            build_model(run, 9)
    with pytest.raises(UserError, match=r"moe.options.tolerance=0: must be above 0"):
        BaseRouter(WIDTH, config(tolerance=0))
