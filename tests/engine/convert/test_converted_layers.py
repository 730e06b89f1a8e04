"""Feed-forwards that became copies, slices or adapters: outputs and all gradients against plain loops in fp64."""

import copy

import pytest
import torch
from torch import nn

from foreroute.engine.config import Activation, Builder, KernelsConfig, MoEConfig, RouteWeights
from foreroute.engine.config.enums import Backend
from foreroute.engine.convert import Adapters, Copies, Slices
from foreroute.engine.errors import UserError
from foreroute.engine.plug_in import replace_feed_forwards
from tests.references import converted_layer as reference

WIDTH, HIDDEN, EXPERTS, TOKENS, SYMBOLS = 5, 8, 4, 6, 7
ACT = {"relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}


class Gated(nn.Module):
    def __init__(self, act, bias):
        super().__init__()
        self.down = nn.Linear(HIDDEN, WIDTH, bias=bias)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.act = act

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Turned(nn.Module):
    """With matrices [in, out], as GPT-2's."""

    def __init__(self, act, bias):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(WIDTH, HIDDEN)), nn.Parameter(torch.randn(HIDDEN, WIDTH))
        self.of_second = nn.Parameter(torch.randn(WIDTH)) if bias else 0.0
        self.act = act

    def forward(self, x):
        return self.act(x @ self.first) @ self.second + self.of_second


def plain(act, bias):
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias), act, nn.Dropout(0.5), nn.Linear(HIDDEN, WIDTH, bias)).eval()


KINDS = {"plain": plain, "gated": Gated, "turned": Turned}


class Host(nn.Module):
    def __init__(self, kind="plain", act="relu", bias=True):
        super().__init__()
        torch.manual_seed(1)
        self.mlp = KINDS[kind](ACT[act], bias)
        self.act = act
        self.double().eval()

    def forward(self, x):
        return self.mlp(x)

    def dense(self):
        """The weights by role, as leaves, read by the names here."""
        own = {name: p.detach().clone() for name, p in self.mlp.named_parameters()}
        if isinstance(self.mlp, Gated):
            names = {"w1": "gate.weight", "b1": "gate.bias", "w2": "down.weight", "b2": "down.bias", "w3": "up.weight"}
        elif isinstance(self.mlp, Turned):
            names = {"w1": "first", "w2": "second", "b2": "of_second"}
        else:
            names = {"w1": "0.weight", "b1": "0.bias", "w2": "3.weight", "b2": "3.bias"}
        found = {role: own[name] for role, name in names.items() if name in own}
        turned = "w1" if isinstance(self.mlp, Turned) else "w2"
        found[turned] = found[turned].T
        return {role: value.clone().requires_grad_() for role, value in found.items()}


def routes(k):
    """Experts of each token, and weights that sum to 1."""
    generator = torch.Generator().manual_seed(5)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(TOKENS)])
    return chosen, torch.rand(TOKENS, k, generator=generator).softmax(1)


def convert(model, start, weights, k, backend="cpu", **options):
    moe = MoEConfig(router="given", experts=EXPERTS, weights=RouteWeights[weights], **options)
    kernels = KernelsConfig(backend=Backend[backend])
    return replace_feed_forwards(
        model, "mlp", width=WIDTH, vocab_size=SYMBOLS, moe=moe, k=k, start=start, kernels=kernels, seed=4
    )


def run(model, experts, k, x, weights="table"):
    chosen, weight = routes(k)
    given = {"routes": chosen.view(1, TOKENS, 1, k)}
    if weights == "table":
        given["route_weights"] = weight.float().view(1, TOKENS, 1, k)
    with experts.planned(torch.zeros(1, TOKENS, dtype=torch.long), **given):
        y = model(x[None])[0]
        backward(y)
    return y


def tokens():
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()


def backward(y):
    (y * torch.arange(1.0, 1 + y.numel()).view_as(y)).sum().backward()


def close(got, want, most=1e-6):
    """Weights of routes are fp32, so results are equal to 1e-7."""
    assert (got - want).norm() <= most * want.norm(), ((got - want).norm() / want.norm()).item()


CASES = [
    *(("plain", act, True, "cpu") for act in ACT),
    *(("gated", act, False, "cpu") for act in ACT),
    ("plain", "gelu", False, "reference"),
    ("gated", "relu", True, "reference"),
    ("turned", "silu", True, "cpu"),
]


