"""Every planned router in a model that is not ours: it trains like plain loops over tokens and experts, or is refused.

Methods are found: a new one is in this test as soon as it has a file in conf/router/. The truth routes by the method's
own `route`, which tests/engine/routing/methods/ holds to its formula, and computes the rest here.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from foreroute.engine.config import MoEConfig, Split
from foreroute.engine.config.model import router_names
from foreroute.engine.errors import RunFailed, UserError
from foreroute.engine.plug_in import replace_feed_forwards
from foreroute.engine.routing.methods import planned_method
from foreroute.engine.routing.planned.given import create_routes, finish_routes
from foreroute.engine.routing.planned_router import Draw, GroupTokens, Places, RouterInputs
from foreroute.launch.start.help import CONF

SYMBOLS, WIDTH, EXPERTS, LAYERS, K, SEED, STEPS = 11, 8, 4, 2, 2, 3, 3
VARIANTS = {
    "hashed, packed": {"builder": "packed", "pack": 2},
    "hashed, shuffled keys": {"keys": "shuffled"},
    "hashed, weights sum": {"weights": "sum"},
    "hashed, one table": {"share_table": True},
    "hashed, live weights": {"weights": "live", "gate": "sqrt_softplus", "gate_scale": 1.5},
    "hashed, experts without rows": {"constant_experts": 1, "copy_experts": 1, "null_experts": 1},
    "hashed, shared expert": {"shared_width": 6, "residual": True},
    "top_p, live weights and experts without rows": {"weights": "live", "constant_experts": 1, "copy_experts": 2},
    "given, equal weights": {"weights": "uniform"},
    "given, live weights": {"weights": "live", "gate": "softmax"},
    "given, routes with the batch": {"weights": "table"},
    "given, unequal routes with the batch": {"weights": "uniform"},
}
NAMES = [name for name in router_names() if name != "dense" and planned_method(MoEConfig(router=name))]
KINDS = [*NAMES, *VARIANTS]
REFUSED = {"strata": "moe.strata=4: must be 1, as a feed-forward is replaced by one expert layer"}
OPTIONS = {"by_frequency": {"power": 0.5}}  # by default this small text has equal numbers
WITH_BATCH = "routes with the batch"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, WIDTH))

    def forward(self, x):
        x = x + self.mix(x.cumsum(1) / x.shape[1])
        return x + self.mlp(x)


class Theirs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, ids, targets):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


@pytest.fixture(scope="module")
def text():
    return torch.from_numpy((np.random.default_rng(1).random(600) ** 2 * SYMBOLS).astype(np.int64))


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("files"), np.random.default_rng(2)
    order = draw.permuted(np.tile(np.arange(EXPERTS), (LAYERS, SYMBOLS**2, 1)), axis=2)
    np.save(folder / "token_table.npy", order[..., :3])
    experts, weights = create_routes(folder / "given.npy", (len(text), LAYERS, 3))
    experts[:] = draw.permuted(np.tile(np.arange(EXPERTS), (len(text), LAYERS, 1)), axis=2)[..., :3]
    weights[:] = draw.random(weights.shape)
    finish_routes(folder / "given.npy", text.numpy(), 3)
    return folder


def config_of(kind, folder):
    name = kind.partition(",")[0]
    options = yaml.safe_load((CONF / "router" / f"{name}.yaml").read_text())
    options["options"] = options.get("options", {}) | OPTIONS.get(name, {})
    file = folder / f"{name}.npy"
    if file.exists() and WITH_BATCH not in kind:
        options["options"]["file"] = str(file)
    rows = {"experts": EXPERTS, "expert_width": 6, "ngram": 2, "rows": SYMBOLS**2}
    return MoEConfig(**rows | options | VARIANTS.get(kind, {}))


def make(kind, folder, text):
    torch.manual_seed(0)
    model, moe = Theirs(), config_of(kind, folder)
    experts = replace_feed_forwards(
        model,
        r"layers\.\d+\.mlp",
        width=WIDTH,
        vocab_size=SYMBOLS,
        moe=moe,
        k=K,
        seed=SEED,
        init_std=0.5,
        text_ids=None if WITH_BATCH in kind else text,
    )
    return model.double(), experts


def batch(step, text, kind):
    """Ids, targets and the keywords of a plan."""
    place = torch.tensor([7, 300, 500 - step]) + 20 * step
    both = text[place[:, None] + torch.arange(10)]
    context = {"places": place} if kind.startswith("given") else {}
    if WITH_BATCH in kind:
        draw = np.random.default_rng(step)
        shape = (*both[:, 1:].shape, LAYERS)
        routes = torch.from_numpy(draw.permuted(np.tile(np.arange(EXPERTS), (*shape, 1)), axis=-1)[..., :3])
        if "unequal" in kind:
            routes[torch.arange(3) >= torch.from_numpy(draw.integers(0, 4, (*shape, 1)))] = -1
        context = {"routes": routes, "route_weights": torch.from_numpy(draw.random((*shape, 3))).float()}
    return both[:, :-1], both[:, 1:], context


# The truth.


def routes_of(kind, moe, routers, ids, context, step, held_out=False):
    """Experts, weights and which of them are used, all [T, K], of each layer."""
    if WITH_BATCH in kind:
        expert_TyK, weight_TyK = (context[name].flatten(0, 1) for name in ("routes", "route_weights"))
        for layer in range(LAYERS):
            expert_TK, weight_TK = expert_TyK[:, layer], weight_TyK[:, layer]
            used_TK = expert_TK >= 0
            if "unequal" not in kind:
                used_TK = used_TK & (torch.arange(3) < K)
                part = weight_TK[:, :K].sum(1, keepdim=True)
                yield expert_TK, weight_TK * weight_TK.sum(1, keepdim=True) / part, used_TK
            else:
                yield expert_TK.clamp(min=0), 1 / used_TK.sum(1, keepdim=True).clamp(min=1) * used_TK, used_TK
        return
    draw = Draw(np.arange(ids.numel())[None], step, held_out)
    left = torch.zeros(len(ids), moe.ngram - 1, dtype=torch.int64)
    places = Places(Split.train, context["places"][None]) if context else None
    tokens = GroupTokens(ids[None], left[None], draw=draw, places=places)
    for layer in range(LAYERS):
        route = routers[layer % len(routers)].route(tokens, K)
        used_TK = torch.ones_like(route.expert_TK) > 0 if route.used_TK is None else route.used_TK
        yield route.expert_TK, route.weight_TK, used_TK


def plain_layer(moe, layer, x_TD, expert_TK, weight_TK, used_TK):
    """All experts for all tokens, times the weights."""
    used_Te = torch.zeros(len(x_TD), moe.columns).scatter_add_(1, expert_TK, used_TK.float()) > 0
    if layer.gate is None:
        weight_Te = torch.zeros(len(x_TD), moe.columns, dtype=torch.float64)
        weight_Te = weight_Te.scatter_add(1, expert_TK, (weight_TK * used_TK).double())
    else:
        logits_Te = x_TD @ layer.gate.weight.T
        weight_Te = logits_Te.exp() if moe.gate.name == "softmax" else F.softplus(logits_Te).sqrt()
        weight_Te = weight_Te.where(used_Te, 0.0)
        weight_Te = moe.gate_scale * weight_Te / weight_Te.sum(1, keepdim=True).clamp(min=1e-12)
    p, y_TD = layer.experts, torch.zeros_like(x_TD)
    first = [place == 0 for size in planned_method(moe).slices(moe) for place in range(size)]
    for e in range(moe.experts):
        out_TD = F.relu(x_TD @ p.w1[e].T + p.b1[e]) @ p.w2[e] + p.b2[e] * first[e]
        y_TD = y_TD + weight_Te[:, e, None] * out_TD
    for c in range(moe.constant_experts):
        part_T2 = (x_TD @ layer.zero_experts.mix[c].T).softmax(dim=1)
        out_TD = part_T2[:, :1] * x_TD + part_T2[:, 1:] * layer.zero_experts.vector[c]
        y_TD = y_TD + weight_Te[:, moe.experts + c, None] * out_TD
    for c in range(moe.copy_experts):
        y_TD = y_TD + weight_Te[:, moe.experts + moe.constant_experts + c, None] * x_TD
    if layer.shared is None:
        return y_TD
    s = layer.shared
    shared_TD = F.relu(x_TD @ s.w1.weight.T + s.w1.bias) @ s.w2.weight.T + s.w2.bias
    c_T2 = layer.coefficient(x_TD).softmax(dim=1)
    return c_T2[:, :1] * y_TD + c_T2[:, 1:] * shared_TD


def plain_loss(model, moe, ids, targets, routes):
    x = model.embed(ids)
    for block, route in zip(model.layers, routes, strict=True):
        x = x + block.mix(x.cumsum(1) / x.shape[1])
        x = x + plain_layer(moe, block.mlp.moe, x.flatten(0, 1), *route).view_as(x)
    return F.cross_entropy(model.head(x).flatten(0, 1), targets.flatten())


def plain(kind, model, moe, text):
    """Losses and weights after three steps."""
    inputs = RouterInputs(SYMBOLS, SEED, 1 if moe.share_table else LAYERS, text.numpy(), splits=lambda _: text.numpy())
    routers = [] if WITH_BATCH in kind else planned_method(moe).build(moe, inputs)
    sgd, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for step in range(STEPS):
        ids, targets, context = batch(step, text, kind)
        loss = plain_loss(model, moe, ids, targets, routes_of(kind, moe, routers, ids, context, step))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


def train(model, experts, text, kind, steps=range(STEPS)):
    sgd, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    batches = [batch(step, text, kind) for step in steps]
    mappings = [{"ids": ids, "targets": targets, **context} for ids, targets, context in batches]
    names = {name: name for name in ("ids", *batches[0][2])}
    for plans, found in experts.ahead(mappings, **names):
        with experts.planned(plans):
            loss = model(found["ids"], found["targets"])
            sgd.zero_grad()
            loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def results():
    return {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_trains_like_plain_loops_or_is_refused(kind, folder, text, results):
    if kind in REFUSED:
        with pytest.raises(UserError) as error:
            make(kind, folder, text)
        assert REFUSED[kind] in str(error.value) and "\n" not in str(error.value)
        return
    model, experts = make(kind, folder, text)
    moe, begin = config_of(kind, folder), copy.deepcopy(dict(model.named_parameters()))
    losses, want = plain(kind, copy.deepcopy(model), moe, text)
    assert train(model, experts, text, kind) == pytest.approx(losses, rel=1e-7)  # weights are fp32
    for name, value in model.named_parameters():
        assert torch.linalg.norm(value - want[name]) < 1e-6 * torch.linalg.norm(want[name]), name
        assert not torch.equal(value, begin[name]), name
    results[kind] = losses


def test_kinds_differ(results):
    """Negative control: no kind trains like another one."""
    assert len({losses[-1] for losses in results.values()}) == len(results)


# What is drawn.


@pytest.mark.parametrize("kind", ["fresh", "stochastic", "hashed, shuffled keys"])
def test_a_restored_state_goes_on_with_the_same_draws(kind, folder, text):
    model, experts = make(kind, folder, text)
    want = train(model, experts, text, kind)
    model, experts = make(kind, folder, text)
    train(model, experts, text, kind, range(2))
    experts.plan(batch(0, text, kind)[0])  # never used
    state, weights = experts.state_dict(), copy.deepcopy(model.state_dict())
    model, experts = make(kind, folder, text)
    experts.load_state_dict(state)
    model.load_state_dict(weights)
    assert train(model, experts, text, kind, [2]) == want[2:]
    other = make(kind, folder, text)[1]
    other.load_state_dict({**state, "draws": 0})  # negative control
    copied = copy.deepcopy(model)
    copied.load_state_dict(weights)
    assert train(*_with(copied, other), text, kind, [2]) != want[2:]


def _with(model, experts):
    for block in model.layers:
        block.mlp._experts = experts
    return model, experts


def test_evaluation_draws_the_same_each_time_and_leaves_training_alone(folder, text):
    def losses(evaluate):
        model, experts = make("fresh", folder, text)
        found = []
        for step in range(2):
            found += train(model, experts, text, "fresh", [step])
            model.eval()
            for number in range(2 * evaluate):
                ids, targets, _ = batch(number, text, "fresh")
                with torch.no_grad(), experts.planned(ids) as plans:
                    model(ids, targets)
                draws.setdefault((step, number), [plan.chunks[0].rows.source_N.tolist() for plan in plans.plans])
            model.train()
        return found

    draws = {}
    assert losses(True) == losses(False)
    assert draws[0, 0] == draws[1, 0] and draws[0, 1] == draws[1, 1] and draws[0, 0] != draws[0, 1]


# What is refused.


def test_routes_that_do_not_fit_are_named(folder, text):
    _, experts = make("given, routes with the batch", folder, text)
    ids, _, context = batch(0, text, "given, routes with the batch")
    routes, weights = context["routes"], context["route_weights"]
    twice, high = routes.clone(), routes.clone()
    twice[0, 1, 1], high[1, 2, 0, 0] = 2, 4
    for given, fault in (
        ({}, "moe.router=given: routes are known of the splits of the run's text alone, or come with the batch"),
        ({"routes": routes}, "moe.weights=table: routes come without weights"),
        ({"routes": routes[:2]}, r"routes of shape \[2, 9, 2, 3\], torch.int64: must be whole numbers \[3, 9, layers"),
        ({"routes": routes.double()}, "routes of shape .*, torch.float64"),
        ({"routes": routes - 2}, "routes from -2 to 1: must be numbers of experts, and -1 after"),
        ({"routes": routes, "route_weights": weights[..., :2]}, r"route_weights of shape \[3, 9, 2, 2\]: must be that"),
        ({"routes": routes[:, :, :1], "route_weights": weights[:, :, :1]}, "routes of 1 layers and 3 experts"),
        ({"routes": routes[..., :1], "route_weights": weights[..., :1]}, "must be of 2 layers and at least k=2"),
        ({"routes": twice, "route_weights": weights}, r"routes: token 1 has the experts \[2, 2, 2\] in layer 1"),
        (
            {"routes": high, "route_weights": weights},
            r"routes: token 11 has .* in layer 0; must be distinct, in 0 .. 3",
        ),
        (
            {"places": torch.zeros(3, dtype=torch.int64)},
            "places from 0 to 0, of 9 ids each: must be in the text of 0 ids",
        ),
    ):
        with pytest.raises((UserError, RunFailed), match=fault) as error:
            experts.plan(ids, **given)
        assert "\n" not in str(error.value)
    of_text = make("given", folder, text)[1]
    with pytest.raises(UserError, match=r"places of shape \[2\]: must be \[3\]"):
        of_text.plan(ids, places=torch.zeros(2, dtype=torch.int64))
    for place in (-2, 592):
        with pytest.raises(
            UserError, match=f"places from {place} to {place}, of 9 ids each: must be in the text of 600"
        ):
            of_text.plan(ids, places=torch.full((3,), place))
    with pytest.raises(UserError, match=r"routes: must be None with moe.router=hashed; given takes them"):
        make("hashed", folder, text)[1].plan(ids, routes=routes)
    moe = replace(config_of("given", folder), options={"file": str(folder / "given.npy"), "valid_file": "other.npy"})
    with pytest.raises(UserError, match="routes of the valid split: text_ids is the training split"):
        replace_feed_forwards(
            Theirs(), r"layers\.\d+\.mlp", width=WIDTH, vocab_size=SYMBOLS, moe=moe, k=K, text_ids=text
        )


def test_routes_of_padding_do_not_matter(folder, text):
    kind = "given, routes with the batch"
    _, experts = make(kind, folder, text)
    ids, _, context = batch(0, text, kind)
    mask = torch.arange(9) < torch.tensor([9, 5, 7])[:, None]
    plans = []
    for value in (-1, 0):  # 0 three times is no route
        routes = context["routes"].clone()
        routes[~mask] = value
        plans.append(experts.plan(ids, mask=mask, routes=routes, route_weights=context["route_weights"]))
    first, second = ([plan.count_E.tolist() for plan in one.plans] for one in plans)
    assert first == second and sum(first[0]) == K * mask.sum()
