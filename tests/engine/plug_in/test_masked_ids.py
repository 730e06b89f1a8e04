"""No id under a mask is in a plan: neither padding, nor the ids that a masked language model is to predict."""

import pytest
import torch
from torch import nn

from foreroute.engine.config import Builder, MoEConfig
from foreroute.engine.nested import tensors_in
from foreroute.engine.plug_in import replace_feed_forwards

SYMBOLS, WIDTH, N, MASK = 13, 8, 3, 12
MOE = MoEConfig(experts=8, expert_width=16, ngram=N, rows=SYMBOLS**N, builder=Builder.random)


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(SYMBOLS, WIDTH), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    return model, replace_feed_forwards(model, "1", width=WIDTH, vocab_size=SYMBOLS, moe=MOE, k=2, init_std=0.5)


def ids():
    return torch.randint(1, MASK, (3, 9), generator=torch.Generator().manual_seed(1))


def equal(one, other):
    pairs = zip(tensors_in(one.plans), tensors_in(other.plans), strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("left", [True, False])
def test_ids_of_padding(made, left):
    model, experts = made
    place = torch.arange(9) if left else torch.arange(9).flip(0)
    real = place >= torch.tensor([0, 2, 8])[:, None]
    found = []
    for more, where in ((0, ~real), (5, ~real), (5, real)):
        changed = ids()
        changed[where] = (changed[where] + more) % SYMBOLS
        with experts.planned(changed, mask=real) as plans, torch.no_grad():
            found.append((plans, model(changed)[real]))
    (plans, states), (same, same_states), (other, other_states) = found
    assert equal(plans, same) and torch.equal(states, same_states)
    assert not equal(plans, other) and not torch.equal(states, other_states)


def test_ids_that_are_to_be_predicted(made):
    """Batches as a collator for masked language models makes them, planned ahead."""
    model, experts = made
    hidden = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.4

    def batch(original):
        return {"input_ids": original.masked_fill(hidden, MASK), "labels": original.where(hidden, -100)}

    def run(*originals, place="input_ids"):
        found = []
        for plans, given in experts.ahead(map(batch, originals), ids=place):
            with experts.planned(plans), torch.no_grad():
                found.append((plans, model(given["input_ids"])))
        return found

    original = ids()
    under_mask, visible = (original.where(where, original % 11 + 1) for where in (~hidden, hidden))
    (plans, states), (same, same_states), (other, other_states) = run(original, under_mask, visible)
    assert equal(plans, same) and torch.equal(states, same_states)
    assert not equal(plans, other) and not torch.equal(states, other_states)
    leaking = [experts.plan(given) for given in (original, under_mask)]  # negative control
    assert not equal(*leaking)