@pytest.mark.parametrize(("kind", "act", "bias", "backend"), CASES)
def test_copies(kind, act, bias, backend):
    """Outputs are those of the dense feed-forward at every k, and gradients those of separate copies."""
    dense = Host(kind, act, bias)
    for k in (1, EXPERTS):
        model, x, x_ref = copy.deepcopy(dense), tokens(), tokens()
        y = run(model, convert(model, Copies(), "table", k, backend), k, x)
        close(y, dense(x))
        chosen, weight = routes(k)
        each = [dense.dense() for _ in range(EXPERTS)]
        want = reference.copies(x_ref, chosen.tolist(), weight.float().double(), each, act)
        backward(want)
        close(y, want)
        close(x.grad, x_ref.grad)
        ours = dict(model.mlp.moe.experts.named_parameters())
        assert set(ours) == set(each[0])
        for role, value in ours.items():
            missing = torch.zeros_like(each[0][role])
            close(value.grad, torch.stack([missing if one[role].grad is None else one[role].grad for one in each]))


@pytest.mark.parametrize(("kind", "act", "bias", "backend"), CASES)
def test_slices(kind, act, bias, backend):
    """All slices are the dense feed-forward; some are their units, with the output bias once."""
    dense = Host(kind, act, bias)
    for k in (2, EXPERTS):
        model, x, x_ref = copy.deepcopy(dense), tokens(), tokens()
        y = run(model, convert(model, Slices(), "sum", k, backend), k, x, "sum")
        order_F = model.mlp.order_F
        units_E = order_F.view(EXPERTS, -1).tolist()
        assert sorted(order_F.tolist()) == list(range(HIDDEN))
        leaf = dense.dense()
        want = reference.slices(x_ref, routes(k)[0].tolist(), units_E, leaf, act)
        backward(want)
        close(y, want)
        assert k < EXPERTS or torch.allclose(y, dense(x), rtol=1e-6)
        close(x.grad, x_ref.grad)
        ours = dict(model.mlp.experts.moe.experts.named_parameters())
        assert set(ours) == {role for role in leaf if role != "b2"}
        for role, value in ours.items():
            close(value.grad.flatten(0, 1), leaf[role].grad[order_F])
        if "b2" in leaf:
            close(model.mlp.bias.grad, leaf["b2"].grad)


@pytest.mark.parametrize(("kind", "act", "bias", "backend"), CASES)
def test_adapters(kind, act, bias, backend):
    """Before training the output is that of the feed-forward bit for bit; adapters alone have gradients."""
    dense, k, scale = Host(kind, act, bias), 2, 0.7
    model = copy.deepcopy(dense)
    experts = convert(model, Adapters(width=5, scale=scale), "table", k, backend)
    assert torch.equal(run(model, experts, k, tokens()), dense(tokens()))
    ours = model.mlp.experts.moe.experts
    with torch.no_grad():
        ours.w2.normal_()
    model.zero_grad()
    x, x_ref, leaf = tokens(), tokens(), dense.dense()
    y = run(model, experts, k, x)
    down, up = (value.detach().clone().requires_grad_() for value in (ours.w1, ours.w2))
    chosen, weight = routes(k)
    want = reference.adapters(x_ref, chosen.tolist(), weight.float().double(), leaf, act, down, up, scale)
    backward(want)
    close(y, want)
    close(x.grad, x_ref.grad)
    close(ours.w1.grad, down.grad)
    close(ours.w2.grad, up.grad)
    trained = {name for name, p in model.named_parameters() if p.grad is not None or p.requires_grad}
    assert trained == {"mlp.experts.moe.experts.w1", "mlp.experts.moe.experts.w2"}


@pytest.mark.parametrize("reads_input", [True, False])
def test_a_live_router_of_adapters_reads_the_input(reads_input):
    """As PESC's: its choices, weights and gradient are those of x, otherwise those of the feed-forward's output."""
    dense, k = Host("plain", "gelu", True), 2
    model = copy.deepcopy(dense)
    moe = MoEConfig(router="learned", experts=EXPERTS)
    options = {"width": WIDTH, "vocab_size": SYMBOLS, "moe": moe, "k": k, "seed": 4}
    replace_feed_forwards(model, "mlp", start=Adapters(width=5, router_reads_input=reads_input), **options)
    assert torch.equal(model(tokens()[None])[0], dense(tokens()))
    layer = model.mlp.experts.moe
    with torch.no_grad():
        layer.experts.w2.normal_()
        for parameter in layer.router.parameters():
            parameter.normal_()
    x = tokens()
    y = model(x[None])[0]
    backward(y)
    x_ref, leaf, router = tokens(), dense.dense(), copy.deepcopy(layer.router)
    router.zero_grad()
    found = {}
    for read in (True, False):
        route = router(x_ref if read else dense(x_ref), k).route
        weights = layer.experts.w1.detach(), layer.experts.w2.detach()
        found[read] = reference.adapters(
            x_ref, route.expert_TK.tolist(), route.weight_TK, leaf, dense.act, *weights, 1.0
        )
    close(y, found[reads_input])
    assert (y - found[not reads_input]).norm() > 0.01 * y.norm()
    backward(found[reads_input])
    close(x.grad, x_ref.grad)
    for own, theirs in zip(layer.router.parameters(), router.parameters(), strict=True):
        close(own.grad, theirs.grad)


