"""Clusters of hidden units, and which slices a token gets: tables and live routers against plain loops."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from foreroute.engine.config import MoEConfig, RouteWeights
from foreroute.engine.convert import Slices, plan_slices, train_slice_routers
from foreroute.engine.convert.clusters import balanced_clusters, unit_rows
from foreroute.engine.convert.selection import kept_share
from foreroute.engine.convert.slice_router import SLICE_ROUTER
from foreroute.engine.errors import UserError
from foreroute.engine.plug_in import replace_feed_forwards

SYMBOLS, WIDTH, HIDDEN, SLICES = 9, 6, 16, 4


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return self.mlp(x + 0.3 * x.cumsum(1))


def texts(count, seed=0):
    """Ids below 8 with padding; 8 never occurs."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(0, SYMBOLS - 1, (4, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        yield {"input_ids": ids, "attention_mask": mask}


def seen(model, batches):
    """Each real token's id, hidden state at the feed-forward, and its hidden units."""
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            total = torch.zeros(WIDTH)
            for number, real in zip(ids.tolist(), mask.tolist(), strict=True):
                x = model.embed.weight[number].detach()
                total = total + x
                if real:
                    hidden = torch.relu(model.mlp[0](x + 0.3 * total)).detach()
                    yield number, x + 0.3 * total, hidden


def moe_of(**options):
    return MoEConfig(experts=SLICES, ngram=1, weights=RouteWeights.sum, **options)


def convert(model, moe, k):
    return replace_feed_forwards(model, "mlp", width=WIDTH, vocab_size=SYMBOLS, moe=moe, k=k, start=Slices(), seed=3)


def test_tables_list_the_slices_by_each_ids_mean_activation(tmp_path):
    model, dense = Host(), Host()
    moe = plan_slices(
        model, "mlp", texts(3), width=WIDTH, vocab_size=SYMBOLS, moe=moe_of(), file=tmp_path / "t.npy", seed=3
    )
    table = np.load(tmp_path / "t.npy")
    experts = convert(model, moe, 2)
    order = model.mlp.order_F.view(SLICES, -1).tolist()
    tokens = list(seen(dense, texts(3)))
    mass = np.array([[sum(hidden[f].item() for f in units) for units in order] for _, _, hidden in tokens])
    ids = np.array([number for number, _, _ in tokens])
    overall = mass.mean(axis=0)
    for number in range(SYMBOLS):
        own = mass[ids == number]
        mean = (own.sum(axis=0) + overall) / (len(own) + 1)
        assert table[number].tolist() == np.argsort(-mean, kind="stable").tolist()
    assert (ids == SYMBOLS - 1).sum() == 0 and len({tuple(row) for row in table.tolist()}) > 3
    batch = next(texts(1, seed=8))
    with experts.planned(batch["input_ids"], mask=batch["attention_mask"]):
        got = model(batch["input_ids"])[batch["attention_mask"].bool()]
    first, last = dense.mlp[0], dense.mlp[2]
    for row, (number, x, _) in zip(got, seen(dense, [batch]), strict=True):
        units = [f for e in table[number][:2] for f in order[e]]
        want = torch.relu(first.weight[units] @ x + first.bias[units]) @ last.weight[:, units].T + last.bias
        assert torch.allclose(row, want, atol=1e-6)


def test_a_trained_router_keeps_more_than_an_untrained_one_and_chance():
    model, dense = Host(), Host()
    experts = convert(model, moe_of(router=SLICE_ROUTER), SLICES)
    train_slice_routers(model, texts(20), seed=1)
    tokens = list(seen(dense, texts(5, seed=9)))
    x = torch.stack([x for _, x, _ in tokens])
    hidden = torch.stack([hidden for _, _, hidden in tokens])
    mass = hidden[:, model.mlp.order_F].unflatten(1, (SLICES, -1)).sum(2)
    router = experts.layers[0].router
    chosen = router(x, 2).route
    best = kept_share(mass, mass.topk(2, dim=1).indices)
    kept = kept_share(mass, chosen.expert_TK)
    assert kept > 0.9 * best and kept > 0.6
    assert torch.equal(chosen.weight_TK, torch.ones(len(x), 2))
    inner = torch.tanh(x @ router.inner_ED.T + router.inner_E)
    assert torch.allclose(router.logits(x), inner @ router.outer_EE.T + router.outer_E, atol=1e-6)
    worst = kept_share(mass, (-mass).topk(2, dim=1).indices)
    assert worst < 0.5 < best


def test_models_without_such_routers_and_empty_texts_are_refused(tmp_path):
    model = Host()
    with pytest.raises(UserError, match=r"the model has no slices with moe\.router="):
        train_slice_routers(model, texts(1))
    with pytest.raises(UserError, match="batches: must be at least one"):
        plan_slices(model, "mlp", [], width=WIDTH, vocab_size=SYMBOLS, moe=moe_of(), file=tmp_path / "t.npy")


def test_clusters_are_balanced_and_nearly_the_best():
    """Rows that point in planted directions are found; an assignment is within 0.1% of the range of scipy's."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 20, generator=generator)
    which = torch.arange(4).repeat(8)
    rows = (centres[which] + 0.1 * torch.randn(32, 20, generator=generator)) * torch.rand(32, 1, generator=generator)
    best = max(
        (balanced_clusters(rows, 4, rounds=20, generator=torch.Generator().manual_seed(seed)) for seed in range(5)),
        key=lambda order: sum(unit_rows(rows)[part].mean(0).norm().item() for part in order.view(4, 8)),
    )
    assert all(len(set(which[part].tolist())) == 1 for part in best.view(4, 8))
    order = balanced_clusters(torch.randn(40, 6, generator=generator), 5, rounds=20, generator=generator)
    assert sorted(order.tolist()) == list(range(40))
    assert all(part == sorted(part) for part in order.view(5, 8).tolist())
    assert balanced_clusters(rows, 4, rounds=0, generator=generator).tolist() == list(range(32))
    rows = torch.randn(40, 6, generator=generator)
    order = balanced_clusters(rows, 5, rounds=1, generator=torch.Generator().manual_seed(7))
    first = unit_rows(rows)[torch.randperm(40, generator=torch.Generator().manual_seed(7))[:5]]
    scores = (unit_rows(rows) @ first.T).numpy()
    row, column = linear_sum_assignment(np.repeat(-scores, 8, axis=1))
    cluster = np.empty(40, int)
    cluster[order.numpy()] = np.arange(40) // 8
    best_sum = scores[row, column // 8].sum()
    assert best_sum - scores[np.arange(40), cluster].sum() <= 40 * 1e-3 * np.ptp(scores) + 1e-9
