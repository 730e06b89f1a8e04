"""Live routers inside a model that is not ours: against plain loops on one rank, and on 2 ranks against one."""

from contextlib import nullcontext
from types import SimpleNamespace

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from foreroute.engine.config import MoEConfig, ParallelConfig
from foreroute.engine.plug_in import experts_of, mean_over_ranks, replace_feed_forwards
from foreroute.engine.testing.ranks import run_ranks
from tests.engine.plug_in import test_plug_in_on_ranks as plain_case

EXPERTS, WIDTH, K = plain_case.EXPERTS, plain_case.WIDTH, 2
LEARNED = {"router": "learned", "balance_loss": 0.7, "z_loss": 0.3}


def make(dropout=0.0, moe=LEARNED, **parallel):
    torch.manual_seed(0)
    model = plain_case.Theirs()
    experts = replace_feed_forwards(
        model,
        r"layers\.\d+\.mlp",
        width=WIDTH,
        vocab_size=plain_case.SYMBOLS,
        moe=MoEConfig(experts=EXPERTS, expert_width=12, **moe),
        k=K,
        dropout=dropout,
        init_std=0.3,
        parallel=ParallelConfig(**parallel),
    )
    with torch.no_grad():
        for layer in experts.layers:
            for parameter in layer.router.parameters():
                parameter.normal_()
    return model, experts


def by_loops(layer, x_TD):
    """Outputs and losses of one layer with a learned router, token by token."""
    weights, router = layer.experts, layer.router
    logits_TE = torch.stack([router.gate_weight @ x + router.gate_bias for x in x_TD])
    share_TE = logits_TE.exp() / logits_TE.exp().sum(1, keepdim=True)
    y_T, count_E = [], torch.zeros(EXPERTS, dtype=torch.float64)
    for x, logits in zip(x_TD, logits_TE, strict=True):
        chosen = sorted(range(EXPERTS), key=lambda e, logits=logits: -logits[e].item())[:K]
        count_E[chosen] += 1
        total = sum(logits[e].exp() for e in chosen)
        y = 0
        for e in chosen:
            hidden = (weights.w1[e] @ x + weights.b1[e]).clamp(min=0)
            y = y + logits[e].exp() / total * (hidden @ weights.w2[e] + weights.b2[e])
        y_T.append(y)
    balance = EXPERTS * (count_E / count_E.sum() * share_TE.mean(0)).sum()
    z = logits_TE.exp().sum(1).log().square().mean()
    return torch.stack(y_T), 0.7 * balance + 0.3 * z


def forward_by_loops(model, ids, targets):
    x, auxiliary = model.embed(ids), 0
    for block in model.layers:
        x = x + block.mix(x.cumsum(1) / plain_case.LENGTH)
        y_TD, loss = by_loops(block.mlp.moe, x.flatten(0, 1))
        x, auxiliary = x + y_TD.view_as(x), auxiliary + loss
    return cross_entropy(model.head(x).flatten(0, 1), targets.flatten()), auxiliary


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("how", ["alone", "planned", "attached", "recomputed"])
def test_a_learned_router_equals_plain_loops(how):
    model, experts = make()
    model.double()
    model.recompute = how == "recomputed"
    _, ids, targets = plain_case.batch(0)
    want = forward_by_loops(model, ids, targets)
    sum(want).backward()
    want_gradients = gradients(model)
    for _ in range(2):  # a second pass has losses of its own
        if how == "planned":
            with experts.planned(ids):
                loss = model(ids, targets)
        else:
            attachment = experts.attach(model) if how == "attached" else None
            loss = model(ids, targets)
            if attachment is not None:
                attachment.remove()
        auxiliary = experts.auxiliary_loss()
        (loss + auxiliary).backward()
        got = gradients(model)
        assert [loss.item(), auxiliary.item()] == pytest.approx([one.item() for one in want], rel=1e-6)
        for name, value in got.items():
            torch.testing.assert_close(value, want_gradients[name], rtol=1e-5, atol=1e-7)
    assert want_gradients["layers.0.mlp.moe.router.gate_weight"].abs().max() > 1e-3


def test_padding_has_no_expert_and_no_loss():
    model, experts = make()
    ids = plain_case.batch(0)[1][:4]
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[2, :3] = 0, 0
    seen = []
    model.layers[0].mlp.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    with experts.planned(ids, mask=mask):
        model(ids, ids)
    (x, y), loss = seen[0], experts.auxiliary_loss()
    assert not y[mask == 0].any() and y[mask == 1].any(dim=-1).all()
    want_TD, first = by_loops(model.layers[0].mlp.moe.double(), x[mask == 1].double())
    torch.testing.assert_close(y[mask == 1].double(), want_TD, rtol=1e-4, atol=1e-5)
    assert experts._losses[0].item() == pytest.approx(first.item(), rel=1e-5)
    assert loss.item() == pytest.approx(sum(one.item() for one in experts._losses.values()), rel=1e-6)


def test_a_cache_and_a_mask_that_covers_it_are_no_context():
    """Ids left of the call do not matter, so a call that continues a text is taken; its own part of the mask counts."""
    model, experts = make()

    class Generating(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids, attention_mask, past):
            return self.inner.layers[0].mlp(self.inner.embed(ids))

    outer = Generating()
    experts.attach(outer, ids="ids", mask="attention_mask")
    ids = plain_case.batch(0)[1][:2, :1]
    y = outer(ids=ids, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]), past=[object()])
    assert y[0].any() and not y[1].any()