def test_what_must_differ_differs():
    """Weights that do not sum to 1, noise, slices in another order, and fewer slices."""
    dense, x = Host(), tokens()
    want = dense(x)

    def apart(y):
        return ((y - want).norm() / want.norm()).item()

    model = copy.deepcopy(dense)
    experts = convert(model, Copies(), "table", 2)
    chosen, weight = routes(2)
    with experts.planned(
        torch.zeros(1, TOKENS, dtype=torch.long),
        routes=chosen.view(1, TOKENS, 1, 2),
        route_weights=1.25 * weight.float().view(1, TOKENS, 1, 2),
    ):
        assert apart(model(x[None])[0]) == pytest.approx(0.25, abs=1e-6)
    model = copy.deepcopy(dense)
    assert 0.001 < apart(run(model, convert(model, Copies(noise=0.05), "table", 2), 2, x)) < 0.2
    model = copy.deepcopy(dense)
    experts = convert(model, Slices(), "sum", EXPERTS)
    w2 = model.mlp.experts.moe.experts.w2
    w2.data = w2.data.roll(1, 0)
    assert apart(run(model, experts, EXPERTS, x, "sum")) > 0.1
    model = copy.deepcopy(dense)
    assert apart(run(model, convert(model, Slices(), "sum", 3), 3, x, "sum")) > 0.1


@pytest.mark.parametrize(
    ("start", "options", "fault"),
    [
        (Copies(), {"weights": RouteWeights.sum}, "moe.weights=sum: must be table, uniform, live with start=copy"),
        (Slices(), {"weights": RouteWeights.table}, "moe.weights=table: must be sum with start=split"),
        (Slices(), {"experts": 3}, "moe.experts=3: must divide the hidden width 8 of the feed-forwards"),
        (Copies(), {"null_experts": 1}, "moe: constant, copy and null experts must be 0 with start=copy"),
        (Copies(), {"shared_width": 8}, "moe.shared_width=8: must be 0 with start=copy"),
        (Copies(), {"router": "sized"}, "moe.router=sized: must have experts of one width, start=copy"),
        (Slices(), {"router": "learned"}, "moe.router=learned: must have weights that are 1 with start=split"),
        (Copies(), {"router": "dynamic_top_p"}, "moe.router=dynamic_top_p: must have weights that sum to 1"),
    ],
)
def test_options_that_do_not_preserve_the_output_are_refused(start, options, fault):
    moe = MoEConfig(**{"experts": 4, "ngram": 1, "rows": SYMBOLS, "builder": Builder.random, **options})
    with pytest.raises(UserError, match=fault):
        replace_feed_forwards(Host(), "mlp", width=WIDTH, vocab_size=SYMBOLS, moe=moe, k=2, start=start)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: Copies(noise=-0.1), "noise=-0.1: must be in 0 .. 1"),
        (lambda: Slices(rounds=-1), "rounds=-1: must be at least 0"),
        (lambda: Adapters(width=0), "width=0: must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(make, fault):
    with pytest.raises(UserError, match=fault):
        make()


def test_live_router_with_weights_that_sum_to_1():
    """A learned router's copies are the dense feed-forward at every k, without a plan."""
    dense, x = Host(act="gelu"), tokens()
    for k in (1, 2, EXPERTS):
        model = copy.deepcopy(dense)
        moe = MoEConfig(router="learned", experts=EXPERTS)
        replace_feed_forwards(model, "mlp", width=WIDTH, vocab_size=SYMBOLS, moe=moe, k=k, start=Copies())
        close(model(x[None])[0], dense(x))


def test_activation_and_width_follow_from_the_feed_forward():
    model = Host("gated", "silu")
    experts = convert(model, Slices(), "sum", 2, activation=Activation.relu, expert_width=999)
    assert (experts.moe.activation, experts.moe.expert_width) == (Activation.swiglu, HIDDEN // EXPERTS)
