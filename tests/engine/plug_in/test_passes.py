"""Passes and the graphs they belong to, without a model."""

from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint

from foreroute.engine.plug_in.passes import Pass, Passes, backward_node, tensors_of


def begin(passes, layers=(0,)):
    new = Pass(SimpleNamespace(used=set(layers)), 0, torch.autograd._get_sequence_nr())
    passes.begin(new)
    return new


def recomputed(passes, found, reentrant):
    """A function of which each recomputation says what pass it is of."""

    def run(x):
        node = backward_node()
        if node is not None:
            found.append(passes.of_node(node, 0))
        return x.sin().cos()

    return lambda x: checkpoint(run, x, use_reentrant=reentrant)


def test_recomputation_finds_the_pass_that_noted_its_graph():
    for reentrant in (False, True):
        passes, found = Passes(), []
        x = torch.ones(3, requires_grad=True)
        run = recomputed(passes, found, reentrant)
        made = []
        for _ in range(3):
            one = begin(passes)
            y = run(x * 2)
            passes.note({"y": (y,)}, one)
            passes.end()
            made.append((one, y.exp()))  # what follows is not noted
        for index in (1, 2, 0):
            made[index][1].sum().backward()
        assert found == [made[index][0] for index in (1, 2, 0)]


def test_without_a_note_only_the_one_possible_pass_is_taken():
    passes, found = Passes(), []
    x = torch.ones(3, requires_grad=True)
    run = recomputed(passes, found, True)
    before = run(x)
    one = begin(passes)
    y, z, late = run(x), run(x), run(x)
    y.sum().backward()
    before.sum().backward()  # made before the pass began
    two = begin(passes)
    z.sum().backward()  # older than the second
    run(x).sum().backward()  # of either
    two.over = True
    run(x).sum().backward()
    one.plans.used.clear()
    late.sum().backward()  # the layer has run in none
    assert found == [one, None, one, None, one, None]


def test_an_older_graph_is_not_noted():
    """As where the states of one pass go into the next."""
    passes = Passes()
    one, memory = begin(passes), torch.ones(3, requires_grad=True).sin()
    two = begin(passes)
    y = memory.cos()
    passes.note(y, two)
    assert passes.of_node(y.grad_fn, 0) is two
    passes.note(memory, one)
    assert passes.of_node(memory.grad_fn, 0) is one


def test_a_pass_lives_as_long_as_its_graph():
    passes = Passes()
    begin(passes)
    y = torch.ones(3, requires_grad=True).sin()
    passes.note(y, passes.end())
    assert len(passes._alive) == 1
    del y
    assert len(passes._alive) == 0


def test_tensors_of_outputs():
    a, b, c, d = torch.eye(4)
    assert [*map(id, tensors_of({"x": (a, [b]), "y": None, "z": {"w": c}}))] == [id(a), id(b), id(c)]
    assert [*tensors_of(d)] == [d] and [*tensors_of("text")] == []