def test_dropout_is_drawn_anew_and_recomputed_alike():
    _, ids, targets = plain_case.batch(0)
    found = []
    for recompute in (False, True):
        model, experts = make(dropout=0.4)
        model.recompute = recompute
        losses = []
        for _ in range(2):
            loss = model(ids, targets)
            losses.append(loss.item())
            loss.backward()
        found.append((losses, gradients(model)))
        assert losses[0] != losses[1]
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], rtol=1e-6, atol=1e-8)
    assert experts.state_dict()["dropout"] == (0, 2)


def test_a_bias_moves_after_a_step():
    """By u towards equal load, from the rows of all micro-batches; evaluation does not count."""
    model, experts = make(moe={"router": "sigmoid_bias", "options": {"update": 0.25}})
    count_LE = torch.zeros(2, EXPERTS)

    def note(module, args, live):
        count_LE[note.layers.index(module)] += torch.bincount(live.route.expert_TK.flatten(), minlength=EXPERTS)

    note.layers = [layer.router for layer in experts.layers]
    hooks = [router.register_forward_hook(note) for router in note.layers]
    for step in (0, 1):
        model(*plain_case.batch(step)[1:])
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        model(*plain_case.batch(2)[1:])
    experts.after_step()
    for layer, count_E in zip(experts.layers, count_LE, strict=True):
        assert torch.equal(layer.router.bias, 0.25 * torch.sign(count_E.mean() - count_E)) and layer.router.bias.any()
    before = [layer.router.bias.clone() for layer in experts.layers]
    experts.after_step()  # of no pass
    assert all(torch.equal(layer.router.bias, bias) for layer, bias in zip(experts.layers, before, strict=True))
    assert experts_of(model).auxiliary_loss().item() == 0


def test_values_for_the_next_layer_cannot_be_recomputed():
    model, _ = make(moe={"router": "moe_plus_plus", "copy_experts": 1})
    _, ids, targets = plain_case.batch(0)
    model(ids, targets).backward()
    assert model.layers[1].mlp.moe.router.residual_weight.grad.any()
    model.recompute = True
    with pytest.raises(RuntimeError, match=r"no activation checkpointing with moe.router=moe_plus_plus"):
        model(ids, targets).backward()


# On ranks.


def one_rank(moe):
    model, experts = make(0.3, moe)
    adam = torch.optim.Adam(model.parameters(), **plain_case.ADAM)
    losses = []
    for step in range(2):
        _, ids, targets = plain_case.batch(step)
        loss = model(ids, targets) + experts.auxiliary_loss()
        loss.backward()
        adam.step()
        adam.zero_grad()
        experts.after_step()
        losses.append(loss.item())
    return losses, plain_case.by_expert(state(model), range(EXPERTS))


def state(model, read=nn.Parameter.detach):
    buffers = {name: b for name, b in model.named_buffers() if name.endswith("bias")}
    return {**{name: read(p) for name, p in model.named_parameters()}, **buffers}


def train(rank, case):
    stage, moe, options, unequal = case
    model, experts = make(0.3, moe, **options)
    engine = plain_case.initialize(model, stage)
    ranks, losses = dist.get_world_size(), []
    for step in range(2):
        sizes = (5, 3) if unequal else (4, 4)
        _, ids, targets = (part.split(sizes)[rank] for part in plain_case.batch(step))
        with experts.planned(ids) if unequal else nullcontext():
            loss = engine(ids, targets)
            loss = mean_over_ranks(loss * len(ids), len(ids)) + experts.auxiliary_loss()
            engine.backward(loss)
        engine.step()
        experts.after_step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / ranks)
    local = EXPERTS // options.get("expert_ranks", 1)
    first = rank % options.get("expert_ranks", 1) * local
    weights = state(engine.module, safe_get_full_fp32_param)
    return losses, plain_case.by_expert(weights, range(first, first + local))


BIASED = {"router": "sigmoid_bias", "options": {"update": 0.25}}
CASES = [
    (1, LEARNED, {"expert_ranks": 2}, False),
    (3, LEARNED, {}, False),
    (3, BIASED, {"expert_ranks": 2, "chunks": 2}, False),
    (1, BIASED, {"expert_ranks": 2}, True),
]


def work(rank):
    deepspeed.utils.logging.logger.setLevel("ERROR")
    return [train(rank, case) for case in CASES]


@pytest.mark.dist
def test_two_ranks_train_like_one():
    answers = run_ranks(work, 2)
    for number, (_, moe, *_) in enumerate(CASES):
        losses, weights = one_rank(moe)
        for answer in answers:
            plain_case.compare(
                SimpleNamespace(losses=answer[number][0], weights=answer[number][1]),
                SimpleNamespace(losses=losses, weights=weights),
            )
        assert {name for answer in answers for name in answer[number][1]} == set(weights)
    start = plain_case.by_expert(state(make(0.3, LEARNED)[0]), range(EXPERTS))
    assert min(np.abs(one_rank(LEARNED)[1][name] - start[name]).max() for name in start) > 1e-4
