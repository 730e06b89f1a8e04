"""Merged weights and moments against plain fp64 loops, and the order of hidden units."""

import itertools

import numpy as np
import pytest
import torch

from foreroute.engine.compress.experts import matched_units, regrouped
from foreroute.engine.compress.groups import DROPPED, Groups
from foreroute.kernels import ExpertWeights, expert_ffn, expert_rows

E, F, D = 5, 4, 3
GROUPS = Groups(np.array([1, 4]), np.array([1, 0, 1, DROPPED, 1]))
USE = np.array([3.0, 7.0, 0.5, 2.0, 1.5])


def layer_of(gated, kinds=("weight", "exp_avg", "exp_avg_sq")):
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (E, F, D), "b1": (E, F), "w2": (E, F, D), "b2": (E, D)} | ({"w3": (E, F, D)} if gated else {})
    return {kind: {name: torch.randn(s, generator=generator) for name, s in shapes.items()} for kind in kinds}


def best_order(ours, theirs):
    """Of all orders of the hidden units that with the largest sum of products of matched units."""
    pairs = [(ours[name].double().numpy(), theirs[name].double().numpy()) for name in ours if name != "b2"]

    def gain(order):
        return sum((one[unit] * two[other]).sum() for one, two in pairs for unit, other in enumerate(order))

    return list(max(itertools.permutations(range(F)), key=gain))


@pytest.mark.parametrize("gated", [False, True])
def test_merged_experts_equal_plain_loops(gated):
    layer = layer_of(gated)
    found = regrouped(layer, GROUPS, USE)
    for group, leader in enumerate(GROUPS.leader_G.tolist()):
        members = [e for e in range(E) if GROUPS.group_E[e] == group]
        total = sum(USE[e] for e in members)
        for kind, name in itertools.product(layer, layer["weight"]):
            want = torch.zeros(layer[kind][name].shape[1:], dtype=torch.float64)
            for e in members:
                one = {n: value[leader] for n, value in layer["weight"].items()}
                order = best_order(one, {n: value[e] for n, value in layer["weight"].items()})
                order = list(range(F)) if e == leader else order
                value = layer[kind][name][e].double()
                want += USE[e] / total * (value if name == "b2" else torch.stack([value[unit] for unit in order]))
            torch.testing.assert_close(found[kind][name][group].double(), want, rtol=1e-6, atol=1e-7)


def test_an_expert_alone_is_unchanged():
    layer = layer_of(False)
    found = regrouped(layer, Groups(np.array([0, 3]), np.array([0, DROPPED, DROPPED, 1, DROPPED])), USE)
    for kind, named in layer.items():
        assert all(torch.equal(found[kind][name], value[[0, 3]]) for name, value in named.items())


def test_a_group_without_use_has_the_plain_mean():
    layer = layer_of(False)
    unused, even = (regrouped(layer, GROUPS, use_E) for use_E in (np.zeros(E), np.full(E, 2.0)))
    assert all(torch.equal(even["weight"][name], value) for name, value in unused["weight"].items())
    assert not torch.equal(regrouped(layer, GROUPS, USE)["weight"]["w1"], unused["weight"]["w1"])


@pytest.mark.parametrize("gated", [False, True])
def test_an_order_of_hidden_units_is_found_again_and_changes_no_output(gated):
    """Two experts, the second of which is the first with its units in another order, computed by the kernel."""
    (layer,) = layer_of(gated, kinds=["weight"]).values()
    expert, order = {name: value[0] for name, value in layer.items()}, torch.tensor([2, 0, 3, 1])
    other = {name: value if name == "b2" else value[order] for name, value in expert.items()}
    units = matched_units(other, expert)
    assert units.tolist() == order.tolist()
    weights = ExpertWeights(
        *(torch.stack([expert[n], other[n]]) if n in expert else None for n in ("w1", "b1", "w2", "b2", "w3"))
    )
    x_TD = torch.randn(6, D, generator=torch.Generator().manual_seed(1))
    rows, _ = expert_rows(torch.arange(2).expand(6, 2), 2)
    first, second = expert_ffn(x_TD, weights, rows, activation="silu" if gated else "relu", backend="cpu").split(6)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    wrong = {name: value if name == "w2" else other[name] for name, value in expert.items()}
    assert matched_units(wrong, expert).tolist() != order.tolist() or not torch.equal(wrong["w2"], other["w2"])
